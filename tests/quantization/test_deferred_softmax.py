"""The softmax of attention, divided by its sum behind the second product."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig
from tfmq_fx.passes.support.predicates import softmax_scores

aten = torch.ops.aten
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def prepared(**config):
    captured = tfmq_fx.capture(small_denoiser(), batch())
    graph = tfmq_fx.prepare(captured, QuantizationConfig(**config), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, [batch(seed=seed) for seed in range(3)], progress=False)
    return graph


def calls(program, target):
    return [node for node in program.graph_module.graph.nodes if node.target is target]


def numerators_of(program):
    """Those of softmaxes; the sinusoid of the time path has an exponential too."""
    return [node for node in calls(program, aten.exp.default) if softmax_scores(node) is not None]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_numerators_have_the_unit_range_and_their_sum_is_that_of_what_was_quantized(bits):
    program = tfmq_fx.convert(prepared(activation_bits=bits))
    (numerators,) = numerators_of(program)
    (quantize,) = numerators.users
    assert quantize.target is QUANTIZE
    assert quantize.args[1] == pytest.approx(1 / (2**bits - 1)) and quantize.args[2:5] == (0, 0, 2**bits - 1)
    assert {node.target for node in quantize.users} == {DEQUANTIZE}
    (total,) = calls(program, aten.sum.dim_IntList)
    assert total.args[0].target is DEQUANTIZE and total.args[0].args[0] is quantize


def test_a_width_of_the_softmax_is_that_of_its_numerators():
    program = tfmq_fx.convert(prepared(softmax_bits=16))
    (numerators,) = numerators_of(program)
    (quantize,) = numerators.users
    assert quantize.args[1] == pytest.approx(1 / 65535)


@pytest.mark.parametrize(
    "config", [{"defer_softmax": False}, {"keep_float": ("attention",)}, {"activation_bits": 32}], ids=str
)
def test_the_softmax_stays_where_it_is_not_asked_for_or_not_quantized(config):
    program = tfmq_fx.convert(prepared(**config))
    assert not numerators_of(program)


def test_a_uniform_attention_keeps_its_levels():
    """Over many keys a softmax has small values; its numerators are near 1."""
    x, t = batch(seed=7)
    model, narrow = small_denoiser(), {"activation_bits": 5, "shortcut_bits": None}
    with torch.no_grad():
        errors = [
            relative(tfmq_fx.convert(prepared(defer_softmax=deferred, **narrow)).graph_module(x, t), model(x, t))
            for deferred in (True, False)
        ]
    assert errors[0] < errors[1]


def test_every_backend_agrees_with_the_reference(tmp_path):
    program = tfmq_fx.convert(prepared())
    tfmq_fx.save(program, tmp_path / "program")
    again = tfmq_fx.load(tmp_path / "program")
    x, t = batch(seed=9)
    with torch.no_grad():
        wanted = program.graph_module(x, t)
        assert torch.equal(again.graph_module(x, t), wanted)
        assert relative(tfmq_fx.lower(again)(x, t), wanted) < 0.02
