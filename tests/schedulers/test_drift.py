"""The correction of drift: a known error is undone, what it is worth is said, and what it does not fit is refused."""

import copy
import dataclasses
import inspect
import warnings

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import ClassDenoiser
from tfmq_fx import ConfigError, TimestepError
from tfmq_fx.schedulers import DriftCorrectedScheduler, DriftCorrection, collect_drift_correction
from tfmq_fx.schedulers.drift import corrected, sampling_config

STEPS = 5
SLOPE, SHARE, BIAS = 0.15, 0.1, (0.3, -0.2)
FIT = {"steps": STEPS, "samples": 12, "batch_size": 4, "shape": (2, 6, 6), "progress": False}


class Clean(nn.Module):
    """What it predicts is correlated between channels, and not centred."""

    def forward(self, sample, timestep):
        return 0.5 * sample + 0.1 * sample.flip(1) + 0.2


def spoilt(sample, timestep):
    """An error that follows the output and the state, with a bias in each channel."""
    bias = torch.tensor(BIAS).to(sample).reshape(1, 2, 1, 1)
    return (1 + SLOPE) * Clean()(sample, timestep) + SHARE * sample + bias


def fitted(scheduler, denoiser=spoilt, **options):
    return collect_drift_correction(Clean(), denoiser, scheduler, **{**FIT, **options})


def sampled(scheduler, denoise, noise, **call):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    takes = set(inspect.signature(scheduler.step).parameters)
    options = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(denoise(seen, timestep), timestep, x, **options, **call).prev_sample
    return x


def new_noise():
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(99))


#: By how much the distance to the float images falls at least. Solvers with a history have a wrong one.
SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler(clip_sample=False), {}, 1e-3),
    "DDIM, eta 1": (diffusers.DDIMScheduler(clip_sample=False), {"eta": 1.0}, 1e-3),
    "DDPM": (diffusers.DDPMScheduler(clip_sample=False), {}, 1e-3),
    "Euler": (diffusers.EulerDiscreteScheduler(), {}, 1e-3),
    "Euler, ancestral": (diffusers.EulerAncestralDiscreteScheduler(), {}, 1e-3),
    "EDM": (diffusers.EDMEulerScheduler(), {}, 1e-3),
    "Heun": (diffusers.HeunDiscreteScheduler(), {}, 0.2),
    "PNDM": (diffusers.PNDMScheduler(), {}, 0.2),
    "DPM-Solver++": (diffusers.DPMSolverMultistepScheduler(), {}, 0.2),
    "UniPC": (diffusers.UniPCMultistepScheduler(), {}, 0.2),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_known_error_is_undone_on_other_noise(case):
    scheduler, call, share = SCHEDULERS[case]
    correction = fitted(scheduler, **call)
    wrapper, noise = DriftCorrectedScheduler(copy.deepcopy(scheduler), correction), new_noise()
    right = sampled(scheduler, Clean(), noise, **call)
    without, ours = sampled(scheduler, spoilt, noise, **call), sampled(wrapper, spoilt, noise, **call)
    assert float((ours - right).norm()) <= share * float((without - right).norm())
    assert correction.gain > 10


def test_the_gain_is_that_of_trajectories_that_were_held_back():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def curved(sample, timestep):
        return Clean()(sample, timestep) + 0.3 * (3 * sample).sin()

    correction = fitted(scheduler, curved)
    noise = torch.randn((12, 2, 6, 6), generator=torch.Generator().manual_seed(0))[9:]
    wrapper = DriftCorrectedScheduler(copy.deepcopy(scheduler), correction)
    right = sampled(scheduler, Clean(), noise)
    before, after = (
        (sampled(each, curved, noise) - right).double().square().flatten(1).sum(1) for each in (scheduler, wrapper)
    )
    assert correction.gain == pytest.approx(float((10 * torch.log10(before / after)).mean()), abs=1e-3)
    assert 0 < correction.gain < 30


def test_without_an_error_nothing_changes_to_the_bit_and_a_warning_says_so():
    scheduler = diffusers.DDIMScheduler()
    with pytest.warns(UserWarning, match=r"worth \+0.00 dB on 3 held-back trajectories: sample without it") as found:
        correction = fitted(scheduler, Clean())
    assert correction.gain == 0 and not correction.coefficients.any()
    assert found[0].filename == __file__
    noise = new_noise()
    wrapper = DriftCorrectedScheduler(copy.deepcopy(scheduler), correction)
    assert torch.equal(sampled(wrapper, spoilt, noise), sampled(scheduler, spoilt, noise))


def test_json_round_trip(tmp_path):
    found = fitted(diffusers.DDIMScheduler(), eta=0.5)
    again = DriftCorrection.load(found.save(tmp_path / "drift.json"))
    assert torch.equal(again.coefficients, found.coefficients) and again.coefficients.shape == (STEPS, 2, 3)
    assert torch.equal(again.timesteps, found.timesteps)
    assert (again.scheduler, again.config, again.eta, again.gain) == ("DDIMScheduler", found.config, 0.5, found.gain)
    DriftCorrectedScheduler(diffusers.DDIMScheduler(), again)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json does not hold a drift correction: it has no 'scheduler'"):
        DriftCorrection.load(tmp_path / "bad.json")


def test_a_timestep_that_is_visited_twice_has_two_rows():
    scheduler = diffusers.HeunDiscreteScheduler()
    correction = fitted(scheduler)
    assert len(correction.timesteps) == 2 * STEPS - 1 > len(correction.timesteps.unique())
    rows = torch.arange(len(correction.timesteps), dtype=torch.float64)[:, None, None]
    counted = dataclasses.replace(correction, coefficients=rows.expand(-1, 2, 3))
    wrapper = DriftCorrectedScheduler(scheduler, counted)
    for _ in range(2):  # a second walk starts at the first row again
        wrapper.set_timesteps(STEPS)
        rows = [wrapper._row(t) for t in wrapper.timesteps[:1]]
        for timestep in wrapper.timesteps:
            wrapper.step(torch.zeros(1, 2, 4, 4), timestep, torch.zeros(1, 2, 4, 4))
            rows.append(wrapper._last_row)
        assert rows == [0, *range(2 * STEPS - 1)]


def test_quantized_models_with_labels_and_a_real_sampler():
    torch.manual_seed(0)
    model, scheduler = ClassDenoiser().eval(), diffusers.EDMEulerScheduler()
    labels = torch.arange(8) % 4
    batches = tfmq_fx.sample_trajectories(
        model, scheduler, steps=STEPS, samples=8, shape=(1, 8, 8), extra={"class_labels": labels}, progress=False
    )
    made = copy.deepcopy(scheduler)
    made.set_timesteps(STEPS)
    config = tfmq_fx.QuantizationConfig(weight_bits=4, reconstruction="nearest")
    program = tfmq_fx.quantize(model, config, batches, timesteps=made.timesteps, progress=False)
    denoiser = tfmq_fx.lower(program, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it is worth on a model without training is not the point
        correction = collect_drift_correction(
            model, denoiser, scheduler, steps=STEPS, samples=8, shape=(1, 8, 8), extra={"class_labels": labels},
            progress=False, seed=5,
        )  # fmt: skip
    assert correction.coefficients.shape == (STEPS, 1, 3) and bool(correction.coefficients.isfinite().all())
    wrapper = DriftCorrectedScheduler(scheduler, correction)
    noise = torch.randn(8, 1, 8, 8)
    assert bool(sampled(wrapper, lambda x, t: denoiser(x, t, labels), noise).isfinite().all())


def test_it_stands_in_a_pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": STEPS, "output_type": "np"}
    before = pipe(generator=torch.Generator().manual_seed(0), **run).images
    times = torch.tensor([800.0, 600.0, 400.0, 200.0, 0.0], dtype=torch.float64)
    coefficients = torch.zeros(STEPS, 1, 3, dtype=torch.float64)
    coefficients[-1, 0, 2] = 0.2  # a bias of the last state
    config = sampling_config(pipe.scheduler)
    pipe.scheduler = DriftCorrectedScheduler(
        pipe.scheduler, DriftCorrection("DDIMScheduler", config, 0.0, times, coefficients, 0.0)
    )
    after = pipe(generator=torch.Generator().manual_seed(0), **run).images
    # Pipelines map [-1, 1] to [0, 1].
    assert after == pytest.approx((before + 0.1).clip(0, 1), abs=1e-6)


def test_a_learned_variance_is_passed_on_and_half_precision_stays():
    x = torch.randn(2, 2, 3, 3, dtype=torch.float16)
    output = torch.cat([torch.ones_like(x), torch.full_like(x, float("nan"))], 1)
    result = corrected(torch.tensor([[0.0, 0.5, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64), x, output, x)
    assert result.dtype == torch.float16
    assert torch.allclose(result[:, 0].float(), x[:, 0].float() + 0.75, atol=2e-3)
    assert torch.allclose(result[:, 1].float(), 2 * x[:, 1].float(), atol=2e-3)


def test_what_the_correction_is_not_of_is_refused():
    scheduler = diffusers.DDIMScheduler()
    correction = fitted(scheduler)
    wrapper = DriftCorrectedScheduler(copy.deepcopy(scheduler), correction)
    with pytest.raises(TimestepError, match="the drift correction is of 5 steps and the schedule has 10"):
        wrapper.set_timesteps(10)
    wrapper.set_timesteps(STEPS)
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(TimestepError, match="timestep 7 is not in the drift correction"):
        wrapper.step(x, 7, x)
    with pytest.raises(ConfigError, match="eta=1, but the drift correction is for eta=0"):
        wrapper.step(x, 800, x, eta=1.0)
    with pytest.raises(ConfigError, match=r"state has shape \[1, 3, 4, 4\], but the drift correction is of 2 channels"):
        wrapper.step(x[:, :1].expand(1, 3, 4, 4), 800, x[:, :1].expand(1, 3, 4, 4))
    with pytest.raises(ConfigError, match=r"of DDIMScheduler, not of DDPMScheduler"):
        DriftCorrectedScheduler(diffusers.DDPMScheduler(), correction)
    with pytest.raises(ConfigError, match="not around a DriftCorrectedScheduler"):
        DriftCorrectedScheduler(wrapper, correction)


@pytest.mark.parametrize(
    ("field", "value"),
    [("timestep_spacing", "trailing"), ("beta_end", 0.03), ("clip_sample", False), ("prediction_type", "v_prediction")],
)
def test_a_scheduler_with_another_configuration_is_refused(field, value):
    correction = fitted(diffusers.DDIMScheduler())
    with pytest.raises(ConfigError, match=f"of DDIMScheduler with {field}=.*, not {value!r}: collect it for"):
        DriftCorrectedScheduler(diffusers.DDIMScheduler(**{field: value}), correction)


@pytest.mark.parametrize(
    ("scheduler", "options", "words"),
    [
        (diffusers.DDIMScheduler(), {"samples": 1}, "samples=1 must be a whole number of at least 2"),
        (diffusers.DDIMScheduler(), {"steps": 0}, "steps=0 must be a whole number of at least 1"),
        (diffusers.DDIMScheduler(), {"steps": 5000}, "cannot make 5000 steps"),
        (diffusers.EulerDiscreteScheduler(), {"eta": 0.5}, "an option of DDIMScheduler, and this is a EulerDiscrete"),
        (diffusers.DDIMScheduler(), {"eta": -1.0}, "eta=-1.0 must be a number from 0 on"),
        (diffusers.DDIMScheduler(), {"eta": float("nan")}, "eta=nan must be a number from 0 on"),
        (object(), {}, "is no scheduler"),
    ],
)
def test_what_cannot_be_fitted_is_refused(scheduler, options, words):
    with pytest.raises(ConfigError, match=words):
        fitted(scheduler, **options)
