import pytest
import torch

from tests.passes.helpers import unchanged
from tfmq_fx.errors import TimestepError
from tfmq_fx.passes import IndexTimesteps, SetUnknownTimesteps
from tfmq_fx.passes.analysis import find_row, row_lookups
from tfmq_fx.testing import TimePath, assert_pass_contract, build_temporal_graph

VALUES = [999, 500, 7, 3]


def row_model(unknown="error", finite=None, **path):
    """A model that returns the table row of its timestep."""
    model = build_temporal_graph(TimePath(**path))
    IndexTimesteps(VALUES, timestep=model.path.timestep_name, unknown=unknown, finite=finite)(model.graph_module)
    model.graph_module.graph.output_node().args = (find_row(model.graph_module),)
    model.graph_module.recompile()
    return model


def test_fires():
    model = row_model(timestep_name="t")
    assert SetUnknownTimesteps("nearest", timestep="t")(model.graph_module).modified
    assert model.graph_module(*model.example_inputs((8, 700))).tolist() == [2, 1]
    assert SetUnknownTimesteps("error", timestep="t")(model.graph_module).modified
    with pytest.raises(TimestepError, match="timestep 8 "):
        model.graph_module(*model.example_inputs((8, 700)))


def test_does_not_fire_where_it_is_so_or_there_is_no_table():
    assert unchanged(SetUnknownTimesteps("error"), row_model().graph_module)
    assert unchanged(SetUnknownTimesteps("nearest"), row_model("nearest").graph_module)
    assert unchanged(SetUnknownTimesteps("nearest"), build_temporal_graph(TimePath()).graph_module)
    with pytest.raises(ValueError, match="'ignore' is not supported"):
        SetUnknownTimesteps("ignore")


def test_numerics():
    model = row_model(dynamic_batch=True)
    more = [model.example_inputs((3,), batch=1), model.example_inputs(VALUES, batch=7)]
    assert_pass_contract(
        lambda: SetUnknownTimesteps("nearest"), model.graph_module, model.example_inputs(), exact=True, more_inputs=more
    )


def test_lookups_of_other_inputs_and_their_users_stay():
    model = row_model(class_embedding="table", finite={"class_labels": [1, 0]})
    SetUnknownTimesteps("nearest")(model.graph_module)
    assert [node.args[2] for node in row_lookups(model.graph_module)] == ["nearest", "error"]
    sample, labels, steps = model.example_inputs((8, 700))
    assert model.graph_module(sample, labels, steps).tolist() == [5, 2]
    with pytest.raises(TimestepError, match="class_labels 2 is not among"):
        model.graph_module(sample, torch.tensor([0, 2]), steps)
