import pytest
import torch

from tests.passes.helpers import unchanged
from tfmq_fx.errors import TimestepError
from tfmq_fx.passes import IndexTimesteps, PassError
from tfmq_fx.passes.analysis import find_row, find_temporal_block, row_columns, row_values
from tfmq_fx.testing import GraphBuilder, TimePath, assert_pass_contract, build_temporal_graph

aten = torch.ops.aten
VALUES = [999, 500, 7, 3]


def indexed(values=VALUES, *, unknown="error", output="row", **path):
    """A model with a row, returning the row itself when asked to."""
    model = build_temporal_graph(TimePath(**path))
    graph_module = model.graph_module
    assert IndexTimesteps(values, timestep=model.path.timestep_name, unknown=unknown)(graph_module).modified
    if output == "row":
        graph_module.graph.output_node().args = (find_row(graph_module),)
        graph_module.recompile()
    return model


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_wherever_the_timestep_stands(position, scalar, dynamic):
    model = indexed(
        position=position, scalar_timestep=scalar, dynamic_batch=dynamic, class_embedding="table", timestep_name="t"
    )
    row = find_row(model.graph_module)
    assert row.args[0].name == "t" and row.meta["val"].ndim == (0 if scalar else 1)
    ops = [node.op for node in model.graph_module.graph.nodes]
    assert ops[:3] == ["placeholder"] * 3 and "placeholder" not in ops[3:]
    rows = model.graph_module(*model.example_inputs((7, 999)))
    assert rows.tolist() == (2 if scalar else [2, 0])


def test_values_are_kept_in_order_and_once():
    model = indexed(torch.tensor([999, 7, 999, 3]))
    assert row_values(model.graph_module, find_row(model.graph_module)).tolist() == [999, 7, 3]


def test_does_not_fire_twice():
    model = indexed(output="model")
    assert unchanged(IndexTimesteps([1, 2]), model.graph_module)


def test_numerics():
    model = build_temporal_graph(TimePath(dynamic_batch=True, blocks=2))
    more = [model.example_inputs((500,), batch=1), model.example_inputs((3, 7, 999), batch=5)]
    assert_pass_contract(
        lambda: IndexTimesteps(VALUES), model.graph_module, model.example_inputs(), exact=True, more_inputs=more
    )


def test_an_unknown_timestep_is_an_error_that_names_it():
    model = indexed(output="model")
    with pytest.raises(TimestepError, match="timestep 8 is not in the table"):
        model.graph_module(*model.example_inputs((7, 8)))


def test_nearest_takes_the_closest_row():
    model = indexed(unknown="nearest")
    assert model.graph_module(*model.example_inputs((8, 700))).tolist() == [2, 1]


def test_a_timestep_with_several_users_keeps_them():
    builder = GraphBuilder()
    t = builder.placeholder("timestep", (2,), torch.float32)
    x = builder.placeholder("x", (2,))
    outputs = (builder.call(aten.sin.default, t), builder.call(aten.mul.Tensor, t, x), t)
    graph_module = builder.build(outputs)
    example = (torch.tensor([7.0, 3.0]), torch.randn(2))
    assert_pass_contract(lambda: IndexTimesteps(VALUES), graph_module, example, exact=True)


def test_a_taken_buffer_name_is_left_to_its_owner():
    model = build_temporal_graph(TimePath())
    model.graph_module.register_buffer("timestep_values", torch.ones(1))
    IndexTimesteps(VALUES)(model.graph_module)
    row = find_row(model.graph_module)
    assert row_values(model.graph_module, row).tolist() == VALUES and row.args[1].target == "timestep_values_1"


def test_refusals_name_what_is_wrong():
    graph_module = build_temporal_graph(TimePath()).graph_module
    with pytest.raises(PassError, match="no input named 'steps'; the inputs are sample, timestep"):
        IndexTimesteps(VALUES, timestep="steps")(graph_module)
    with pytest.raises(PassError, match="empty; pass scheduler"):
        IndexTimesteps([])(graph_module)
    with pytest.raises(ValueError, match="'ignore' is no policy"):
        IndexTimesteps(VALUES, unknown="ignore")
    next(node for node in graph_module.graph.nodes if node.name == "timestep").meta["val"] = 7
    with pytest.raises(PassError, match="'timestep' is not a tensor"):
        IndexTimesteps(VALUES)(graph_module)


def test_further_inputs_give_every_combination_a_row():
    model = build_temporal_graph(TimePath(class_embedding="table"))
    graph_module = model.graph_module
    assert IndexTimesteps([7, 999], finite={"class_labels": [2, 0, 1]})(graph_module).modified
    assert unchanged(IndexTimesteps([7, 999], finite={"class_labels": [2, 0, 1]}), graph_module)
    columns = row_columns(graph_module)
    assert columns["timestep"].tolist() == [7, 7, 7, 999, 999, 999]
    assert columns["class_labels"].tolist() == [2, 0, 1, 2, 0, 1]
    graph_module.graph.output_node().args = (find_row(graph_module),)
    graph_module.recompile()
    assert graph_module(*model.example_inputs((7, 999))).tolist() == [1, 5]  # labels 0 and 1
    assert find_temporal_block(graph_module).finite == ("class_labels",)


def test_a_further_input_must_be_a_tensor_with_values():
    graph_module = build_temporal_graph(TimePath(class_embedding="table")).graph_module
    with pytest.raises(PassError, match="no input named 'labels'"):
        IndexTimesteps([7], finite={"labels": [0]})(graph_module)
    with pytest.raises(PassError, match="finite input 'class_labels' has no values"):
        IndexTimesteps([7], finite={"class_labels": []})(graph_module)
