"""What the tests of diagnostics share."""

import copy
import functools

import torch
from diffusers import DDPMScheduler
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import QuantizationConfig, QuantizedProgram
from tfmq_fx.diagnostics import TemporalFeatures
from tfmq_fx.frontend.interface import interface_of

LAYERS = ("down.embed", "up.embed")
WEIGHTED = 12


class Doubled(nn.Module):
    """One layer that runs twice, and a sum of both results that is no split convolution's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample):
        once = self.layer(sample)
        return self.layer(once) * once


@functools.cache
def captured():
    return tfmq_fx.capture(small_denoiser(), batch())


@functools.cache
def program(**changes):
    config = QuantizationConfig(**changes)
    found = tfmq_fx.quantize(small_denoiser(), config, [batch(16)], timesteps=TIMESTEPS, progress=False)
    found.scheduler = dict(DDPMScheduler().config)
    return found


def float_program():
    """The float graph, dressed as a program."""
    graph_module = copy.deepcopy(captured())
    return QuantizedProgram(
        graph_module=graph_module,
        interface=interface_of(graph_module),
        config=QuantizationConfig(temporal="float"),
        timesteps=TIMESTEPS.double(),
        scheduler=dict(DDPMScheduler().config),
    )


def features(*values, timesteps=None, layers=None):
    steps = torch.arange(len(values[0])) * 10 if timesteps is None else timesteps
    return TemporalFeatures(layers or tuple(f"g{i}" for i in range(len(values))), steps.double(), values)
