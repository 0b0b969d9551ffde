"""A planted fault is found by the application that it is in, and by no other."""

from typing import ClassVar

import pytest
import torch

from tests.properties.test_broken_passes import AppliesLiveDropouts, example
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes import (
    CANONICALIZE,
    DecomposeAttention,
    GraphPass,
    Numerics,
    RemoveDropouts,
    RemoveIdentityArithmetic,
)
from tfmq_fx.passes.support.nodes import insert_call
from tfmq_fx.testing import GraphBuilder, bisect_passes

aten = torch.ops.aten


class Planted(GraphPass):
    """A broken pass of the contract's tests, as a pass of ours."""

    id: ClassVar[str] = "tests::planted"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module):
        return AppliesLiveDropouts().call(graph_module).modified


class Scale(GraphPass):
    """Multiplies what the sines yield."""

    id: ClassVar[str] = "tests::scale"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def rewrite(self, graph_module):
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.sin.default):
            with graph_module.graph.inserting_after(node):
                readers = list(node.users)
                new = insert_call(graph_module.graph, aten.mul.Tensor, (node, self.factor), anchor=node)
            for reader in readers:
                reader.replace_input_with(node, new)
        return True


def test_the_broken_pass_among_sound_ones_is_found():
    graph_module, (x,) = example()

    def run():
        RemoveIdentityArithmetic()(graph_module)
        Planted()(graph_module)
        CANONICALIZE.run(graph_module)

    result = bisect_passes(run, {"x": x})
    culprit = result.culprit
    assert (culprit.index, culprit.pass_id, culprit.error_before) == (1, "tests::planted", 0.0)
    assert culprit.error_after > 0.1 and culprit.modified and not result.outside
    # The run ends there.
    assert len(result.steps) == 2
    assert any("aten.dropout" in node for node in result.removed)
    assert any("aten.mul.Tensor" in node for node in result.added)
    assert str(result).startswith("the results part at #1 tests::planted: 0 -> ")


def test_sound_passes_are_not_accused():
    graph_module, (x,) = example()
    result = bisect_passes(lambda: CANONICALIZE.run(graph_module), [x])
    assert result.culprit is None and [step.pass_id for step in result.steps] == list(CANONICALIZE.ids)
    assert str(result).startswith(f"no pass parts from the reference: {len(CANONICALIZE)} of {len(CANONICALIZE)} ")


@pytest.mark.parametrize("factor, found", [(1 + 1e-6, False), (10.0, True), (float("nan"), True)])
def test_a_pass_that_promises_less_has_the_tolerance(factor, found):
    graph_module, (x,) = example()
    result = bisect_passes(lambda: Scale(factor)(graph_module), [x])
    assert (result.culprit is not None) is found
    exact = type("Exact", (Scale,), {"numerics": Numerics.EXACT})
    graph_module, (x,) = example()
    assert bisect_passes(lambda: exact(factor)(graph_module), [x]).culprit.pass_id == "tests::scale"


def test_with_a_reference_errors_add_up_over_passes():
    graph_module, (x,) = example()
    wanted = list(graph_module(x).values())
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(wanted)

    def run():
        for _ in range(8):
            Scale(1.02)(graph_module)

    assert bisect_passes(run, [x]).culprit is None
    graph_module, _ = example()
    result = bisect_passes(run, [x], reference=wanted)
    assert result.culprit is not None and 0 < result.culprit.error_before <= 0.05 < result.culprit.error_after


def test_what_is_no_pass_is_told_apart():
    graph_module, (x,) = example()
    wanted = torch.utils._pytree.tree_leaves(graph_module(x))

    def run():
        RemoveIdentityArithmetic()(graph_module)
        graph_module.graph.find_nodes(op="call_function", target=aten.sin.default)[0].target = aten.exp.default
        graph_module.recompile()
        RemoveDropouts()(graph_module)

    result = bisect_passes(run, [x], reference=wanted)
    assert result.outside and result.culprit.index == 1
    assert "by something that is no pass" in str(result)


def test_a_graph_with_other_inputs_is_not_compared():
    builder = GraphBuilder()
    part = builder.build(builder.call(aten.sin.default, builder.placeholder("inner", (2,))))
    result = bisect_passes(lambda: Scale(2.0)(part), {"x": torch.ones(2)})
    assert result.culprit is None and result.steps[0].error_after is None
    assert "does not run on these inputs" in str(result.steps[0])


def test_a_pass_is_left_out_and_what_the_run_raises_is_raised():
    graph_module, (x,) = example()
    result = bisect_passes(lambda: Planted()(graph_module), [x], skip=["tests::planted"])
    assert result.culprit is None and not result.steps
    with pytest.raises(ConfigError, match="no pass 'tests::plant'; did you mean tests::planted"):
        bisect_passes(lambda: None, [x], skip=["tests::plant"])
    with pytest.raises(ZeroDivisionError):
        bisect_passes(lambda: 1 // 0, [x])


def test_an_integer_input_takes_the_dtype_of_the_placeholder():
    builder = GraphBuilder()
    q = builder.placeholder("q", (1, 1, 3, 4))
    graph_module = builder.build(builder.call(aten.scaled_dot_product_attention.default, q, q, q))
    values = torch.arange(12).reshape(1, 1, 3, 4)
    result = bisect_passes(lambda: DecomposeAttention()(graph_module), [values])
    assert result.culprit is None and result.steps[0].modified
