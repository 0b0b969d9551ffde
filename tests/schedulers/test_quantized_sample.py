"""PTQ4DM's rounding of the sampler's state."""

import copy

import diffusers
import pytest
import torch

from tests.schedulers.test_noise_correction import STEPS, clean, recorded, sampled, schedule, statistics
from tfmq_fx import CalibrationError, ConfigError, TimestepError
from tfmq_fx.schedulers import (
    PTQDScheduler,
    QuantizedSampleScheduler,
    SampleRanges,
    collect_sample_ranges,
)

MAKES = [diffusers.DDPMScheduler, diffusers.DDIMScheduler]


def ranges(scheduler, scale=1 / 16, bits=8):
    times = schedule(scheduler).timesteps.double()
    count = len(times)
    zero = torch.full((count,), 2 ** (bits - 1))
    return SampleRanges(type(scheduler).__name__, STEPS, bits, times, torch.full((count,), scale).double(), zero)


@pytest.mark.parametrize("make", MAKES)
def test_every_state_but_the_image_is_on_the_grid(make):
    inner = schedule(make())
    wrapper = QuantizedSampleScheduler(copy.deepcopy(inner), ranges(inner))
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(inner.timesteps):
        plain, rounded = (
            s.step(clean(x, timestep), timestep, x, generator=torch.Generator().manual_seed(index)).prev_sample
            for s in (inner, wrapper)
        )
        if index == STEPS - 1:
            assert torch.equal(plain, rounded)
        else:
            assert torch.equal(rounded, (plain * 16).round().clamp(-128, 127) / 16)
        x = plain


def test_ranges_are_searched_per_timestep(tmp_path):
    scheduler = diffusers.DDIMScheduler()
    batches = recorded(scheduler)
    for index, recorded_batch in enumerate(batches):
        recorded_batch["sample"] = batches[0]["sample"] * (1 + index)
    found = collect_sample_ranges(scheduler, batches, steps=STEPS)
    assert found.timesteps.tolist() == [800, 600, 400, 200, 0] and found.zero_point.tolist() == [128] * STEPS
    growth = found.scale / found.scale[0]
    assert torch.allclose(growth, torch.arange(1, STEPS + 1).double(), rtol=0.02)
    widest = max(float(b["sample"].abs().max()) for b in batches)
    assert 0.5 * widest < float(found.scale[-1]) * 127 <= widest * 1.001
    again = SampleRanges.load(found.save(tmp_path / "ranges.json"))
    assert torch.equal(again.scale, found.scale) and again.zero_point.dtype == torch.int64 and again.steps == STEPS


def test_a_timestep_that_was_not_drawn_takes_its_neighbours_range():
    scheduler = diffusers.DDIMScheduler()
    batches = recorded(scheduler)
    found = collect_sample_ranges(scheduler, [batches[0], batches[4]], steps=STEPS)
    assert found.scale.tolist() == [*[float(found.scale[0])] * 3, *[float(found.scale[4])] * 2]
    with pytest.raises(CalibrationError, match="no batch is of a timestep of this schedule"):
        collect_sample_ranges(
            scheduler, [{"sample": torch.randn(1, 1, 2, 2), "timestep": torch.tensor([7])}], steps=STEPS
        )
    with pytest.raises(ConfigError, match="bits=9"):
        collect_sample_ranges(scheduler, batches, steps=STEPS, bits=9)


@pytest.mark.parametrize("make", MAKES)
def test_it_goes_around_the_noise_correction(make):
    scheduler = make()
    found = statistics(scheduler, slope=0.25, bias=(0.5, -0.3), variance=0.01, eta=1.0)
    inner = PTQDScheduler(schedule(scheduler), found)
    wrapper = QuantizedSampleScheduler(copy.deepcopy(inner), ranges(scheduler))
    assert wrapper.innermost() is wrapper.scheduler.scheduler
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, rounded = (
        s.step(x, s.timesteps[0], x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (inner, wrapper)
    )
    assert torch.equal(rounded, (plain * 16).round().clamp(-128, 127) / 16)
    assert torch.isfinite(sampled(wrapper, x)).all()
    with pytest.raises(ConfigError, match="not around a QuantizedSampleScheduler"):
        PTQDScheduler(QuantizedSampleScheduler(schedule(scheduler), ranges(scheduler)), found)


def test_a_finer_grid_is_closer():
    scheduler = diffusers.DDIMScheduler()
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = sampled(schedule(scheduler), x)
    errors = []
    for bits in (4, 8):
        found = collect_sample_ranges(scheduler, recorded(scheduler), steps=STEPS, bits=bits)
        wrapper = QuantizedSampleScheduler(schedule(scheduler), found)
        errors.append(float((sampled(wrapper, x) - exact).norm() / exact.norm()))
    assert 0 < errors[1] < errors[0] / 4


def test_what_it_cannot_do_is_refused():
    scheduler = diffusers.DDIMScheduler()
    found = ranges(scheduler)
    with pytest.raises(ConfigError, match="state of a PNDMScheduler is not quantized: use one of DDPMScheduler, DDIM"):
        QuantizedSampleScheduler(diffusers.PNDMScheduler(), found)
    with pytest.raises(ConfigError, match="are of DDIMScheduler, not of DDPMScheduler"):
        QuantizedSampleScheduler(diffusers.DDPMScheduler(), found)
    wrapper = QuantizedSampleScheduler(schedule(scheduler), found)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(TimestepError, match="timestep 7 is not in the schedule"):
        wrapper.step(x, 7, x)
    with pytest.raises(TimestepError, match="timestep 900 is not in the sample ranges"):
        wrapper.set_timesteps(10)
