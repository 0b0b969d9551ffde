"""The integer program against all choices there are."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx.search.solve import least, solve, total


def best(objective, bounded, limit):
    """The least objective within the limit, by trying everything; None where nothing is."""
    choices = product(*(range(len(values)) for values in objective))
    within = [choice for choice in choices if total(bounded, choice) <= limit]
    return min((total(objective, choice) for choice in within), default=None)


NUMBERS = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))


@st.composite
def programs(draw):
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    rows = [[torch.tensor(draw(st.lists(NUMBERS, min_size=n, max_size=n)), dtype=torch.float64) for n in lengths]
            for _ in range(2)]  # fmt: skip
    return rows[0], rows[1], draw(st.floats(0.0, 1.2)) * total(rows[1], least([-values for values in rows[1]]))


@given(programs())
def test_the_best_choice_is_found(program):
    objective, bounded, limit = program
    found, expected = solve(objective, bounded, limit), best(objective, bounded, limit)
    if expected is None:
        assert found is None
        return
    assert found is not None and total(bounded, found) <= limit * (1 + 1e-9)
    # What uses the last millionth of the room may be passed over.
    room = limit - total(bounded, least(bounded))
    almost = best(objective, bounded, limit - 1e-5 * room)
    assert total(objective, found) <= max(expected, almost if almost is not None else expected) + 1e-6 * max(
        float(values.max()) for values in objective
    )


def test_an_infinite_error_is_never_chosen():
    objective = [torch.tensor([torch.inf, 3.0]), torch.tensor([1.0, 0.0])]
    bounded = [torch.tensor([0.0, 5.0]), torch.tensor([1.0, 2.0])]
    assert solve(objective, bounded, 7.0) == [1, 1]
    assert solve(objective, bounded, 6.0) == [1, 0]
    assert solve(objective, bounded, 5.9) is None
    assert solve([torch.tensor([torch.inf])], [torch.tensor([0.0])], 1.0) is None


def test_of_equally_cheap_ones_the_better_is_taken_where_nothing_is_left_to_spend():
    objective, bounded = [torch.tensor([2.0, 1.0, 0.0])], [torch.tensor([4.0, 4.0, 9.0])]
    assert solve(objective, bounded, 4.0) == [1]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_unit_does_not_matter(scale):
    objective = [torch.tensor([4.0, 1.0, 0.0]) * scale, torch.tensor([3.0, 2.5, 0.0]) * scale]
    bounded = [torch.tensor([1.0, 2.0, 4.0]) * scale, torch.tensor([1.0, 2.0, 5.0]) * scale]
    assert solve(objective, bounded, 4.5 * scale) == [1, 1]
    assert solve(objective, bounded, 7.5 * scale) == [1, 2]
