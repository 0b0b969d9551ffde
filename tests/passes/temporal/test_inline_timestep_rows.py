import pytest
import torch

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import IndexTimesteps, InlineTimestepRows, TabulateTemporalBlock
from tfmq_fx.passes.analysis import find_row
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.testing import TimePath, assert_pass_contract, build_temporal_graph

VALUES = [999, 500, 7, 3]


def row_model(unknown="error", **path):
    """A model that returns the table row of its timestep."""
    model = build_temporal_graph(TimePath(**path))
    IndexTimesteps(VALUES, timestep=model.path.timestep_name, unknown=unknown)(model.graph_module)
    model.graph_module.graph.output_node().args = (find_row(model.graph_module),)
    model.graph_module.recompile()
    return model


@pytest.mark.parametrize("unknown", ["error", "nearest"])
@pytest.mark.parametrize("scalar", [False, True])
def test_fires(unknown, scalar):
    model = row_model(unknown, scalar_timestep=scalar)
    assert InlineTimestepRows()(model.graph_module).modified
    assert operators(model.graph_module)[ROW_OP] == 0
    assert model.graph_module(*model.example_inputs((7, 500))).tolist() == (2 if scalar else [2, 1])


def test_does_not_fire_without_a_lookup():
    assert unchanged(InlineTimestepRows(), build_temporal_graph(TimePath()).graph_module)


@pytest.mark.parametrize("unknown", ["error", "nearest"])
def test_numerics(unknown):
    model = row_model(unknown, dynamic_batch=True)
    more = [model.example_inputs((3,), batch=1), model.example_inputs(VALUES, batch=7)]
    assert_pass_contract(InlineTimestepRows, model.graph_module, model.example_inputs(), exact=True, more_inputs=more)


def test_an_unknown_timestep_leaves_the_table_or_takes_the_nearest_row():
    for unknown, rows in (("error", [4, 2]), ("nearest", [1, 2])):
        model = row_model(unknown)
        InlineTimestepRows()(model.graph_module)
        assert model.graph_module(*model.example_inputs((600, 7))).tolist() == rows
    model = build_temporal_graph(TimePath())
    for rewrite in (IndexTimesteps(VALUES), TabulateTemporalBlock(), InlineTimestepRows()):
        rewrite(model.graph_module)
    with pytest.raises((IndexError, RuntimeError)):
        model.graph_module(*model.example_inputs((600, 7)))


def test_several_users_read_the_row():
    model = build_temporal_graph(TimePath(blocks=2, scale_shift=True, return_embedding=True))
    for rewrite in (IndexTimesteps(VALUES), TabulateTemporalBlock()):
        rewrite(model.graph_module)
    row = find_row(model.graph_module)
    model.graph_module.graph.output_node().args = ((model.graph_module.graph.output_node().args[0], row, row),)
    model.graph_module.recompile()
    assert_pass_contract(InlineTimestepRows, model.graph_module, model.example_inputs(), exact=True)


def test_rows_of_several_inputs():
    model = build_temporal_graph(TimePath(class_embedding="table"))
    IndexTimesteps(VALUES, finite={"class_labels": [1, 0]})(model.graph_module)
    model.graph_module.graph.output_node().args = (find_row(model.graph_module),)
    model.graph_module.recompile()
    InlineTimestepRows()(model.graph_module)
    assert operators(model.graph_module)[ROW_OP] == 0
    sample, labels, steps = model.example_inputs((7, 500))
    assert model.graph_module(sample, labels, steps).tolist() == [5, 2]
    # Whichever input is unknown, the row lies behind the last.
    unknown_label = model.graph_module(sample, torch.tensor([0, 2]), steps).tolist()
    unknown_step = model.graph_module(sample, labels, torch.tensor([600, 500])).tolist()
    assert unknown_label[0] == 5 and unknown_label[1] >= 8
    assert unknown_step[0] >= 8 and unknown_step[1] == 2
