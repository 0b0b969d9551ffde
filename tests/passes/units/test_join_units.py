import copy
import operator

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.passes.helpers import operators, unchanged
from tests.passes.units.test_partition_units import block, image, unit_calls
from tfmq_fx.passes import JoinUnits, PartitionUnits, PassError, StripDeadState
from tfmq_fx.testing.canonical import canonical_text, state_digests


def captured(prepared=False):
    graph_module = tfmq_fx.capture(small_denoiser(), batch())
    return tfmq_fx.prepare(graph_module, timesteps=TIMESTEPS) if prepared else graph_module


@pytest.mark.parametrize("outside", [False, True])
def test_fires(outside):
    graph_module = block(outside=outside)
    before = canonical_text(graph_module)
    names = [node.name for node in graph_module.graph.nodes]
    PartitionUnits()(graph_module)
    assert JoinUnits()(graph_module).modified
    assert not any(name.startswith("unit_") for name, _ in graph_module.named_children())
    assert sorted(node.name for node in graph_module.graph.nodes) == sorted(names)
    # The nodes of a small chain stand in one order only, but for where weights are read.
    if not outside:
        computing = [line.split(" = ")[1].split("(")[0] for line in before.splitlines() if "call_function" in line]
        after = canonical_text(graph_module).splitlines()
        assert [line.split(" = ")[1].split("(")[0] for line in after if "call_function" in line] == computing


def test_does_not_fire():
    assert unchanged(JoinUnits(), block())
    assert unchanged(JoinUnits(), captured(prepared=True))


@pytest.mark.parametrize("options", [{}, {"temporal": False}, {"granularity": "layer"}])
@pytest.mark.parametrize("prepared", [False, True])
def test_numerics(prepared, options):
    graph_module = captured(prepared)
    names, state = sorted(node.name for node in graph_module.graph.nodes), state_digests(graph_module)
    found = operators(graph_module)
    inputs = [batch(4), batch(1)]
    with torch.no_grad():
        wanted = [copy.deepcopy(graph_module)(*given) for given in inputs]
        PartitionUnits(**options)(graph_module)
        JoinUnits()(graph_module)
        assert sorted(node.name for node in graph_module.graph.nodes) == names
        assert operators(graph_module) == found
        assert state_digests(graph_module) == state
        for given, output in zip(inputs, wanted, strict=True):
            assert torch.equal(graph_module(*given), output)


def test_joining_gives_a_graph_that_partitions_the_same_way():
    graph_module = captured()
    PartitionUnits()(graph_module)
    first = graph_module.code
    JoinUnits()(graph_module)
    assert "tfmq_fx.size_of" not in {key for node in graph_module.graph.nodes for key in node.meta}
    PartitionUnits()(graph_module)
    assert graph_module.code.count("self.unit_") == first.count("self.unit_") == 6


def test_sizes_stay_local_when_the_outer_ones_are_gone():
    graph_module = captured()
    wanted = graph_module(*batch())
    PartitionUnits()(graph_module)
    StripDeadState()(graph_module)
    JoinUnits()(graph_module)
    (size,) = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert size.args[0].name == "add_1" and size.name == "sym_size_int_4"
    assert torch.equal(graph_module(*batch()), wanted)


def test_several_users_of_one_output():
    graph_module = block(outside=True)
    wanted = graph_module(image())
    PartitionUnits()(graph_module)
    call = unit_calls(graph_module)[1]
    first = next(iter(call.users))
    with graph_module.graph.inserting_after(first):
        again = graph_module.graph.call_function(operator.getitem, (call, 0))
    again.meta["val"] = first.meta["val"]
    (reader,) = first.users
    reader.replace_input_with(first, again)
    graph_module.recompile()
    JoinUnits()(graph_module)
    assert torch.equal(graph_module(image()), wanted)


def test_what_was_trained_or_replaced_in_a_unit_comes_back():
    graph_module = block()
    PartitionUnits()(graph_module)
    with torch.no_grad():
        graph_module.unit_0.enter.weight.mul_(2)
    graph_module.unit_1.block.conv.weight = nn.Parameter(torch.ones(2, 2, 1, 1))
    wanted = graph_module(image())
    JoinUnits()(graph_module)
    assert torch.equal(graph_module.get_parameter("block.conv.weight"), torch.ones(2, 2, 1, 1))
    assert torch.equal(graph_module(image()), wanted)


def test_refuses_two_values_under_one_name():
    graph_module = captured(prepared=True)
    PartitionUnits()(graph_module)
    units = [graph_module.get_submodule(call.target) for call in unit_calls(graph_module)]
    graph_module.unit_1.enter.weight = nn.Parameter(torch.ones(8, 1, 3, 3))
    with graph_module.graph.inserting_before(unit_calls(graph_module)[0]):
        graph_module.graph.get_attr("enter.weight")
    with pytest.raises(PassError, match=r"different values under the name 'enter\.weight'"):
        JoinUnits()(graph_module)
    assert units == [graph_module.get_submodule(call.target) for call in unit_calls(graph_module)]


def test_refuses_outputs_that_are_read_all_at_once():
    graph_module = block(outside=True)
    PartitionUnits()(graph_module)
    call = unit_calls(graph_module)[1]
    graph_module.graph.output_node().args = (call,)
    with pytest.raises(PassError, match=r"unit_1.*\(block\).*getitem"):
        JoinUnits()(graph_module)
