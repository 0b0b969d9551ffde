import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tfmq_fx import ConfigError
from tfmq_fx.diagnostics.comparison import (
    Latency,
    ddim_scheduler,
    float_bytes,
    image_grid,
    interleaved_latency,
    path_bytes,
    psnr,
    sample_images,
)


def half(sample, timestep):
    assert timestep.ndim == 0
    return 0.5 * sample


def test_sampling_is_ddim_over_the_given_schedule_and_leaves_it_alone():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = sample_images(half, scheduler, steps=6, noise=noise)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(6)
    x = noise
    for t in ddim.timesteps:
        x = ddim.step(0.5 * x, t, x, eta=0.0).prev_sample
    assert torch.equal(images, x)
    assert torch.equal(images, sample_images(half, scheduler, steps=6, noise=noise))
    assert scheduler.num_inference_steps is None


def test_noise_may_be_a_shape_and_a_seed_and_the_scheduler_a_configuration():
    one, two, three = (
        sample_images(half, dict(DDPMScheduler().config), steps=2, noise=(2, 1, 4, 4), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_steps_are_reported_and_impossible_ones_refused():
    done = []
    sample_images(half, DDPMScheduler(), steps=3, noise=(1, 1, 4, 4), on_step=lambda: done.append(1))
    assert len(done) == 3
    for steps in (0, 1001):
        with pytest.raises(ConfigError, match="use 1 to 1000"):
            ddim_scheduler(DDPMScheduler(), steps)


def test_psnr_is_that_of_numpy_on_0_to_255():
    a = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    bytes_a, bytes_b = (np.clip(x.numpy().astype(np.float64), -1, 1) * 127.5 + 127.5 for x in (a, b))
    expected = [10 * np.log10(255**2 / np.mean((p - q) ** 2)) for p, q in zip(bytes_a, bytes_b, strict=True)]
    assert torch.allclose(psnr(a, b), torch.tensor(expected))
    assert psnr(a, a).tolist() == [math.inf] * 3
    assert psnr(torch.full((1, 4), 3.0), torch.ones(1, 4)).item() == math.inf  # both are white


def test_a_grid_shows_the_panels_side_by_side_under_their_labels():
    black, white = torch.full((5, 1, 32, 32), -1.0), torch.full((5, 1, 32, 32), 7.0)
    grid = np.asarray(image_grid([("float", black), ("quantized", white)]))
    height, width, _ = grid.shape
    panel = 3 * 64  # five images in three columns, two pixels to one
    assert height - 2 * 64 == pytest.approx(24)
    assert (grid[-2 * 64 :, :panel] == 0).all()
    assert (grid[-2 * 64 : -64, width - panel :] == 255).all()
    assert (grid[-1, -1] == 0).all()  # the sixth place is empty
    assert (grid[:24] == 0).any()  # the labels


def test_a_grid_keeps_colours_and_places():
    images = torch.full((2, 3, 64, 64), -1.0)
    images[0, 0], images[1, 2] = 1, 1
    grid = np.asarray(image_grid([("colours", images)], columns=2))
    assert grid[30, 5].tolist() == [255, 0, 0]
    assert grid[30, 70].tolist() == [0, 0, 255]


def test_timing_takes_turns_after_a_warm_up():
    order = []
    seconds = interleaved_latency({name: lambda name=name: order.append(name) for name in "ABC"}, 4, warmup=2)
    assert order == [*"AABBCC", *"ABC" * 4]
    assert {name: len(times) for name, times in seconds.items()} == {"A": 4, "B": 4, "C": 4}
    assert all(time >= 0 for times in seconds.values() for time in times)
    with pytest.raises(ConfigError, match="rounds=0"):
        interleaved_latency({}, 0)


def test_latency_is_the_median_and_quartiles():
    assert Latency.of([1, 2, 3, 4, 100]) == Latency(median=3, low=2, high=4, rounds=5)
    assert Latency.of([2.0]) == Latency(2.0, 2.0, 2.0, 1)
    assert str(Latency.of([0.001, 0.002, 0.003])) == "2.0 ms (1.5–2.5)"


def test_sizes(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "folder" / "two").write_bytes(b"123")
    assert path_bytes(tmp_path) == 8
    assert path_bytes(tmp_path / "one") == 5
    assert float_bytes(torch.nn.Linear(3, 2)) == 4 * 8
