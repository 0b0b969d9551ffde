"""Calibrated graphs that the tests of reconstruction share."""

import copy
import functools

import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import insert_fake_quantizers
from tfmq_fx.reconstruction.progress import ReconstructionProgress

#: Rows enough for mini-batches, and some to hold back.
BATCHES = [batch(24, seed=1), batch(24, seed=2)]


class ScalarDenoiser(nn.Module):
    """One timestep, 0-dim, for the whole batch."""

    def __init__(self):
        super().__init__()
        self.inner = small_denoiser()

    def forward(self, sample, timestep):
        return self.inner(sample, timestep.reshape(-1) * torch.ones(sample.shape[0], dtype=torch.int64))


#: One batch per timestep, of different sizes.
SCALAR_BATCHES = [
    (torch.randn(3 + i % 3, 1, 8, 8, generator=torch.Generator().manual_seed(i)), t) for i, t in enumerate(TIMESTEPS)
]


@functools.cache
def _calibrated(scalar, timesteps, model_seed, config):
    model, batches = (ScalarDenoiser(), SCALAR_BATCHES) if scalar else (small_denoiser(model_seed), BATCHES)
    prepared = tfmq_fx.prepare(
        tfmq_fx.capture(model, batches[0]),
        tfmq_fx.QuantizationConfig(**dict(config)),
        timesteps=TIMESTEPS if timesteps else None,
    )
    tfmq_fx.calibrate(prepared, batches, progress=False)
    return prepared


@functools.cache
def _inserted(*case):
    prepared = copy.deepcopy(_calibrated(*case))
    insert_fake_quantizers(prepared)
    return prepared


def calibrated(*, scalar=False, timesteps=True, model_seed=0, observers=False, **config):
    """A calibrated graph of the small denoiser, W4A8 unless ``config`` says otherwise; each call makes a new one.

    Its fake quantizers are in their places already, which saves time, unless ``observers`` are wanted.
    """
    make = _calibrated if observers else _inserted
    return copy.deepcopy(make(scalar, timesteps, model_seed, tuple(sorted({"weight_bits": 4, **config}.items()))))


def state(graph):
    """All parameters and buffers, by name."""
    return {name: value.clone() for name, value in graph.state_dict().items()}


def same(one, other):
    """Whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


#: The temporal block learns as the others do: what it is rounded by otherwise has tests of its own.
SHORT = {"iterations": 8, "temporal_iterations": 8, "batch_size": 16, "temporal_objective": "features"}
#: Runs that differ in what they train and draw.
KINDS = [{}, {"temporal": "blocks"}, {"learned_steps": True, "drop_activations": 0.5, "quantized_inputs": 0.5}]


def rec(graph, batches=BATCHES, *, directory=None, cache_bytes=2**30, **options):
    config = ReconstructionConfig(**{**SHORT, **options})
    return tfmq_fx.reconstruct(graph, batches, config, directory=directory, cache_bytes=cache_bytes, progress=False)


@functools.cache
def reconstructed(**options):
    """What an uninterrupted run ends with."""
    graph = calibrated()
    rec(graph, **options)
    return state(graph)


def sentence(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of training."""
    done = []

    def advance(self, iteration, loss):
        done.append(iteration)
        if len(done) > steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(ReconstructionProgress, "advance", advance)
