import copy
import operator

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import PartitionUnits, PassError, extract_subgraph
from tfmq_fx.passes.analysis import find_units
from tfmq_fx.testing import GraphBuilder
from tfmq_fx.testing.canonical import canonical_text, value_signature

aten = torch.ops.aten


def block(*, outside=False, dynamic=False):
    """conv -> block with a residual join -> conv; with ``outside`` the inner conv is read after it as well."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("sample", (builder.batch, 2, 4, 4))
    entry = builder.call(aten.conv2d.default, x, builder.weight("enter.weight", (2, 2, 1, 1)))
    with builder.inside("block"):
        hidden = builder.call(aten.silu.default, entry)
        hidden = builder.call(aten.conv2d.default, hidden, builder.weight("block.conv.weight", (2, 2, 1, 1)))
        join = builder.call(aten.add.Tensor, entry, hidden)
    read = builder.call(aten.cat.default, [join, hidden], 1) if outside else join
    width = 4 if outside else 2
    last = builder.call(aten.conv2d.default, read, builder.weight("leave.weight", (1, width, 1, 1)))
    return builder.build(last)


def image(size=2, seed=0):
    return torch.randn(size, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def unit_calls(graph_module):
    return [node for node in graph_module.graph.nodes if node.op == "call_module"]


def test_fires():
    graph_module = block()
    assert PartitionUnits()(graph_module).modified
    assert [(node.name, node.meta["tfmq_fx.unit"]) for node in unit_calls(graph_module)] == [
        ("unit_0", ("enter", "layer")),
        ("unit_1", ("block", "residual")),
        ("unit_2", ("leave", "layer")),
    ]
    assert [node.op for node in graph_module.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    inside = operators(graph_module.unit_1)
    assert inside == {aten.silu.default: 1, aten.conv2d.default: 1, aten.add.Tensor: 1}


def test_the_temporal_block_is_the_first_unit_and_inputs_keep_their_order():
    graph_module = tfmq_fx.capture(small_denoiser(), batch())
    PartitionUnits()(graph_module)
    assert [node.meta["tfmq_fx.unit"] for node in unit_calls(graph_module)] == [
        ("temporal block", "temporal"),
        ("enter", "layer"),
        ("down", "residual"),
        ("qkv", "residual"),
        ("up", "residual"),
        ("leave", "layer"),
    ]
    assert [node.name for node in graph_module.graph.nodes if node.op == "placeholder"] == ["sample", "timestep"]


def test_metadata():
    graph_module = block(outside=True)
    stacks = {n.name: n.meta.get("nn_module_stack") for n in graph_module.graph.nodes}
    values = {n.name: value_signature(n.meta["val"]) for n in graph_module.graph.nodes if "val" in n.meta}
    PartitionUnits()(graph_module)
    for node in graph_module.unit_1.graph.nodes:
        if node.op == "call_function":
            assert node.meta["nn_module_stack"] == stacks[node.name]
            assert value_signature(node.meta["val"]) == values[node.name]
    call = unit_calls(graph_module)[1]
    first, second = calls(graph_module, operator.getitem)
    assert call.meta["nn_module_stack"] == first.meta["nn_module_stack"] == stacks["add_tensor"]
    assert [value_signature(node.meta["val"]) for node in (first, second)] == [
        values["conv2d_default_1"],
        values["add_tensor"],
    ]
    assert value_signature(call.meta["val"]) == f"({values['conv2d_default_1']}, {values['add_tensor']})"


def test_state_is_shared():
    graph_module = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    PartitionUnits()(graph_module)
    names = set()
    for call in unit_calls(graph_module):
        unit = graph_module.get_submodule(call.target)
        tensors = dict(unit.named_parameters()) | dict(unit.named_buffers())
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            assert getattr(graph_module.get_submodule(path), leaf) is tensor
            names.add(name)
        for name, module in unit.named_children():
            if "observer" in name or "activation_post_process" in name:
                assert graph_module.get_submodule(name) is module
    assert {"down.conv1.weight", "up.norm.bias", "time.one.weight", "up_shortcut_weight_part1"} <= names
    twin = copy.deepcopy(graph_module)
    assert twin.unit_2.down.conv1.weight is twin.down.conv1.weight is not graph_module.down.conv1.weight


def test_does_not_fire():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 2, 4, 4))
    assert unchanged(PartitionUnits(), builder.build(builder.call(aten.silu.default, x)))


def test_does_not_fire_twice():
    graph_module = block(outside=True)
    PartitionUnits()(graph_module)
    before = canonical_text(graph_module)
    assert not PartitionUnits()(graph_module).modified
    assert canonical_text(graph_module) == before


def test_refuses_a_graph_without_values_and_an_unknown_granularity():
    graph_module = block()
    calls(graph_module, aten.silu.default)[0].meta.pop("val")
    with pytest.raises(PassError, match="has no meta"):
        PartitionUnits()(graph_module)
    with pytest.raises(ValueError, match="'block' or 'layer'"):
        PartitionUnits(granularity="stage")


@pytest.mark.parametrize("options", [{}, {"temporal": False}, {"granularity": "layer"}])
@pytest.mark.parametrize("prepared", [False, True])
def test_numerics(prepared, options):
    graph_module = tfmq_fx.capture(small_denoiser(), batch())
    if prepared:
        graph_module = tfmq_fx.prepare(graph_module, timesteps=TIMESTEPS)
    inputs = [batch(4), batch(1), batch(5)]
    with torch.no_grad():
        wanted = [copy.deepcopy(graph_module)(*given) for given in inputs]
        PartitionUnits(**options)(graph_module)
        for given, output in zip(inputs, wanted, strict=True):
            assert torch.equal(graph_module(*given), output)


def test_observers_inside_units_are_the_ones_that_calibrate():
    graph_module = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    twin = copy.deepcopy(graph_module)
    PartitionUnits()(graph_module)
    with torch.no_grad():
        graph_module(*batch())
        twin(*batch())
    seen = dict(graph_module.named_buffers())
    assert all(torch.equal(seen[name], value) for name, value in twin.named_buffers())


def test_several_users_of_an_inner_value():
    graph_module = block(outside=True, dynamic=True)
    wanted = [graph_module(image(size)) for size in (1, 2, 5)]
    PartitionUnits()(graph_module)
    call = unit_calls(graph_module)[1]
    assert [node.args for node in graph_module.graph.nodes if node.name.startswith("getitem")] == [(call, 0), (call, 1)]
    assert all(torch.equal(graph_module(image(size)), w) for size, w in zip((1, 2, 5), wanted, strict=True))


def test_a_weight_of_two_units_stays_outside_of_both():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 4))
    weight = builder.weight("shared.weight", (4, 4))
    first = builder.call(aten.linear.default, x, weight)
    second = builder.call(aten.linear.default, builder.call(aten.silu.default, first), weight)
    graph_module = builder.build(second)
    wanted = graph_module(torch.ones(2, 4))
    assert [unit.name for unit in find_units(graph_module)] == ["shared", "shared (2)"]
    PartitionUnits()(graph_module)
    assert [len(call.args) for call in unit_calls(graph_module)] == [2, 2]
    assert [n.target for n in graph_module.graph.nodes if n.op == "get_attr"] == ["shared.weight"]
    assert torch.equal(graph_module(torch.ones(2, 4)), wanted)


def test_a_size_from_outside_is_read_off_the_units_own_input():
    graph_module = tfmq_fx.capture(small_denoiser(), batch())
    PartitionUnits()(graph_module)
    unit = graph_module.unit_3
    (entry,) = [node for node in unit.graph.nodes if node.op == "placeholder"]
    (size,) = calls(unit, aten.sym_size.int)
    assert size.args == (entry, 0) and size.meta["tfmq_fx.size_of"] == "sym_size_int_4"
    with torch.no_grad():
        assert unit(torch.randn(7, 8, 8, 8)).shape == (7, 8, 8, 8)


def test_a_size_that_no_input_has_stays_an_input():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("sample", (builder.batch, 2))
    size = builder.call(aten.sym_size.int, x, 0)
    with builder.inside("block"):
        row = builder.call(aten.mean.dim, x, [0])
        wide = builder.call(aten.linear.default, row, builder.weight("block.weight", (2, 2)))
        join = builder.call(aten.add.Tensor, row, wide)
        out = builder.call(aten.expand.default, join, [size, 2])
    graph_module = builder.build(builder.call(aten.mul.Tensor, out, out))
    example = torch.randn(3, 2)
    wanted = graph_module(example)
    (unit,) = find_units(graph_module)
    submodule, inputs = extract_subgraph(graph_module, unit.nodes, [out])
    assert inputs == [x] and calls(submodule, aten.sym_size.int)[0].args[1] == 0
    submodule, inputs = extract_subgraph(graph_module, [node for node in unit.nodes if node is not row], [out])
    assert inputs == [row, size]
    assert torch.equal(submodule(example.mean(0), 3) ** 2, wanted)
    PartitionUnits()(graph_module)
    assert torch.equal(graph_module(example), wanted)


def test_arithmetic_of_sizes_is_recomputed():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("sample", (builder.batch, 2, 4))
    rows = builder.call(operator.mul, builder.call(aten.sym_size.int, x, 0), 2)
    flat = builder.call(aten.reshape.default, x, [rows, 4])
    graph_module = builder.build(builder.call(aten.linear.default, flat, builder.weight("fc.weight", (3, 4))))
    submodule, inputs = extract_subgraph(graph_module, [flat], [flat])
    assert inputs == [x]
    assert submodule(torch.randn(5, 2, 4)).shape == (10, 4)


def test_a_multiple_of_a_size_is_computed_from_it():
    """The tokens of all items in one axis: the sizes of what was reshaped stand outside of the part."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("sample", (builder.batch, 2, 4))
    rows = builder.call(operator.mul, builder.call(aten.sym_size.int, x, 0), 2)
    flat = builder.call(aten.reshape.default, x, [rows, 4])
    tokens = builder.call(aten.sym_size.int, flat, 0)
    part = builder.call(aten.reshape.default, x, [tokens, 2, 2])
    graph_module = builder.build(builder.call(aten.relu.default, part))
    submodule, inputs = extract_subgraph(graph_module, [part], [part])
    assert inputs == [x]
    assert submodule(torch.randn(5, 2, 4)).shape == (10, 2, 2)


def test_writes_in_place_stay_in_order():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.SiLU(inplace=True)

        def forward(self, x):
            hidden = self.act(self.conv(x))
            hidden += x
            return hidden

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.side = nn.Conv2d(2, 2, 1)

        def forward(self, sample):
            hidden = self.blocks[0](sample)
            side = self.side(hidden)
            hidden.mul_(2.0)
            return self.blocks[1](hidden) + side

    torch.manual_seed(0)
    graph_module = tfmq_fx.capture(Model(), (image(),))
    with torch.no_grad():
        wanted = graph_module(image())
        assert [unit.name for unit in find_units(graph_module)] == ["blocks.0", "side", "blocks.1"]
        PartitionUnits()(graph_module)
        assert torch.equal(graph_module(image()), wanted)


def test_extract_subgraph_shares_and_changes_nothing():
    graph_module = block()
    before = canonical_text(graph_module)
    nodes = find_units(graph_module)[1].nodes
    submodule, inputs = extract_subgraph(graph_module, nodes, [nodes[-1]])
    assert canonical_text(graph_module) == before
    assert [node.name for node in inputs] == ["conv2d_default"]
    assert submodule.block.conv.weight is graph_module.block.conv.weight
    assert sorted(submodule.state_dict()) == ["block.conv.weight"]
