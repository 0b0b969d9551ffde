"""Preparation, step by step: exact rewrites, observers by timestep, annotations."""

import copy
import warnings

import pytest
import torch
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig, TFMQQuantizer
from tfmq_fx._torch.pt2e import Q_ANNOTATION_KEY
from tfmq_fx.observers import GroupedObserver, TimestepObserver
from tfmq_fx.quantization.quantizer_options import QuantizerOptions
from tfmq_fx.quantization.rewrites import layout_rewrites, rewrite_for_annotation
from tfmq_fx.quantization.timestep_observers import insert_timestep_observers


def options(**config):
    return QuantizerOptions(QuantizationConfig(**config), TIMESTEPS.double(), "timestep", ())


def exported():
    return torch.export.export(small_denoiser(), batch()).module(check_guards=False)


def observers(graph_module):
    return [module for module in graph_module.modules() if isinstance(module, ObserverBase)]


@torch.no_grad()
def test_the_rewrites_are_exact_and_neither_observe_nor_annotate():
    graph, (x, t) = exported(), batch()
    rewrite_for_annotation(graph, options())
    assert relative(graph(x, t), small_denoiser()(x, t)) < 1e-6
    assert not observers(graph) and not any(Q_ANNOTATION_KEY in node.meta for node in graph.graph.nodes)
    assert torch.ops.aten.matmul.default in {node.target for node in graph.graph.nodes}
    text = graph.code
    rewrite_for_annotation(graph, options())
    assert graph.code == text, "a graph in this form is left as it is"


def test_the_configuration_decides_which_rewrites_there_are():
    def ids(**config):
        return list(layout_rewrites(options(**config)).ids)

    every = ids()
    assert ids(split_concatenations=False) == [name for name in every if "concatenated" not in name] != every
    without_attention = [name for name in every if "attention" not in name and "softmax" not in name]
    assert ids(defer_softmax=False) == [name for name in every if "softmax" not in name] != every
    assert ids(activation_bits=32) == ids(keep_float=("attention",)) == without_attention != every


@torch.no_grad()
@pytest.mark.parametrize(("config", "kinds"), [
    ({}, {TimestepObserver: 3, GroupedObserver: 10}),
    ({"activation_groups": 1}, {TimestepObserver: 3}),
    ({"temporal": "shared"}, {}),
    ({"temporal": "float", "activation_groups": 3}, {GroupedObserver: 10}),
    ({"temporal": "float", "activation_groups": 3, "defer_softmax": False}, {GroupedObserver: 11}),
])  # fmt: skip
def test_observers_by_timestep_change_nothing_and_are_no_annotations(config, kinds):
    inputs = batch()
    graph = tfmq_fx.capture(small_denoiser(), inputs)
    rewrite_for_annotation(graph, options(**config))
    before = graph(*inputs)
    insert_timestep_observers(graph, options(**config))
    found = observers(graph)
    assert {kind: sum(isinstance(module, kind) for module in found) for kind in kinds} == kinds
    assert len(found) == sum(kinds.values())
    assert torch.equal(graph(*inputs), before)
    assert not any(Q_ANNOTATION_KEY in node.meta for node in graph.graph.nodes)


@torch.no_grad()
def test_torchaos_workflow_serves_timesteps_that_no_batch_visited():
    """It never calls ``tfmq_fx.calibrate``; the temporal block's ranges come from the schedule all the same."""
    model, (x, t) = small_denoiser(), batch()
    prepared = prepare_pt2e(exported(), TFMQQuantizer(timesteps=TIMESTEPS))
    seen = TIMESTEPS[:1].expand(len(x))
    prepared(x, seen)
    program = tfmq_fx.program_from_graph(convert_pt2e(copy.deepcopy(prepared)))
    for other in TIMESTEPS[1:]:
        assert relative(program(x, other.expand(len(x))), model(x, other.expand(len(x)))) < 0.05
    # Calibrated, the ranges are those under quantized weights: close to the first ones, not the same.
    temporal = [module for module in prepared.modules() if isinstance(module, TimestepObserver)]
    first = [module.high.clone() for module in temporal]
    tfmq_fx.calibrate(prepared, [(x, t)], progress=False)
    for module, high in zip(temporal, first, strict=True):
        assert relative(module.high, high) < 0.05
    assert any(not torch.equal(module.high, high) for module, high in zip(temporal, first, strict=True))


def test_a_pattern_for_attention_that_stays_fused_matches():
    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_denoiser()

        def forward(self, sample, timestep):
            return self.inner(sample, timestep)

    captured = tfmq_fx.capture(Attending(), batch())
    config = QuantizationConfig(activation_bits=32, keep_float=("inner",))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    names = {node.target for node in prepared.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default in names
    with pytest.warns(UserWarning, match="overrides has 'outer'"):
        tfmq_fx.prepare(captured, QuantizationConfig(overrides={"outer": {"weight_bits": 4}}), timesteps=TIMESTEPS)
