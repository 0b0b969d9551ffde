import pytest
import torch
from torch import nn

from tests.passes.helpers import calls, unchanged
from tests.passes.temporal.test_observe_temporal_block import Recorder
from tfmq_fx.passes import GroupTimesteps, IndexTimesteps, ObserveTimestepGroups, PassError
from tfmq_fx.passes.temporal.observe_timestep_groups import ungrouped_layers
from tfmq_fx.testing import GraphBuilder, TimePath, assert_pass_contract, build_temporal_graph

aten = torch.ops.aten
VALUES = [999, 3, 500, 7]


def grouped(graph_module, groups=4):
    IndexTimesteps(VALUES)(graph_module)
    GroupTimesteps(groups)(graph_module)
    return graph_module


def convs_of(model):
    """Observe the convolutions alone: in these models they lie outside the temporal block."""
    return ObserveTimestepGroups(
        lambda layer, entries: Recorder(), select=lambda layer, _: layer.target is aten.conv2d.default
    )


def recorded(graph_module):
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    return nodes, [graph_module.get_submodule(node.target) for node in nodes]


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_and_every_item_has_its_own_group(scalar, dynamic):
    model = build_temporal_graph(TimePath(blocks=2, batch=3, dynamic_batch=dynamic, scalar_timestep=scalar))
    graph_module = grouped(model.graph_module)
    assert convs_of(model)(graph_module).modified
    nodes, recorders = recorded(graph_module)
    assert len(nodes) == 4 and all(node.meta["nn_module_stack"] for node in nodes if node.name != nodes[0].name)
    for batch in (3, 1, 4) if dynamic else (3,):
        graph_module(*model.example_inputs((7, 999, 500), batch=batch))
        wanted = [1] * batch if scalar else [1, 3, 2, 1][:batch]
        for recorder in recorders:
            x, seen = recorder.calls.pop()
            assert seen.tolist() == wanted and len(x) == batch


def test_does_not_fire_twice_nor_without_a_selected_layer():
    model = build_temporal_graph(TimePath())
    graph_module = grouped(model.graph_module)
    nothing = ObserveTimestepGroups(lambda layer, entries: Recorder(), select=lambda layer, activation: False)
    assert unchanged(nothing, graph_module)
    convs_of(model)(graph_module)
    assert unchanged(convs_of(model), graph_module)


def test_numerics():
    model = build_temporal_graph(TimePath(blocks=2, dynamic_batch=True, linear_decoy=True))
    result = assert_pass_contract(
        lambda: convs_of(model), grouped(model.graph_module), model.example_inputs(), exact=True,
        more_inputs=[model.example_inputs((500,), batch=1), model.example_inputs((3, 7, 999), batch=5)],
        confined_to=lambda node: node.target is aten.conv2d.default,
    )  # fmt: skip
    assert result.modified


class Tokens(nn.Module):
    """Linears over tokens: batch first, flattened, sequence first and flattened; and attention's products."""

    def __init__(self):
        super().__init__()
        self.kept, self.lost = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep):
        n, length, width = sample.shape
        x = self.kept(sample.reshape(-1, width)).reshape(n, length, width)
        heads = x.reshape(n, length, 2, 4).transpose(1, 2).reshape(n * 2, length, 4)
        weights = torch.bmm(heads, heads.transpose(1, 2))
        y = self.lost(x.transpose(0, 1).reshape(-1, width)).reshape(length, n, width)
        return y.transpose(0, 1), weights + timestep.float().sum() * 0


def test_groups_are_repeated_over_tokens_and_heads_and_what_is_not_in_order_is_noted():
    from tfmq_fx import capture

    graph_module = grouped(capture(Tokens(), (torch.randn(2, 3, 8), torch.tensor([3, 7]))))
    ObserveTimestepGroups(lambda layer, entries: Recorder())(graph_module)
    _, recorders = recorded(graph_module)
    graph_module(torch.randn(3, 3, 8), torch.tensor([500, 7, 999]))
    seen = [recorder.calls.pop()[1].tolist() for recorder in recorders]
    assert seen == [[2] * 3 + [1] * 3 + [3] * 3, *[[2, 2, 1, 1, 3, 3]] * 2]
    assert list(ungrouped_layers(graph_module)) == ["lost"]
    assert "first axis" in ungrouped_layers(graph_module)["lost"]


def test_several_users_of_one_activation_share_an_observer_per_key():
    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)
    linears = [builder.call(aten.linear.default, x, builder.weight(f"w{i}", (4, 4))) for i in range(3)]
    total = builder.call(aten.add.Tensor, builder.call(aten.add.Tensor, linears[0], linears[1]), linears[2])
    graph_module = grouped(builder.build((total, x, t)))
    keys = iter("aab")
    rewrite = ObserveTimestepGroups(lambda layer, entries: Recorder(), key=dict(zip(linears, keys, strict=True)).get)
    rewrite(graph_module)
    sources = [node.args[0] for node in calls(graph_module, aten.linear.default)]
    assert sources[0] is sources[1] is not sources[2]
    # What is no layer goes on reading the activation itself.
    assert graph_module.graph.output_node().args[0][1].op == "placeholder"


def test_needs_groups():
    with pytest.raises(PassError, match="no timestep groups; run GroupTimesteps first"):
        ObserveTimestepGroups(lambda layer, entries: Recorder())(build_temporal_graph(TimePath()).graph_module)
