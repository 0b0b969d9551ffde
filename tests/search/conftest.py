"""One small denoiser, calibrated, with everything that the search makes of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

import tfmq_fx
from tests.models import TIMESTEPS, small_denoiser
from tfmq_fx.quantization.probes import Probe
from tfmq_fx.search.held_back import hold_back
from tfmq_fx.search.layers import SearchLayer, find_layers
from tfmq_fx.search.operand_quantizers import OperandQuantizers
from tfmq_fx.search.widths import DEFAULT_CANDIDATES, check_candidates

CONFIG = tfmq_fx.QuantizationConfig(reconstruction="nearest")


def batches(items=4, timesteps=TIMESTEPS, seed=0):
    """One batch for each timestep."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(items, 1, 8, 8, generator=generator), torch.full((items,), int(t))) for t in timesteps]


@dataclass
class Calibrated:
    model: nn.Module
    program: fx.GraphModule
    rest: list
    probes: list[Probe]
    prepared: fx.GraphModule
    layers: list[SearchLayer]
    quantizers: OperandQuantizers

    def layer(self, name):
        return next(layer for layer in self.layers if layer.name == name)


@pytest.fixture(scope="session")
def calibrated():
    model, data = small_denoiser(), batches()
    program = tfmq_fx.capture(model, data[0])
    rest, probes = hold_back(program, data, "timestep", TIMESTEPS)
    prepared = tfmq_fx.prepare(program, CONFIG, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, rest, progress=False)
    layers = find_layers(prepared, CONFIG, "timestep", check_candidates(DEFAULT_CANDIDATES), products=True)
    return Calibrated(model, program, rest, probes, prepared, layers, OperandQuantizers(prepared, CONFIG))
