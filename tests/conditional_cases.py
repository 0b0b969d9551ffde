"""A small denoiser with a prompt that meets its timestep, at the stages that tests of its conditional part need."""

import functools

import torch

import tfmq_fx
from tests.lowering.test_stages import inputs
from tests.models import TIMESTEPS, PromptDenoiser
from tfmq_fx import QuantizationConfig
from tfmq_fx.observers import ConditionalObserver
from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.temporal.domain import conditioned_domain
from tfmq_fx.temporal.inputs import collect_conditionings

BATCHES = [inputs((0, 1, 2, 1, 0), TIMESTEPS[n : n + 5].tolist(), seed=n) for n in range(6)]
CONDITIONS = ("pooled",)


@functools.cache
def captured(model=PromptDenoiser, **options):
    torch.manual_seed(0)
    return tfmq_fx.capture(model().eval(), BATCHES[0], **options)


def config_of(**config):
    return QuantizationConfig(**{"weight_bits": 4, "activation_groups": 1, **config})


def prepared(batches=BATCHES, **config):
    graph = tfmq_fx.prepare(captured(), config_of(**config), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, batches, progress=False)
    return graph


def all_pairs():
    conditionings = collect_conditionings(captured(), CONDITIONS, BATCHES)
    assert len(conditionings.values) == 3
    return conditioned_domain("timestep", TIMESTEPS.double(), conditionings)


def conditional_outputs(graph, pairs=None):
    """What the embedding layers give for every timestep and prompt, side by side."""
    path = find_temporal_block(graph, finite=CONDITIONS)
    columns = (pairs or all_pairs()).columns()
    outputs = [layer.linear for layer in path.embedding_layers]
    assert len(outputs) == 2
    with torch.no_grad():
        return torch.cat(evaluate_temporal_nodes(graph, path.nodes, outputs, columns), 1)


def observers(graph):
    return [module for module in graph.modules() if isinstance(module, ConditionalObserver)]
