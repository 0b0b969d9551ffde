import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tests.passes.temporal.test_use_one_timestep_group import VALUES
from tfmq_fx.observers import GroupedMinMaxObserver, PerChannelWeightObserver
from tfmq_fx.passes import FactorItemScales, GroupTimesteps, IndexTimesteps, ObserveTimestepGroups
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
BY_ITEM = decomposed.quantize_per_channel.default
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
RANGES = {"shifted": ([-1.5, -9.0], [2.5, 3.0]), "one-sided": ([0.0, 0.0], [2.0, 5.0])}
CONVS = {
    "plain": ((6, 4, 3, 3), ()),
    "one pixel": ((6, 4, 1, 1), ()),
    "padded": ((6, 4, 3, 3), ([2, 2], [1, 1])),
    "dilated": ((6, 4, 3, 3), ([1], [2], [2, 2])),
    "grouped": ((6, 2, 3, 3), ([1, 1], [1, 1], [1, 1], 2)),
}


def convert(graph_module, ranges):
    """The graph with two timestep groups, the activations of its layers quantized by them, and their weights."""

    def make_observer(layer, entries):
        observer = GroupedMinMaxObserver(2, 8)
        observer.low, observer.high = (torch.tensor(ends) for ends in RANGES[ranges])
        observer.batches += 1
        return observer

    IndexTimesteps(VALUES)(graph_module)
    GroupTimesteps(2)(graph_module)
    ObserveTimestepGroups(make_observer)(graph_module)
    for layer in [*calls(graph_module, aten.conv2d.default), *calls(graph_module, aten.linear.default)]:
        name = f"observer_{layer.name}"
        graph_module.add_submodule(name, PerChannelWeightObserver(bits=8, symmetric=True, search=False))
        with graph_module.graph.inserting_before(layer):
            call = graph_module.graph.call_module(name, (layer.args[1],))
            call.meta["val"] = layer.args[1].meta["val"]
        layer.update_arg(1, call)
    for node in [n for n in graph_module.graph.nodes if n.op == "call_module"]:
        graph_module.get_submodule(node.target).convert(graph_module, node)
    graph_module.recompile()
    return graph_module


def inputs(builder):
    x = builder.placeholder("x", (builder.batch, 4, 6, 6))
    builder.placeholder("timestep", (builder.batch,), torch.int64)
    return x


def quantized_convs(kind="padded", ranges="shifted", readers=1, dynamic=True, upsampled=False):
    builder = GraphBuilder(batch=2, dynamic_batch=dynamic)
    x = inputs(builder)
    shape, geometry = CONVS[kind]
    if upsampled:
        x = builder.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    outputs = []
    for index in range(readers):
        weight, bias = builder.weight(f"conv{index}.weight", shape), builder.weight(f"conv{index}.bias", (6,))
        with builder.inside(f"conv{index}"):
            outputs.append(builder.call(aten.conv2d.default, x, weight, bias if index % 2 == 0 else None, *geometry))
    return convert(builder.build(tuple(outputs)), ranges)


def quantized_tokens(ranges, products=True):
    """A linear of 36 tokens an item, and the product of its result with itself turned around."""
    builder = GraphBuilder(batch=2, dynamic_batch=True)
    x = inputs(builder)
    rows = builder.call(aten.reshape.default, builder.call(aten.permute.default, x, [0, 2, 3, 1]), [-1, 4])
    tokens = builder.call(
        aten.linear.default, rows, builder.weight("fc.weight", (5, 4)), builder.weight("fc.bias", (5,))
    )
    folded = builder.call(aten.reshape.default, tokens, [-1, 36, 5])
    turned = builder.call(aten.transpose.int, folded, 1, 2)
    result = builder.call(aten.bmm.default, folded, turned) if products else folded
    return convert(builder.build(result), ranges)


def batch(size, scale=1.0, timesteps=(999, 3, 500, 7)):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 4, 6, 6, generator=generator) * scale
    return x, torch.tensor([timesteps[n % len(timesteps)] for n in range(size)])


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("ranges", RANGES)
def test_fires_and_keeps_numerics_of_mixed_timesteps(kind, ranges):
    # Values beyond the range are clamped; a border is zeros, whatever the zero points are.
    result = assert_pass_contract(
        FactorItemScales, quantized_convs(kind, ranges), batch(2), more_inputs=[batch(5, 9.0), batch(1)]
    )
    assert result.modified
    found = operators(result.graph_module)
    assert found[BY_ITEM] == 0 and found[aten.conv2d.default] == 1 and found[aten.constant_pad_nd.default] == 0
    (quantize,) = calls(result.graph_module, QUANTIZE)
    assert quantize.args[1:] == (1.0, 0, 0, 255, torch.uint8)
    # One table for all numbers, and no shift where there is none.
    assert found[aten.split_with_sizes.default] == 1
    assert found[aten.add.Tensor] == (3 if ranges == "shifted" else 1)


def test_a_fixed_batch():
    result = assert_pass_contract(FactorItemScales, quantized_convs(dynamic=False), batch(2))
    assert result.modified


@pytest.mark.parametrize("ranges", RANGES)
def test_linears_and_products(ranges):
    result = assert_pass_contract(FactorItemScales, quantized_tokens(ranges), batch(2), more_inputs=[batch(3)])
    found = operators(result.graph_module)
    assert found[BY_ITEM] == 0
    # A product takes integers where nothing shifts them; else the rounding of its two operands is written out.
    assert found[QUANTIZE] == (3 if ranges == "one-sided" else 1)
    assert found[aten.round.default] == (0 if ranges == "one-sided" else 2)


def test_scaling_goes_in_front_of_upsampling():
    result = assert_pass_contract(FactorItemScales, quantized_convs(upsampled=True), batch(2), more_inputs=[batch(3)])
    (upsample,) = calls(result.graph_module, aten.upsample_nearest2d.vec)
    (quantize,) = calls(result.graph_module, QUANTIZE)
    assert quantize.args[0] is upsample and upsample.args[0].target is aten.add.Tensor


def test_does_not_fire_without_items_or_twice():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    integers = builder.call(QUANTIZE, x, 0.1, 3, 0, 255, torch.uint8)
    restored = builder.call(DEQUANTIZE, integers, 0.1, 3, 0, 255, torch.uint8)
    assert unchanged(FactorItemScales(), builder.build(restored))
    graph_module = quantized_convs()
    FactorItemScales()(graph_module)
    assert unchanged(FactorItemScales(), graph_module)


def test_several_readers_share_the_scaled_value():
    graph_module = quantized_convs(readers=3)
    (restored,) = calls(graph_module, decomposed.dequantize_per_channel.default)[:1]
    found = [n for n in graph_module.graph.nodes if n.target is aten.conv2d.default]
    assert all(conv.args[0] is restored for conv in found)
    with graph_module.graph.inserting_before(graph_module.graph.output_node()):
        other = graph_module.graph.call_function(aten.relu.default, (restored,))
        other.meta["val"] = restored.meta["val"]
    graph_module.graph.output_node().args = ((*found, other),)
    graph_module.recompile()
    result = assert_pass_contract(FactorItemScales, graph_module, batch(2), more_inputs=[batch(5)])
    rewritten = operators(result.graph_module)
    assert rewritten[QUANTIZE] == rewritten[DEQUANTIZE] == 1 and rewritten[BY_ITEM] == 0
    # The one reader that is no layer has the values themselves.
    assert rewritten[aten.round.default] == 1
    assert [n.name for n in calls(result.graph_module, aten.conv2d.default)] == [conv.name for conv in found]
