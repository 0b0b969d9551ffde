import pytest
import torch
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tfmq_fx.passes import CANONICALIZE, GraphPass, PassError, RemoveDropouts, run_pipeline
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten


class DoNothing(GraphPass):
    """Leaves the graph alone."""

    id = "tests::do_nothing"

    def rewrite(self, graph_module):
        return False


class RenameAndReport(GraphPass):
    """Swaps silu for relu, to see what calling a pass does around the rewrite."""

    id = "tests::rename"

    def rewrite(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.target is aten.silu.default:
                node.target = aten.relu.default
        return True


class LeaveDisorder(GraphPass):
    """Puts a node in front of what it reads."""

    id = "tests::disorder"

    def rewrite(self, graph_module):
        first, second = (node for node in graph_module.graph.nodes if node.op == "call_function")
        first.prepend(second)
        return True


def graph(dropout=False):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    y = builder.call(aten.dropout.default, x, 0.5, False) if dropout else builder.call(aten.silu.default, x)
    return builder.build(builder.call(aten.sin.default, y))


def test_a_pass_is_a_torch_pass_and_returns_its_result():
    result = DoNothing()(graph())
    assert isinstance(DoNothing(), PassBase)
    assert isinstance(result, PassResult) and result.modified is False


def test_a_change_is_compiled():
    graph_module, x = graph(), torch.tensor([[-1.0, 1, -2, 2], [0, 0, 0, 0]])
    result = RenameAndReport()(graph_module)
    assert result.modified and result.graph_module is graph_module
    assert torch.equal(graph_module(x), torch.sin(torch.relu(x)))


def test_a_missing_value_is_an_error_that_names_pass_node_and_way_out():
    graph_module = graph()
    del next(node for node in graph_module.graph.nodes if node.target is aten.silu.default).meta["val"]
    with pytest.raises(PassError, match=r"tests::do_nothing: node 'silu_default' .* has no meta\['val'\]; capture"):
        DoNothing()(graph_module)


def test_a_broken_graph_does_not_leave_the_pass():
    with pytest.raises(RuntimeError, match="before it has been defined"):
        LeaveDisorder()(graph())


def test_the_base_cannot_be_instantiated():
    with pytest.raises(TypeError, match="rewrite"):
        GraphPass()


def test_the_ids_are_unique_and_in_our_namespace():
    import tfmq_fx.passes as passes

    found = [getattr(passes, name) for name in passes.__all__]
    ids = [p.id for p in found if isinstance(p, type) and issubclass(p, GraphPass) and p is not GraphPass]
    assert len(ids) == len(set(ids)) >= 14
    assert all(identifier.startswith("tfmq::") for identifier in ids)


def test_a_pipeline_reports_whether_any_pass_changed_something():
    assert run_pipeline(graph(dropout=True), [DoNothing, RemoveDropouts]) is True
    assert run_pipeline(graph(dropout=True), [DoNothing]) is False
    assert run_pipeline(graph(), CANONICALIZE) is False
