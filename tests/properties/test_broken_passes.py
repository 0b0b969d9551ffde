"""Deliberately broken passes: each must be caught, and for the right reason; the sound ones must not be."""

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tfmq_fx.passes import FoldWeightZeroPoints, IndexTimesteps, RemoveDropouts, TabulateTemporalBlock
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_idle_dropout
from tfmq_fx.testing import (
    ContractViolation,
    GraphBuilder,
    TimePath,
    assert_pass_contract,
    aten_graphs,
    build_temporal_graph,
    temporal_graphs,
)

aten = torch.ops.aten


def example():
    """A dropout that reads an activation of the input and has two users; a branch beside it; all in one module."""
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    with builder.inside("block"):
        dropped = builder.call(aten.dropout.default, builder.call(aten.relu.default, x), 0.5, False)
        left, right = builder.call(aten.sin.default, dropped), builder.call(aten.cos.default, dropped)
        total = builder.call(aten.add.Tensor, left, right)
    return builder.build({"total": total, "right": right}), (torch.randn(2, 4),)


class Sound(PassBase):
    """Takes idle dropouts out; the broken passes below each have one thing wrong."""

    def call(self, graph_module):
        idle = [node for node in graph_module.graph.nodes if is_idle_dropout(node)]
        for node in idle:
            self.take_out(graph_module, node)
        graph_module.recompile()
        return PassResult(graph_module, bool(idle))

    def take_out(self, graph_module, node):
        replace_node(node, node.args[0])

    def insert(self, node, target, *args):
        """Insert a call in front of ``node`` with all its metadata."""
        with node.graph.inserting_before(node):
            return insert_call(node.graph, target, args, anchor=node)


class AppliesLiveDropouts(Sound):
    """Takes any scaling for an identity."""

    def take_out(self, graph_module, node):
        scaled = self.insert(node, aten.mul.Tensor, node.args[0], 2.0)
        replace_node(node, scaled)


class ForgetsTheSecondUser(Sound):
    """Sends the first user past the dropout and leaves it to the others."""

    def take_out(self, graph_module, node):
        if node.users:
            next(iter(node.users)).replace_input_with(node, node.args[0])
        if not node.users:
            node.graph.erase_node(node)


class ErasesUnderTheSecondUser(Sound):
    def take_out(self, graph_module, node):
        if node.users:
            next(iter(node.users)).replace_input_with(node, node.args[0])
        node.graph.erase_node(node)


class AlwaysReportsAChange(Sound):
    def call(self, graph_module):
        super().call(graph_module)
        return PassResult(graph_module, True)


class NeverReportsAChange(Sound):
    def call(self, graph_module):
        super().call(graph_module)
        return PassResult(graph_module, False)


class ReturnsNothing(Sound):
    def call(self, graph_module):
        super().call(graph_module)


class ForgetsToRecompile(Sound):
    def call(self, graph_module):
        idle = [node for node in graph_module.graph.nodes if is_idle_dropout(node)]
        for node in idle:
            self.take_out(graph_module, node)
        return PassResult(graph_module, bool(idle))


class ForgetsTheValue(Sound):
    def take_out(self, graph_module, node):
        copied = self.insert(node, aten.alias.default, node.args[0])
        del copied.meta["val"]
        replace_node(node, copied)


class CopiesTheValueThroughACast(Sound):
    def take_out(self, graph_module, node):
        wide = self.insert(node, aten.to.dtype, node.args[0], torch.float64)
        wide.meta["val"] = node.meta["val"]
        replace_node(node, self.insert(node, aten.to.dtype, wide, torch.float32))


class ForgetsTheModule(Sound):
    def take_out(self, graph_module, node):
        copied = self.insert(node, aten.alias.default, node.args[0])
        copied.meta.pop("nn_module_stack", None)
        replace_node(node, copied)


class ClearsTheNeighboursMetadata(Sound):
    def take_out(self, graph_module, node):
        for user in node.users:
            user.meta.pop("nn_module_stack", None)
        super().take_out(graph_module, node)


class EditsSharedMetadataInPlace(Sound):
    """The module stack is one dictionary for all nodes of a module."""

    def take_out(self, graph_module, node):
        node.args[0].meta["nn_module_stack"]["rewritten"] = ("rewritten", "torch.nn.Module")
        super().take_out(graph_module, node)


class ChangesWhatItHasNoBusinessWith(Sound):
    """Sine of a shifted argument is cosine: the same numbers nearly, but not its node."""

    def take_out(self, graph_module, node):
        for user in list(node.users):
            if user.target is aten.cos.default:
                shifted = self.insert(user, aten.add.Tensor, node, torch.pi / 2)
                user.target, user.args = aten.sin.default, (shifted,)
        super().take_out(graph_module, node)


class InsertsBeforeItsInputs(Sound):
    def take_out(self, graph_module, node):
        copied = self.insert(node, aten.alias.default, node.args[0])
        node.args[0].prepend(copied)
        replace_node(node, copied)


class LeavesStateBehind(Sound):
    def take_out(self, graph_module, node):
        add_buffer(graph_module, "probability", torch.tensor(0.5))
        super().take_out(graph_module, node)


class ReadsStateThatIsNotThere(Sound):
    def take_out(self, graph_module, node):
        with node.graph.inserting_before(node):
            zero = node.graph.create_node("get_attr", "zero")
            zero.meta.update(node.meta)
        replace_node(node, self.insert(node, aten.add.Tensor, node.args[0], zero))


class RenamesTheInput(Sound):
    def take_out(self, graph_module, node):
        node.graph.find_nodes(op="placeholder")[0].target = "renamed"
        super().take_out(graph_module, node)


class ReturnsATuple(Sound):
    def take_out(self, graph_module, node):
        super().take_out(graph_module, node)
        output = graph_module.graph.output_node()
        output.args = (tuple(output.args[0].values()),)


class WidensTheOutput(Sound):
    def take_out(self, graph_module, node):
        super().take_out(graph_module, node)
        output = graph_module.graph.output_node()
        total = output.args[0]["total"]
        with graph_module.graph.inserting_before(output):
            wide = insert_call(graph_module.graph, aten.to.dtype, (total, torch.float64), anchor=total)
        output.args = ({**output.args[0], "total": wide},)


class WritesToTheInput(Sound):
    """In place is faster, and on this graph nobody else reads what is overwritten, but for the caller."""

    def take_out(self, graph_module, node):
        source = node.args[0]
        if source.target is aten.relu.default:
            source.target = aten.relu_.default
        super().take_out(graph_module, node)


class NeverEnds(Sound):
    """Makes of one dropout another one."""

    def take_out(self, graph_module, node):
        replace_node(node, self.insert(node, aten.dropout.default, node.args[0], 0.25, False))


class CountsItsRuns(Sound):
    """Keeps state in the instance, and writes it into the graph."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def call(self, graph_module):
        self.runs += 1
        return super().call(graph_module)

    def take_out(self, graph_module, node):
        source = node.args[0]
        super().take_out(graph_module, node)
        source._rename(f"activation_of_run_{self.runs}")


class CountsAllRuns(Sound):
    """Keeps state in the class."""

    runs = itertools.count()

    def take_out(self, graph_module, node):
        name = add_buffer(graph_module, f"zero_{next(self.runs)}", torch.zeros(()))
        with node.graph.inserting_before(node):
            zero = node.graph.create_node("get_attr", name)
            zero.meta.update(node.meta, val=node.meta["val"].new_zeros(()))
        replace_node(node, self.insert(node, aten.add.Tensor, node.args[0], zero))


BROKEN = {
    AppliesLiveDropouts: "P2",
    ForgetsTheSecondUser: "P3",
    ErasesUnderTheSecondUser: "P1",
    AlwaysReportsAChange: "P3",
    NeverReportsAChange: "P4",
    ReturnsNothing: "P4",
    ForgetsToRecompile: "P1",
    ForgetsTheValue: "P5",
    CopiesTheValueThroughACast: "P5",
    ForgetsTheModule: "P5",
    ClearsTheNeighboursMetadata: "P5",
    EditsSharedMetadataInPlace: "P5",
    InsertsBeforeItsInputs: "P1",
    LeavesStateBehind: "P1",
    ReadsStateThatIsNotThere: "P1",
    RenamesTheInput: "P5",
    ReturnsATuple: "P5",
    WidensTheOutput: "P5",
    NeverEnds: "P3",
    CountsItsRuns: "P8",
    CountsAllRuns: "P8",
}


def test_the_sound_pass_is_accepted():
    graph_module, inputs = example()
    result = assert_pass_contract(Sound, graph_module, inputs, exact=True, confined_to=is_idle_dropout)
    assert result.modified
    assert assert_pass_contract(RemoveDropouts, graph_module, inputs, exact=True).modified


@pytest.mark.parametrize("broken, property_id", BROKEN.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_pass_is_caught_for_the_right_reason(broken, property_id):
    graph_module, inputs = example()
    with pytest.raises(ContractViolation, match=f"^{property_id} ") as caught:
        assert_pass_contract(broken, graph_module, inputs, rtol=1e-5, atol=1e-5)
    assert caught.value.property_id == property_id


def test_a_pass_that_leaves_its_region_is_caught_when_the_region_is_known():
    graph_module, inputs = example()
    assert_pass_contract(ChangesWhatItHasNoBusinessWith, graph_module, inputs)
    with pytest.raises(ContractViolation, match=r"^P6 confinement: node 'cos_default' lies outside the region"):
        assert_pass_contract(ChangesWhatItHasNoBusinessWith, graph_module, inputs, confined_to=is_idle_dropout)


def test_a_pass_that_writes_to_the_input_is_caught():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    graph_module = builder.build(builder.call(aten.dropout.default, builder.call(aten.relu.default, x), 0.5, False))
    with pytest.raises(ContractViolation) as caught:
        assert_pass_contract(WritesToTheInput, graph_module, (torch.randn(2, 4),), exact=True)
    assert caught.value.property_id == "P7"


def test_the_message_names_property_and_node_and_shows_the_graph():
    graph_module, inputs = example()
    with pytest.raises(AssertionError) as caught:
        assert_pass_contract(ForgetsTheValue, graph_module, inputs)
    first, *rest = str(caught.value).splitlines()
    assert first == "P5 interface: new node 'alias_default' has no meta['val']"
    assert any("call_function[target=torch.ops.aten.alias.default]" in line for line in rest)


def test_the_graph_of_the_caller_is_left_alone():
    graph_module, inputs = example()
    code = graph_module.code
    assert_pass_contract(Sound, graph_module, inputs)
    assert graph_module.code == code and "dropout" in code


def first_violation(check):
    """The property that generated graphs find broken; without shrinking, because any of them will do."""
    search = settings(phases=[Phase.generate], report_multiple_bugs=False, max_examples=60, database=None)(check)
    with pytest.raises(ContractViolation) as caught:
        search()
    return caught.value.property_id


GENERAL = {
    AppliesLiveDropouts: {"P2"},
    ForgetsTheSecondUser: {"P3"},
    ErasesUnderTheSecondUser: {"P1"},
    AlwaysReportsAChange: {"P3", "P4"},
    NeverReportsAChange: {"P4"},
    ForgetsToRecompile: {"P1"},
    ForgetsTheValue: {"P5"},
    InsertsBeforeItsInputs: {"P1"},
    LeavesStateBehind: {"P1"},
    NeverEnds: {"P3"},
    CountsAllRuns: {"P8"},
}


@pytest.mark.parametrize("broken", GENERAL, ids=lambda broken: broken.__name__)
def test_generated_graphs_catch_it_too(broken):
    @given(aten_graphs(half=False, favour=("dropout", "unary")))
    def check(generated):
        assert_pass_contract(broken, generated.graph_module, generated.example_inputs, rtol=1e-5, atol=1e-5)

    assert first_violation(check) in GENERAL[broken]


class SecondPlaceholder(IndexTimesteps):
    """Takes the second input for the timestep, as in the models that it was tried on."""

    def requires(self, graph_module):
        self.timestep = graph_module.graph.find_nodes(op="placeholder")[1].target
        super().requires(graph_module)


def test_a_pass_that_goes_by_the_position_of_the_timestep_is_caught():
    @given(temporal_graphs())
    def check(model):
        assert_pass_contract(
            lambda: SecondPlaceholder([7, 999]), model.graph_module, model.example_inputs(), exact=True
        )

    assert first_violation(check) == "P1"
    usual = build_temporal_graph(TimePath(position="last"))
    assert_pass_contract(lambda: SecondPlaceholder([7, 999]), usual.graph_module, usual.example_inputs(), exact=True)


class ShiftsTheRows(TabulateTemporalBlock):
    """Fills the table one row off."""

    def rewrite(self, graph_module):
        modified = super().rewrite(graph_module)
        for name, buffer in graph_module.named_buffers():
            if name.startswith("temporal_features"):
                graph_module.register_buffer(name, buffer.roll(1, 0))
        return modified


class LeavesOneLayerOut(TabulateTemporalBlock):
    """Takes the last feature for the first."""

    def rewrite(self, graph_module):
        modified = super().rewrite(graph_module)
        slices = graph_module.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
        if modified and len(slices) > 1 and slices[0].meta["val"].shape == slices[-1].meta["val"].shape:
            slices[-1].args = slices[0].args
        return modified


@pytest.mark.parametrize("broken", [ShiftsTheRows, LeavesOneLayerOut], ids=lambda broken: broken.__name__)
def test_a_wrong_table_is_caught(broken):
    # With a class embedding the table has one feature alone, and nothing to mistake it for.
    @given(temporal_graphs(conditional=False))
    def check(model):
        name = model.path.timestep_name
        IndexTimesteps([7, 500, 999], timestep=name)(model.graph_module)
        assert_pass_contract(lambda: broken(timestep=name), model.graph_module, model.example_inputs((7, 999)))

    # Before the outputs are compared, a table that changes from run to run would show as P3 or P8.
    assert first_violation(check) == "P2"


class FoldsInTheDtypeOfTheWeight(FoldWeightZeroPoints):
    """Subtracts the zero points as uint8, where negative differences wrap around."""

    def rewrite(self, graph_module):
        modified = super().rewrite(graph_module)
        buffers = dict(graph_module.named_buffers())
        for name, buffer in buffers.items():
            if name.endswith("_int8"):
                wrapped = buffer.to(torch.uint8).clamp_max(127).to(torch.int8)
                graph_module.register_buffer(name, wrapped)
        return modified


class KeepsTheZeroPoint(FoldWeightZeroPoints):
    """Shifts the integers and the zero points stay."""

    def rewrite(self, graph_module):
        modified = super().rewrite(graph_module)
        for name, buffer in dict(graph_module.named_buffers()).items():
            if name.endswith("_zero"):
                graph_module.register_buffer(name, buffer + 1)
        return modified


@pytest.mark.parametrize("broken", [FoldsInTheDtypeOfTheWeight, KeepsTheZeroPoint], ids=lambda broken: broken.__name__)
def test_a_wrong_zero_point_is_caught(broken):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 3))
    integers = builder.buffer("q", torch.arange(12, dtype=torch.uint8).reshape(4, 3))
    scale, zero = builder.buffer("scale", torch.rand(4) + 0.1), builder.buffer("zero", torch.tensor([1, 5, 7, 15]))
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    weight = builder.call(dequantize, integers, scale, zero, 0, 0, 15, torch.uint8)
    graph_module = builder.build(builder.call(aten.linear.default, x, weight))
    inputs = (torch.randn(2, 3),)
    assert assert_pass_contract(FoldWeightZeroPoints, graph_module, inputs, exact=True).modified
    with pytest.raises(ContractViolation) as caught:
        assert_pass_contract(broken, graph_module, inputs, exact=True)
    assert caught.value.property_id in ("P2", "P3")
