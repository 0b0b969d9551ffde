"""Widths by role: the first and the last layer, and attention's products, with widths of their own."""

import warnings

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import fqn, is_attention, is_matmul, is_weighted
from tfmq_fx.quantization.float_layers import FloatLayers

ENDS = {role: {"weight_bits": 8, "activation_bits": 8} for role in ("input", "output")}


def quantized(**config):
    model, data = small_denoiser(), batch(24)
    config = QuantizationConfig(**{"reconstruction": "nearest", "activation_groups": 1, **config})
    return tfmq_fx.quantize(model, config, [data], timesteps=TIMESTEPS, progress=False), model, data


def widths(program):
    """By name, how many levels a layer's weight and its input may have."""
    graph_module, found = program.graph_module, {}
    for layer in filter(is_weighted, graph_module.graph.nodes):
        weight = argument_node(layer, 1)
        assert weight is not None
        levels = None
        if weight.op != "get_attr":
            integers = read_attribute(graph_module, str(argument_node(weight, 0).target)).int().flatten(1)
            levels = int((integers.amax(1) - integers.amin(1)).max()) + 1
        source = argument_node(layer, 0)
        quantize = argument_node(source, 0) if "dequantize" in str(source.target) else None
        found[fqn(layer)] = (levels, None if quantize is None else quantize.args[4])
    return found


def test_the_first_and_last_layer_have_8_bits_where_the_others_have_4():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        program, model, data = quantized(weight_bits=4, activation_bits=6, keep_float=(), overrides=ENDS)
    found = widths(program)
    assert all(16 < found[name][0] <= 256 and found[name][1] == 255 for name in ("enter", "leave"))
    inner = [name for name in found if name not in ("enter", "leave") and not name.startswith("time")]
    assert all(found[name][0] <= 16 for name in inner) and found["qkv"][1] == 63
    assert not program.kept_float
    narrow, _, _ = quantized(weight_bits=4, activation_bits=6, keep_float=())
    with torch.no_grad():
        exact = model(*data)
        assert relative(program.graph_module(*data), exact) < relative(narrow.graph_module(*data), exact)


def test_the_widths_are_in_the_artefact(tmp_path):
    program, _, data = quantized(weight_bits=4, keep_float=(), overrides=ENDS)
    again = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "artefact"))
    assert again.config == program.config and again.config.overrides == ENDS
    with torch.no_grad():
        assert torch.equal(again.graph_module(*data), program.graph_module(*data))


def test_the_first_match_holds_whether_role_or_pattern():
    for overrides, bits in (
        ({"enter": {"weight_bits": 3}, "input": {"weight_bits": 8}}, 3),
        ({"input": {"weight_bits": 8}, "enter": {"weight_bits": 3}}, 8),
    ):
        config = QuantizationConfig(weight_bits=4, overrides=overrides)
        assert config.for_layer("enter", frozenset({"input"})).weight_bits == bits
        assert config.for_layer("enter").weight_bits == 3
        assert config.for_layer("input").weight_bits == 4, "a role is no pattern"


def kinds(graph):
    nodes = graph.graph.nodes
    return any(map(is_attention, nodes)), [n for n in nodes if is_matmul(n)]


def prepared(**config):
    graph = tfmq_fx.capture(small_denoiser(), batch())
    return tfmq_fx.prepare(graph, QuantizationConfig(**config), timesteps=TIMESTEPS)


def test_attention_has_a_width_of_its_own():
    graph = prepared(overrides={"attention": {"activation_bits": 32}})
    assert kinds(graph) == (True, []), "float attention stays one operator"
    assert "activation_bits=32" in PreparedState.of(graph).kept_float.values()
    fused, products = kinds(prepared(activation_bits=32, overrides={"attention": {"activation_bits": 8}}))
    assert not fused and len(products) == 2
    assert all(source.op == "call_module" for product in products for source in product.args[:2])
    # A pattern before the role may name some products.
    first = {"mid.*": {"activation_bits": 8}, "attention": {"activation_bits": 32}}
    assert QuantizationConfig(overrides=first).quantizes_attention
    assert not QuantizationConfig(overrides=dict(reversed(first.items()))).quantizes_attention


def test_the_temporal_block_has_neither_first_nor_last_layer():
    class Time(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return sample + self.two(torch.relu(self.one(timestep[:, None].float() / torch.arange(1.0, 5.0))))

    graph = tfmq_fx.capture(Time().eval(), (torch.randn(3, 4), torch.tensor([1, 2, 3])))
    config = QuantizationConfig(weight_bits=4, overrides=ENDS, keep_float=())
    layers = FloatLayers.of(graph, config, tfmq_fx.passes.analysis.find_temporal_block(graph))
    linears = [node for node in graph.graph.nodes if is_weighted(node)]
    assert [layers.config_of(linear).weight_bits for linear in linears] == [4, 4]


def test_a_role_that_stays_float_is_named():
    with pytest.warns(UserWarning, match="overrides has 'input', which keep_float leaves float: take it out"):
        graph = prepared(overrides={"input": {"weight_bits": 8}})
    assert PreparedState.of(graph).kept_float["enter"] == "keep_float has 'input'"
