import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.helpers import unchanged
from tfmq_fx.passes import GroupTimesteps, IndexTimesteps, PassError
from tfmq_fx.passes.temporal.group_timesteps import find_groups, group_numbers
from tfmq_fx.testing import TimePath, assert_pass_contract, build_temporal_graph

VALUES = [999, 3, 500, 7]


def indexed(**path):
    model = build_temporal_graph(TimePath(**path))
    IndexTimesteps(VALUES)(model.graph_module)
    return model


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True), st.integers(1, 40))
def test_groups_are_contiguous_in_the_order_of_noise_and_as_equal_as_can_be(values, count):
    groups = group_numbers(torch.tensor(values, dtype=torch.float64), count)
    in_order = [group for _, group in sorted(zip(values, groups.tolist(), strict=True))]
    assert in_order == sorted(in_order)
    sizes = [in_order.count(group) for group in range(min(count, len(values)))]
    assert sum(sizes) == len(values) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("scalar", [False, True])
def test_fires_and_looks_up_by_value(scalar):
    model = indexed(scalar_timestep=scalar, batch=2)
    assert GroupTimesteps(2)(model.graph_module).modified
    node = find_groups(model.graph_module)
    assert node.meta["val"].shape == ((1,) if scalar else (2,)) and node.meta["val"].dtype == torch.int64
    model.graph_module.graph.output_node().args = (node,)
    model.graph_module.recompile()
    assert model.graph_module(*model.example_inputs((500, 7))).tolist() == ([1] if scalar else [1, 0])


def test_does_not_fire_twice():
    model = indexed()
    GroupTimesteps(2)(model.graph_module)
    assert unchanged(GroupTimesteps(3), model.graph_module)


def test_numerics():
    model = indexed(blocks=2, dynamic_batch=True)
    more = [model.example_inputs((500,), batch=1), model.example_inputs((3, 7, 999), batch=5)]
    result = assert_pass_contract(
        lambda: GroupTimesteps(3), model.graph_module, model.example_inputs(), exact=True, more_inputs=more,
        confined_to=lambda node: False,
    )  # fmt: skip
    assert result.modified


def test_the_row_keeps_its_other_users():
    model = indexed(blocks=2)
    row = next(n for n in model.graph_module.graph.nodes if "timestep_row" in str(n.target))
    users = set(row.users)
    GroupTimesteps(2)(model.graph_module)
    assert users < set(row.users)


def test_bad_input_is_named():
    with pytest.raises(PassError, match="no timestep row; run IndexTimesteps first"):
        GroupTimesteps(2)(build_temporal_graph(TimePath()).graph_module)
    with pytest.raises(ValueError, match="groups=0"):
        GroupTimesteps(0)
