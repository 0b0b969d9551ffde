"""The search by value: at most one row, the right one, and the same when it is written out in a graph."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx.passes import IndexTimesteps, InlineTimestepRows
from tfmq_fx.passes.analysis import find_row
from tfmq_fx.passes.support.timestep_values import FLOAT32, GAP_SHARE, ValueSearch, is_low
from tfmq_fx.testing import GraphBuilder

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
#: What tables hold: whole timesteps, those of a fractional schedule, noise levels over many decades, either sign, zero.
VALUE = st.one_of(
    st.integers(-1000, 1000).map(float),
    st.floats(0, 1000, width=32).filter(lambda v: v == 0 or v > 1e-30),
    st.builds(lambda sign, exponent: sign * 10**exponent, st.sampled_from([1, -1]), st.floats(-30, 4)),
    st.just(0.0),
)
#: What else may come: anything at all.
ANYTHING = st.one_of(VALUE, st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.4e-45]))


@st.composite
def searches(draw):
    """A table, and timesteps of one dtype on, beside and far from its values."""
    values = draw(st.lists(VALUE, min_size=1, max_size=12, unique=True))
    beside = st.builds(
        lambda value, steps, power: value * (1 + steps * 2.0**power),
        st.sampled_from(values),
        st.integers(-3, 3),
        st.sampled_from([-52, -24, -20, -19, -18, -17, -11, -8, -7]),
    )
    middle = st.builds(lambda a, b, share: a + (b - a) * share, st.sampled_from(values), st.sampled_from(values),
                       st.sampled_from([0.2499999, 0.25, 0.2500001, 0.5]))  # fmt: skip
    asked = draw(st.lists(st.one_of(st.sampled_from(values), beside, middle, ANYTHING), min_size=1, max_size=12))
    dtype = draw(st.sampled_from(DTYPES))
    timesteps = torch.tensor(asked, dtype=torch.float64)
    if not dtype.is_floating_point:
        timesteps = timesteps.nan_to_num(0, 0, 0).clamp(-(2**31), 2**31 - 1)
    return torch.tensor(values, dtype=torch.float64), timesteps.to(dtype)


def as_seen(values, dtype):
    """The values as a timestep of this type is held against them."""
    return (values.to(dtype).double() if is_low(dtype) else values).tolist()


def naive(values, timestep):
    """The definition, one timestep and one row after the other."""
    held = []
    for row, value in enumerate(values):
        gap = min((abs(value - other) for index, other in enumerate(values) if index != row), default=math.inf)
        if gap and abs(timestep - value) <= min(abs(value) * FLOAT32, gap * GAP_SHARE):
            held.append(row)
    return held


def written_out(values, timesteps, unknown):
    """The row of each timestep from a graph in which the lookup is written out in ATen operators."""
    builder = GraphBuilder()
    t = builder.placeholder("timestep", tuple(timesteps.shape), timesteps.dtype)
    graph_module = builder.build(t)
    IndexTimesteps(values, unknown=unknown)(graph_module)
    graph_module.graph.output_node().args = (find_row(graph_module),)
    InlineTimestepRows()(graph_module)
    graph_module.recompile()
    return graph_module(timesteps)


@given(searches())
def test_the_search_is_its_definition(case):
    values, timesteps = case
    rows, known = ValueSearch(values).find(timesteps)
    for timestep, row, there in zip(timesteps.double().tolist(), rows.tolist(), known.tolist(), strict=True):
        held = naive(as_seen(values, timesteps.dtype), timestep)
        assert len(held) <= 1
        assert there == bool(held) and row == (held[0] if held else len(values))


@given(searches())
def test_a_row_that_holds_a_timestep_is_the_nearest_and_nearest_is_the_closest(case):
    values, timesteps = case
    search = ValueSearch(values)
    held, known = search.find(timesteps)
    rows, finite = search.nearest(timesteps)
    assert torch.equal(held[known], rows[known])
    for timestep, row, near in zip(timesteps.double().tolist(), rows.tolist(), finite.tolist(), strict=True):
        distances = [abs(timestep - value) for value in as_seen(values, timesteps.dtype)]
        assert near == any(distance <= torch.finfo(torch.float32).max for distance in distances)
        assert row == (distances.index(min(distances)) if near else len(values))


@given(searches(), st.sampled_from(["error", "nearest"]))
def test_a_lookup_in_a_graph_is_the_search(case, unknown):
    values, timesteps = case
    search = ValueSearch(values)
    wanted, _ = search.find(timesteps) if unknown == "error" else search.nearest(timesteps)
    assert torch.equal(written_out(values, timesteps, unknown), wanted)


@given(searches(), st.randoms(use_true_random=False))
def test_the_order_of_the_table_means_nothing(case, shuffle):
    values, timesteps = case
    order = list(range(len(values)))
    shuffle.shuffle(order)
    one, other = ValueSearch(values), ValueSearch(values[order])
    rows, known = one.find(timesteps)
    moved, also = other.find(timesteps)
    assert torch.equal(known, also)
    assert torch.equal(values[rows[known]], values[order][moved[known]])


@given(searches())
def test_every_value_is_found_in_every_float_that_tells_it_from_the_others(case):
    values, _ = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        held = values.to(dtype)
        rows, known = ValueSearch(values).find(held)
        alone = torch.tensor([int((held == value).sum()) == 1 for value in held])
        assert torch.equal(rows[known], torch.arange(len(values))[known])
        # A value that float16 rounds to infinity is no timestep, and one that float32 moves too far is another.
        if is_low(dtype) or dtype == torch.float64:
            assert torch.equal(known, alone & held.isfinite())
