"""Items that are kept back are in no calibration batch, and every timestep has one."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, small_denoiser
from tests.search.conftest import batches
from tfmq_fx import CalibrationError
from tfmq_fx.search.held_back import MOST_ITEMS, hold_back


def rows(samples):
    return {tuple(sample.flatten().tolist()) for sample in samples}


def test_one_item_of_each_timestep_is_taken_out(calibrated):
    data = batches()
    rest, probes = hold_back(calibrated.program, data, "timestep", TIMESTEPS)
    assert sorted(probe.timestep for probe in probes) == TIMESTEPS.tolist()
    held, left = rows(probe.call.leaves[0][0] for probe in probes), rows(x for batch in rest for x in batch["sample"])
    assert len(held) == len(TIMESTEPS) and not held & left
    assert held | left == rows(x for sample, _ in data for x in sample)
    assert all(float(probe.call.leaves[1][0]) == probe.timestep for probe in probes)


def test_batches_may_mix_timesteps(calibrated):
    samples, timesteps = (torch.cat(values) for values in zip(*batches(), strict=True))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(3))
    rest, probes = hold_back(calibrated.program, [(samples[order], timesteps[order])], "timestep", TIMESTEPS)
    assert sorted(probe.timestep for probe in probes) == TIMESTEPS.tolist()
    assert sum(len(batch["sample"]) for batch in rest) == len(samples) - len(TIMESTEPS)


def test_of_many_timesteps_some_are_taken_from_the_first_to_the_last(calibrated):
    timesteps = torch.arange(0, 1000, 10)
    _, probes = hold_back(calibrated.program, batches(2, timesteps), "timestep", timesteps)
    found = sorted(probe.timestep for probe in probes)
    assert len(found) == MOST_ITEMS and (found[0], found[-1]) == (0, 990)


def test_other_timesteps_are_left_to_calibration(calibrated):
    rest, probes = hold_back(calibrated.program, [*batches(), *batches(2, [55])], "timestep", TIMESTEPS)
    assert 55 not in {probe.timestep for probe in probes}
    assert any(batch["timestep"].tolist() == [55, 55] for batch in rest)


def test_a_model_without_a_timestep_gives_its_last_batch():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 4, 3)).eval()
    data = [(torch.randn(2, 2, 8, 8),) for _ in range(3)]
    rest, probes = hold_back(tfmq_fx.capture(model, data[0]), data, "timestep", None)
    assert len(rest) == 2 and len(probes) == 1 and probes[0].timestep is None
    assert torch.equal(probes[0].call.leaves[0], data[-1][0])


def test_too_few_items_are_refused():
    data = batches(1, [100])
    program = tfmq_fx.capture(small_denoiser(), batches(2, [100])[0])
    with pytest.raises(CalibrationError, match="several items of each timestep"):
        hold_back(program, data, "timestep", TIMESTEPS)
