import copy

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.observers import GroupedMinMaxObserver, PerChannelWeightObserver
from tfmq_fx.passes import GroupTimesteps, IndexTimesteps, ObserveTimestepGroups, UseOneTimestepGroup
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
VALUES = [999, 3, 500, 7]
CONVS = {
    "plain": ((6, 4, 3, 3), ()),
    "strided": ((6, 4, 3, 3), ([2, 2], [1, 1])),
    "dilated": ((6, 4, 3, 3), ([1], [2], [2, 2])),
    "grouped": ((6, 2, 3, 3), ([1, 1], [1, 1], [1, 1], 2)),
}


def quantized(dynamic=True, bits=8, kind="plain", readers=1):
    """Convolutions and a linear of one sample, quantized by two timestep groups: ranges 4 and 40."""
    builder = GraphBuilder(batch=2, dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4, 6, 6))
    builder.placeholder("timestep", (builder.batch,), torch.int64)
    shape, geometry = CONVS[kind]
    outputs = []
    for index in range(readers):
        weight, bias = builder.weight(f"conv{index}.weight", shape), builder.weight(f"conv{index}.bias", (6,))
        with builder.inside(f"conv{index}"):
            outputs.append(builder.call(aten.conv2d.default, x, weight, bias if index % 2 == 0 else None, *geometry))
    graph_module = builder.build(tuple(outputs))
    IndexTimesteps(VALUES)(graph_module)
    GroupTimesteps(2)(graph_module)

    def make_observer(layer, entries):
        observer = GroupedMinMaxObserver(2, bits)
        observer.low, observer.high = torch.tensor([-1.5, -20.0]), torch.tensor([2.5, 20.0])
        observer.batches += 1
        return observer

    ObserveTimestepGroups(make_observer)(graph_module)
    for node in [n for n in graph_module.graph.nodes if n.op == "call_module"]:
        graph_module.get_submodule(node.target).convert(graph_module, node)
    for conv in calls(graph_module, aten.conv2d.default):
        name = f"observer_{conv.name}"
        graph_module.add_submodule(name, PerChannelWeightObserver(bits=8, symmetric=True, search=False))
        with graph_module.graph.inserting_before(conv):
            call = graph_module.graph.call_module(name, (conv.args[1],))
            call.meta["val"] = conv.args[1].meta["val"]
        conv.update_arg(1, call)
        graph_module.get_submodule(name).convert(graph_module, call)
    graph_module.recompile()
    return graph_module


def batch(size, timestep, scale=1.0):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, 6, 6, generator=generator) * scale, torch.full((size,), timestep)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_fires_and_keeps_numerics_for_batches_of_one_group(dynamic, bits):
    # Values beyond the range are clamped, not wrapped around.
    result = assert_pass_contract(
        UseOneTimestepGroup, quantized(dynamic, bits), batch(2, 500, 9.0), exact=True,
        more_inputs=[batch(2, 3, 9.0), *([batch(5, 7, 9.0), batch(1, 999)] if dynamic else [])],
    )  # fmt: skip
    assert result.modified and not find_grouped_quantizers(result.graph_module)
    assert decomposed.quantize_per_channel.default not in operators(result.graph_module)


def test_the_first_item_decides():
    graph_module = quantized()
    wanted = copy.deepcopy(graph_module)
    UseOneTimestepGroup()(graph_module)
    x, t = batch(2, 3)
    t[1] = 999
    assert torch.equal(graph_module(x, t)[0], wanted(x, torch.full((2,), 3))[0])


def test_does_not_fire_without_groups_or_twice():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    assert unchanged(UseOneTimestepGroup(), builder.build(builder.call(aten.relu.default, x)))
    graph_module = quantized()
    UseOneTimestepGroup()(graph_module)
    assert unchanged(UseOneTimestepGroup(), graph_module)


def test_several_users_have_a_dequantize_each():
    graph_module = quantized(readers=3)
    result = assert_pass_contract(UseOneTimestepGroup, graph_module, batch(2, 500), exact=True)
    restored = calls(result.graph_module, decomposed.dequantize_per_tensor.tensor)
    assert len(restored) == 3 and len({node.args[0] for node in restored}) == 1
    assert all(len(node.users) == 1 for node in restored)
