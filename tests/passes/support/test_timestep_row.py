import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tfmq_fx.errors import TimestepError
from tfmq_fx.passes.support.timestep_row import check_timesteps, timestep_row

VALUES = torch.tensor([999.0, 500.0, 3.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_rows_are_found_by_value(dtype):
    rows = timestep_row(torch.tensor([0, 999, 3, 3], dtype=dtype), VALUES, "error")
    assert rows.dtype == torch.int64 and rows.tolist() == [3, 0, 2, 2]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
def test_the_shape_is_that_of_the_timestep(shape):
    rows = timestep_row(torch.full(shape, 500), VALUES, "error")
    assert rows.shape == shape and bool((rows == 1).all())


def test_an_unknown_timestep_is_named_with_its_neighbour_and_a_way_out():
    with pytest.raises(TimestepError, match=r"timestep 501 .* \(nearest: 500\); quantize with it in timesteps="):
        timestep_row(torch.tensor([999, 501, 7]), VALUES, "error")
    with pytest.raises(TimestepError, match="timestep 501 "):
        timestep_row(torch.tensor(501), VALUES, "error")


def test_nearest_takes_the_closest_row():
    assert timestep_row(torch.tensor([1000, 400, 2, 1, -7]), VALUES, "nearest").tolist() == [0, 1, 2, 3, 3]


def test_the_same_timestep_in_another_precision_has_its_row():
    off = torch.tensor([999.0 * (1 + 2**-19), 3.0 * (1 - 2**-19), 0.0], dtype=torch.float64)
    assert timestep_row(off, VALUES, "error").tolist() == [0, 2, 3]
    for other in (1e-6, 999.2, 3.0001):
        with pytest.raises(TimestepError, match="is not in the table"):
            check_timesteps(torch.tensor([other]), VALUES)


def test_not_a_number_is_not_in_the_table():
    for unknown in ("error", "nearest"):
        with pytest.raises(TimestepError, match="nan"):
            timestep_row(torch.tensor([3.0, float("nan")]), VALUES, unknown)


def test_the_fake_value_has_the_shape_of_the_timestep():
    with FakeTensorMode():
        row = timestep_row(torch.empty(3, dtype=torch.float32), torch.empty(4, dtype=torch.float64), "error")
    assert row.shape == (3,) and row.dtype == torch.int64


def test_the_operator_keeps_its_promises_to_the_compiler():
    torch.library.opcheck(timestep_row, (torch.tensor([3, 0]), VALUES, "error"))
