"""Deliberately broken passes, each of which the contract checker must catch; and the sound one it must not."""

import pytest
import torch
from tfmq_fx.passes import FoldWeightZeroPoints, GraphPass, IndexTimesteps, RemoveDropouts, TabulateTemporalBlock
from tfmq_fx.passes.nodes import replace_node
from tfmq_fx.passes.remove_dropouts import is_idle_dropout
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.testing import ContractViolation, GraphBuilder, assert_pass_contract

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed


def two_users():
    """A dropout with two users, inside a module, and a second live branch."""
    builder = GraphBuilder()
    with builder.inside("block"):
        x = builder.placeholder("x", (2, 4))
        dropped = builder.call(aten.dropout.default, builder.call(aten.silu.default, x), 0.5, False)
        left, right = builder.call(aten.sin.default, dropped), builder.call(aten.cos.default, dropped)
        total = builder.call(aten.add.Tensor, left, right)
    return builder.build(total), (torch.randn(2, 4),)


class Broken(GraphPass):
    """Takes idle dropouts out, with one thing wrong in each subclass."""

    id = "test::broken"

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        idle = [n for n in graph_module.graph.nodes if is_idle_dropout(n)]
        for node in idle:
            self.one(node)
        return bool(idle)

    def one(self, node: fx.Node) -> None:
        replace_node(node, node.args[0])


class ForgetsTheSecondUser(Broken):
    def one(self, node):
        first = next(iter(node.users))
        first.replace_input_with(node, node.args[0])
        second = next(iter(node.users))
        second.replace_input_with(node, node.args[0].args[0])  # reads past the silu
        node.graph.erase_node(node)


class AlwaysReportsAChange(Broken):
    def rewrite(self, graph_module):
        super().rewrite(graph_module)
        return True


class NeverReportsAChange(Broken):
    def call(self, graph_module):
        super().rewrite(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, False)


class DropsMetadata(Broken):
    def one(self, node):
        for user in node.users:
            user.meta.pop("nn_module_stack")
        super().one(node)


class InsertsWithoutAValue(Broken):
    def one(self, node):
        with node.graph.inserting_before(node):
            replace_node(node, node.graph.call_function(aten.alias.default, (node.args[0],)))


class LiesAboutTheValue(Broken):
    def one(self, node):
        node.args[0].meta["val"] = node.meta["val"].to(torch.float64)
        super().one(node)


class ChangesWhatItHasNoBusinessWith(Broken):
    def one(self, node):
        for user in list(node.graph.nodes):
            if user.target is aten.cos.default:
                user.target = aten.sin.default
        super().one(node)


class InsertsBeforeItsInputs(Broken):
    def one(self, node):
        graph = node.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            new = graph.call_function(aten.alias.default, (node.args[0],))
            new.meta.update(node.meta)
        replace_node(node, new)


class RenamesTheInput(Broken):
    def one(self, node):
        placeholder = next(n for n in node.graph.nodes if n.op == "placeholder")
        placeholder.target = placeholder.name = "renamed"
        super().one(node)


class WritesToTheInput(Broken):
    def one(self, node):
        node.args[0].target = aten.silu_.default
        super().one(node)


class NeverStops(Broken):
    def rewrite(self, graph_module):
        output = graph_module.graph.output_node()
        source = output.args[0] if isinstance(output.args[0], fx.Node) else output.args[0][0]
        with graph_module.graph.inserting_before(output):
            new = graph_module.graph.call_function(aten.alias.default, (source,))
            new.meta.update(source.meta)
        output.replace_input_with(source, new)
        return True


class RemembersTheLastGraph(Broken):
    seen = 0

    def rewrite(self, graph_module):
        RemembersTheLastGraph.seen += 1
        for node in graph_module.graph.nodes:
            if node.target is aten.cos.default:
                node.name = f"cos_number_{RemembersTheLastGraph.seen}"
        return super().rewrite(graph_module)


BROKEN = [
    ForgetsTheSecondUser, AlwaysReportsAChange, NeverReportsAChange, DropsMetadata, InsertsWithoutAValue,
    LiesAboutTheValue, ChangesWhatItHasNoBusinessWith, InsertsBeforeItsInputs, RenamesTheInput, WritesToTheInput,
    NeverStops, RemembersTheLastGraph,
]  # fmt: skip


def test_the_sound_pass_is_accepted():
    assert_pass_contract(RemoveDropouts, *two_users(), exact=True)
    assert_pass_contract(Broken, *two_users(), exact=True)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b.__name__)
def test_the_broken_pass_is_caught(broken):
    with pytest.raises((ContractViolation, RuntimeError)):
        assert_pass_contract(broken, *two_users(), exact=True)


def test_a_wrong_zero_point_is_caught():
    class KeepsTheOldZeroPoint(FoldWeightZeroPoints):
        """Shifts the integers but leaves the zero point where it was."""

        def rewrite(self, graph_module):
            zeros = {n: getattr(graph_module, n).clone() for n in dict(graph_module.named_buffers()) if "zero" in n}
            modified = super().rewrite(graph_module)
            for name, buffer in graph_module.named_buffers():
                for old, value in zeros.items():
                    if name != old and value.shape == buffer.shape and "zero" in name:
                        buffer.copy_(value)
            return modified

    def graph():
        builder = GraphBuilder()
        x = builder.placeholder("x", (2, 3))
        q = builder.buffer("q", torch.randint(0, 16, (4, 3), dtype=torch.uint8))
        scale, zero = builder.buffer("scale", torch.rand(4)), builder.buffer("zero", torch.tensor([1, 5, 7, 15]))
        weight = builder.call(
            decomposed.dequantize_per_channel.default, q, scale, zero, 0, 0, 15, torch.uint8
        )  # fmt: skip
        return builder.build(builder.call(aten.linear.default, x, weight)), (torch.randn(2, 3),)

    assert_pass_contract(FoldWeightZeroPoints, *graph(), exact=True)
    with pytest.raises(ContractViolation):
        assert_pass_contract(KeepsTheOldZeroPoint, *graph(), exact=True)


@pytest.mark.parametrize("second", [False, True])
def test_a_pass_that_takes_the_timestep_for_the_first_placeholder_is_caught(second):
    class FirstPlaceholder(IndexTimesteps):
        """Looks at positions where it should look at names."""

        def rewrite(self, graph_module):
            first = next(n for n in graph_module.graph.nodes if n.op == "placeholder")
            if first.target != self.timestep:
                first.target, self.timestep = self.timestep, first.target
            return super().rewrite(graph_module)

    builder = GraphBuilder()
    sizes = {"sample": ((2, 4), torch.float32), "timestep": ((2,), torch.int64)}
    names = ["sample", "timestep"] if second else ["timestep", "sample"]
    inputs = {name: builder.placeholder(name, sizes[name][0], sizes[name][1]) for name in names}
    column = builder.call(aten.unsqueeze.default, inputs["timestep"], -1)
    graph_module = builder.build(builder.call(aten.add.Tensor, inputs["sample"], column))
    values = {"sample": torch.randn(2, 4), "timestep": torch.tensor([1, 3])}
    example = [values[name] for name in names]
    assert_pass_contract(lambda: IndexTimesteps([1, 3]), graph_module, example)
    if second:
        with pytest.raises((ContractViolation, RuntimeError)):
            assert_pass_contract(lambda: FirstPlaceholder([1, 3]), graph_module, example)


def test_a_table_of_another_block_is_caught():
    class ShiftsTheRows(TabulateTemporalBlock):
        def rewrite(self, graph_module):
            modified = super().rewrite(graph_module)
            for name, buffer in graph_module.named_buffers():
                if name.startswith("temporal_features"):
                    buffer.copy_(buffer.roll(1, 0).clone())
            return modified

    builder = GraphBuilder()
    sample = builder.placeholder("sample", (2, 4))
    timestep = builder.placeholder("timestep", (2,), torch.int64)
    angle = builder.call(aten.sin.default, builder.call(aten.unsqueeze.default, timestep, -1))
    feature = builder.call(aten.linear.default, angle, builder.weight("w", (4, 1)))
    graph_module = builder.build(builder.call(aten.add.Tensor, sample, feature))
    IndexTimesteps([1, 3, 5])(graph_module)
    example = (torch.randn(2, 4), torch.tensor([1, 5]))
    assert_pass_contract(TabulateTemporalBlock, graph_module, example)
    with pytest.raises(ContractViolation):
        assert_pass_contract(ShiftsTheRows, graph_module, example)
