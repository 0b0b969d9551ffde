import pytest
import torch
from torch import nn

from tests.passes.helpers import calls, unchanged
from tfmq_fx.passes import IndexTimesteps, ObserveTemporalBlock, PassError
from tfmq_fx.testing import GraphBuilder, TimePath, assert_pass_contract, build_temporal_graph

aten = torch.ops.aten
VALUES = [999, 500, 7, 3]


class Recorder(nn.Module):
    """Returns its input and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, rows):
        self.calls.append((x.clone(), rows.clone()))
        return x


def observed(model, **options):
    """The model with a row and observers, and the observers in the order of their calls."""
    name = model.path.timestep_name
    IndexTimesteps(VALUES, timestep=name)(model.graph_module)
    rewrite = ObserveTemporalBlock(lambda linear: Recorder(), timestep=name, **options)
    assert rewrite(model.graph_module).modified
    nodes = [node for node in model.graph_module.graph.nodes if node.op == "call_module"]
    return rewrite, nodes, [model.graph_module.get_submodule(node.target) for node in nodes]


def test_fires_once_per_distinct_input():
    model = build_temporal_graph(TimePath(blocks=3, activation="shared"))
    _, nodes, _ = observed(model)
    assert [len(node.users) for node in nodes] == [1, 1, 3]
    linears = {*model.expected.time_embedding, *model.expected.embedding_layers}
    assert {user.name for node in nodes for user in node.users} == linears
    assert all(node.meta["nn_module_stack"] for node in nodes)


def test_each_block_with_its_own_activation_has_its_own_observer():
    _, nodes, _ = observed(build_temporal_graph(TimePath(blocks=3, activation="separate")))
    assert len(nodes) == 5


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("broadcast", ["ones", "expand", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_item_of_the_batch_is_observed_with_its_own_row(scalar, broadcast, dynamic):
    model = build_temporal_graph(
        TimePath(scalar_timestep=scalar, broadcast=broadcast, dynamic_batch=dynamic, batch=3, position="first")
    )
    _, _, recorders = observed(model)
    for batch in (3, 1, 4) if dynamic else (3,):
        model.graph_module(*model.example_inputs((7, 999, 500), batch=batch))
        rows = [2] * batch if scalar else [2, 0, 1, 2][:batch]
        for recorder in recorders:
            x, seen = recorder.calls.pop()
            assert seen.tolist() == (rows if x.shape[0] == batch else [2]) and len(seen) == x.shape[0]


def test_select_leaves_the_others_alone():
    model = build_temporal_graph(TimePath(blocks=2))
    _, nodes, _ = observed(model, select=lambda linear: linear.name in model.expected.time_embedding)
    assert {user.name for node in nodes for user in node.users} == set(model.expected.time_embedding)


def test_does_not_fire_twice():
    model = build_temporal_graph(TimePath(blocks=2))
    rewrite, *_ = observed(model)
    assert unchanged(rewrite, model.graph_module)


def test_does_not_fire_on_decoys_or_without_a_block():
    model = build_temporal_graph(TimePath(linear_decoy=True, shared_weight_decoy=True, width=4))
    _, nodes, _ = observed(model)
    assert len(nodes) == 3

    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)
    weight = builder.weight("weight", (4, 4))
    mixed = builder.call(aten.mul.Tensor, x, builder.call(aten.unsqueeze.default, t, 1))
    graph_module = builder.build(builder.call(aten.linear.default, mixed, weight))
    IndexTimesteps(VALUES)(graph_module)
    assert unchanged(ObserveTemporalBlock(lambda linear: Recorder()), graph_module)


def test_numerics():
    model = build_temporal_graph(TimePath(blocks=2, scale_shift=True, dynamic_batch=True, class_embedding="table"))
    IndexTimesteps(VALUES)(model.graph_module)
    more = [model.example_inputs((500,), batch=1), model.example_inputs((3, 7, 999), batch=5)]
    assert_pass_contract(
        lambda: ObserveTemporalBlock(lambda linear: Recorder()),
        model.graph_module,
        model.example_inputs(),
        exact=True,
        more_inputs=more,
        confined_to=lambda node: node.name in model.expected.nodes,
    )


def test_several_users_in_an_order_other_than_that_of_the_structure():
    # One linear of a g_i stands in front of the linear of h that reads the same value.
    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)
    column = builder.call(aten.to.dtype, builder.call(aten.unsqueeze.default, t, 1), torch.float32)
    features = builder.call(aten.sin.default, builder.call(aten.mul.Tensor, column, builder.weight("f", (4,))))
    early = builder.call(aten.linear.default, features, builder.weight("early", (4, 4)))
    first = builder.call(aten.linear.default, features, builder.weight("first", (4, 4)))
    late = builder.call(aten.linear.default, first, builder.weight("late", (4, 4)))
    total = builder.call(aten.add.Tensor, builder.call(aten.add.Tensor, x, early), late)
    graph_module = builder.build((total, features))
    IndexTimesteps(VALUES)(graph_module)
    example = (torch.randn(2, 4), torch.tensor([3, 999]))
    result = assert_pass_contract(
        lambda: ObserveTemporalBlock(lambda linear: Recorder()), graph_module, example, exact=True
    )
    sources = [node.args[0] for node in calls(result.graph_module, aten.linear.default)]
    assert sources[0] is sources[1] and sources[0].op == "call_module"
    assert result.graph_module.graph.output_node().args[0][1].target is aten.sin.default


def test_needs_a_row():
    with pytest.raises(PassError, match="no timestep row; run IndexTimesteps first"):
        ObserveTemporalBlock(lambda linear: Recorder())(build_temporal_graph(TimePath()).graph_module)
