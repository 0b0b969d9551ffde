import math
import re

import pytest
import torch

from tfmq_fx.errors import ConfigError, TimestepError
from tfmq_fx.passes.support.timestep_values import ValueSearch, as_captured, distinct_timesteps

#: The noise levels of a schedule that ends small, as EDM's do.
SIGMAS = [80.0, 10.0, 1.0, 0.1, 0.02, 0.002, 0.0002, 1e-5, 0.0]


def search(values):
    return ValueSearch(torch.tensor(values, dtype=torch.float64))


def found(values, timesteps, dtype=torch.float64):
    rows, known = search(values).find(torch.tensor(timesteps, dtype=dtype))
    return [row if k else None for row, k in zip(rows.tolist(), known.tolist(), strict=True)]


@pytest.mark.parametrize("sigma", [0.0021, 0.00025, 8e-5, 0.0199, 1.001e-5, 1e-6, 1e-30, -1e-5])
def test_a_small_timestep_is_not_that_of_its_neighbour(sigma):
    assert found(SIGMAS, [sigma]) == [None]
    with pytest.raises(TimestepError, match=f"timestep {sigma:g} is not in the table of 9 timesteps"):
        search(SIGMAS).rows(torch.tensor([sigma]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_of_a_table_over_seven_decades_is_found_and_so_is_zero(dtype):
    assert found(SIGMAS, SIGMAS, dtype) == list(range(9))
    assert found(SIGMAS, [-0.0], dtype) == [8]


def test_float32_and_float64_compute_the_same_timestep():
    table = torch.linspace(0, 999, 50, dtype=torch.float64)
    rows, known = ValueSearch(table).find(torch.linspace(0, 999, 50))
    assert bool(known.all()) and rows.tolist() == list(range(50))
    assert found(SIGMAS, [sigma * (1 + sign * 2**-19) for sigma in SIGMAS for sign in (1, -1)]) == [
        row for row in range(9) for _ in range(2)
    ]
    assert found(SIGMAS, [sigma * (1 + 2**-17) for sigma in SIGMAS[:-1]]) == [None] * 8


def test_no_tolerance_reaches_beyond_a_quarter_of_the_gap():
    near = [1000.0, 1000.001]
    assert found(near, [1000.0002, 1000.0004, 1000.0006, 1000.0008]) == [0, None, None, 1]
    assert found([2.0**24, 2.0**24 + 1], [2.0**24 + 1, 2.0**24 + 0.5]) == [1, None]


@pytest.mark.parametrize(("dtype", "blurred"), [(torch.bfloat16, 980.0), (torch.float16, 0.98095703125)])
def test_a_rounded_timestep_is_held_against_rounded_values(dtype, blurred):
    """Pipelines of bfloat16 models round the timestep: 981 becomes 980, and the model computes with 980."""
    scale = 1.0 if blurred > 1 else 1000.0
    schedule = [t / scale for t in range(981, 0, -20)]
    rounded = torch.tensor(schedule).to(dtype)
    assert float(rounded[0]) == blurred
    assert found(schedule, rounded.tolist(), dtype) == list(range(50))
    assert found(schedule, [blurred]) == [None]
    # A graph that takes float32 computes with another timestep than the table's; one of this dtype with the same.
    assert search(schedule).rows(rounded, captured=dtype).tolist() == list(range(50))
    with pytest.raises(TimestepError, match=r"rounds timesteps: pass it in float32, or quantize with timesteps="):
        search(schedule).rows(rounded, captured=torch.float32)
    assert search(schedule).rows(torch.tensor(schedule), captured=dtype).tolist() == list(range(50))


def test_values_that_a_dtype_cannot_tell_apart_hold_nothing():
    assert found([981.0, 979.0], [980.0], torch.bfloat16) == [None]
    assert found([981.0, 979.0, 900.0], [900.0], torch.bfloat16) == [2]
    with pytest.raises(
        TimestepError, match=r"timestep 980 in bfloat16 is not in the table of 2 timesteps \(nearest: 9"
    ):
        search([981.0, 979.0]).rows(torch.tensor([980.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("unknown", ["error", "nearest"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_row_and_is_near_none(unknown, value):
    rows, known = search(SIGMAS).nearest(torch.tensor([value, 1.0]))
    assert known.tolist() == [False, True] and rows.tolist() == [9, 2]
    with pytest.raises(TimestepError, match=f"timestep {value:g} is no finite number"):
        search(SIGMAS).rows(torch.tensor([1.0, value]), unknown)


def test_nearest_takes_the_first_of_two_equally_near_rows():
    rows, known = search([0.0, 4.0, 2.0]).nearest(torch.tensor([1.0, 3.0, 100.0, -100.0]))
    assert bool(known.all()) and rows.tolist() == [0, 1, 1, 0]


def test_the_ends_of_what_a_table_can_be():
    assert found([0.0], [0.0, 1e-30, 5.0]) == [0, None, None]
    assert found([7.0], [7.0, 7.1]) == [0, None]
    assert found([5.0, 5.0, 3.0], [5.0, 3.0]) == [None, 2]
    many = torch.arange(200_000, dtype=torch.float64) / 7
    rows, known = ValueSearch(many).find(many[::40_000].float())
    assert bool(known.all()) and rows.tolist() == list(range(0, 200_000, 40_000))
    rows, known = ValueSearch(many).find(torch.empty(0, 3))
    assert rows.shape == known.shape == (0, 3)


def test_numbers_that_look_alike_are_told_apart_in_the_message():
    with pytest.raises(TimestepError, match=r"timestep 1000\.0004 .*nearest: 1000\)"):
        search([1000.0, 1000.001]).rows(torch.tensor(1000.0004, dtype=torch.float64))


def test_distinct_timesteps_are_kept_in_order_and_in_full_precision():
    assert distinct_timesteps([908.18, 3, 908.18, 0]).tolist() == [908.18, 3.0, 0.0]
    assert distinct_timesteps(torch.tensor([[3, 7], [7, 3]])).tolist() == [3.0, 7.0]
    assert distinct_timesteps(torch.tensor([980.0], dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-40, 1e39])
def test_a_table_of_numbers_that_no_float32_holds_is_refused(value):
    with pytest.raises(ConfigError, match=re.escape(f"{value:g} cannot stand in a table")):
        distinct_timesteps([1.0, value])


def test_values_are_never_truncated():
    assert as_captured(torch.tensor([3.0, 7.0]), torch.int64).tolist() == [3, 7]
    assert as_captured(torch.tensor([3.5]), torch.float32).tolist() == [3.5]
    with pytest.raises(ConfigError, match=r"t 3\.5 is fractional, but the graph takes int64: capture"):
        as_captured(torch.tensor([3.0, 3.5]), torch.int64, "t")
