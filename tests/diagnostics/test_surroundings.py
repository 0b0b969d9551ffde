"""What a caller has switched on around a measurement, or around sampling calibration data, changes no number."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import tfmq_fx
from tests.diagnostics_cases import captured, program
from tests.frontend.test_surroundings import SURROUNDINGS
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import diagnostics, schedulers

NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
ADDED = torch.tensor([51, 51])
BATCH, MODEL, SCHEDULER = batch(), small_denoiser(), DDIMScheduler()
RECORDED = tfmq_fx.sample_trajectories(MODEL, SCHEDULER, steps=3, samples=4, shape=(1, 8, 8), progress=False)


def features():
    return diagnostics.temporal_features(captured(), TIMESTEPS), diagnostics.temporal_features(program())


MEASUREMENTS = {
    "sample_trajectories": lambda: tfmq_fx.sample_trajectories(
        MODEL, SCHEDULER, steps=3, samples=4, shape=(1, 8, 8), progress=False
    ),
    "add_timesteps": lambda: tfmq_fx.add_timesteps(program(), [51])(NOISE, ADDED),
    "temporal_features": features,
    "temporal_feature_error": lambda: diagnostics.temporal_feature_error(*features()),
    "temporal_mismatch": lambda: diagnostics.temporal_mismatch(captured(), program()),
    "layer_errors": lambda: diagnostics.layer_errors(captured(), program(), [BATCH]),
    "diagnose": lambda: diagnostics.diagnose(captured(), program(), scheduler=SCHEDULER, steps=10, noise=NOISE),
    "with_temporal_features": lambda: diagnostics.with_temporal_features(captured(), features()[1])(
        NOISE, TIMESTEPS[:2]
    ),
    "compare_trajectories": lambda: diagnostics.compare_trajectories(
        diagnostics.graph_denoiser(captured()), program(), SCHEDULER, steps=3, noise=NOISE
    ),
    "collect_noise_statistics": lambda: schedulers.collect_noise_statistics(
        MODEL, program(), SCHEDULER, RECORDED, steps=3
    ),
    "collect_sample_ranges": lambda: schedulers.collect_sample_ranges(SCHEDULER, RECORDED, steps=3),
}


def tensors(value) -> list[Tensor]:
    """The tensors and numbers in what was measured."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, float):
        return [torch.tensor(value, dtype=torch.float64)]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in tensors(item)]


@pytest.mark.parametrize("name", ["float64", "autocast", "inference mode", "another device"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_a_measurement_is_the_same(measurement, name):
    wanted = tensors(MEASUREMENTS[measurement]())
    with SURROUNDINGS[name]():
        measured = MEASUREMENTS[measurement]()
    found = tensors(measured)
    assert wanted and len(found) == len(wanted)
    for value, other in zip(found, wanted, strict=True):
        assert value.dtype is other.dtype and torch.allclose(value, other, equal_nan=True)
