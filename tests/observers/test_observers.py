import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx import CalibrationError
from tfmq_fx.observers import EMAMinMaxObserver, MSEObserver, PerChannelWeightObserver, TimestepObserver
from tfmq_fx.observers.ranges import asymmetric_parameters, fake_quantize, search_asymmetric, symmetric_parameters

SPEC = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(finite, finite, st.integers(2, 8))
def test_zero_is_always_representable_and_zero_points_are_integers_in_range(a, b, bits):
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    scale, zero = asymmetric_parameters(low, high, 0, 2**bits - 1)
    assert zero.dtype == torch.int64 and 0 <= int(zero) < 2**bits and float(scale) > 0
    assert float(fake_quantize(torch.zeros(1), scale, zero, 0, 2**bits - 1)) == 0.0


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_error_is_at_most_half_a_scale_where_nothing_is_clipped(seed, bits):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    scale, zero = asymmetric_parameters(x.min()[None], x.max()[None], 0, 2**bits - 1)
    error = (fake_quantize(x, scale, zero, 0, 2**bits - 1) - x).abs().max()
    # The zero point is rounded, so an end of the range may be clipped by up to half a step more.
    assert float(error) <= 1.001 * float(scale)


def test_symmetric_parameters():
    scale, zero = symmetric_parameters(torch.tensor([-2.0]), torch.tensor([1.0]), 127)
    assert float(scale) == pytest.approx(2 / 127) and int(zero) == 0


def test_search_clips_an_outlier_at_low_width_and_keeps_the_range_at_high_width():
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([4.0])])[None]
    low, high = x.amin(1), x.amax(1)
    narrow = search_asymmetric(x, low, high, 0, 7)
    assert float(narrow[1]) < 4.0
    clean = torch.linspace(-1, 1, 1000)[None]
    assert float(search_asymmetric(clean, clean.amin(1), clean.amax(1), 0, 255)[1]) == pytest.approx(1.0, abs=0.02)


def test_ema_is_bias_corrected():
    observer = EMAMinMaxObserver(**SPEC)
    for _ in range(3):
        observer(torch.tensor([-1.0, 3.0]))
    low, high = observer.observed_range()
    assert float(low) == pytest.approx(-1.0) and float(high) == pytest.approx(3.0)


def test_ema_weighs_no_batch_for_being_first():
    observer = EMAMinMaxObserver(momentum=0.5, **SPEC)
    observer(torch.tensor([0.0, 8.0]))
    observer(torch.tensor([0.0, 2.0]))
    # (0.5 * 0.5 * 8 + 0.5 * 2) / (1 - 0.25)
    assert float(observer.observed_range()[1]) == pytest.approx(4.0)


@pytest.mark.parametrize("make", [EMAMinMaxObserver, MSEObserver])
def test_an_observer_that_saw_nothing_says_so(make):
    with pytest.raises(CalibrationError, match="never observed"):
        make(**SPEC).calculate_qparams()


def test_mse_observer_equals_the_search_on_the_values_themselves():
    torch.manual_seed(0)
    batches = [torch.randn(4096) * s for s in (1.0, 3.0, 0.5)]
    observer = MSEObserver(**{**SPEC, "quant_max": 15})
    for x in batches:
        observer(x)
    everything = torch.cat(batches)[None]
    expected = search_asymmetric(everything, everything.amin(1), everything.amax(1), 0, 15)
    for got, want in zip(observer.observed_range(), expected, strict=True):
        assert float(got) == pytest.approx(float(want), rel=0.05)


def test_mse_observer_of_a_constant():
    observer = MSEObserver(**SPEC)
    observer(torch.zeros(10))
    scale, zero = observer.calculate_qparams()
    assert torch.isfinite(scale).all() and int(zero) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7])
def test_asymmetric_weights_fold_into_int8_without_a_change(bits):
    torch.manual_seed(bits)
    weight = torch.randn(6, 5, 3, 3) + torch.linspace(-1, 1, 6)[:, None, None, None]
    observer = PerChannelWeightObserver(bits=bits, symmetric=False, search=False)
    observer(weight)
    scale, zero = observer.calculate_qparams()
    shape = (-1, 1, 1, 1)
    expected = fake_quantize(weight, scale.reshape(shape), zero.reshape(shape), 0, 2**bits - 1)
    integers, _ = observer.quantize()
    assert integers.dtype == torch.int8
    assert torch.equal(observer.dequantized(), expected)


def test_the_weight_search_beats_min_max():
    torch.manual_seed(0)
    weight = torch.randn(8, 256)
    errors = []
    for search in (False, True):
        observer = PerChannelWeightObserver(bits=4, symmetric=False, search=search)
        observer(weight)
        errors.append(float((observer.dequantized() - weight).abs().pow(2.4).mean()))
    assert errors[1] < errors[0]


@given(st.permutations(range(5)), st.integers(0, 2**31))
def test_the_order_within_a_step_does_not_matter(order, seed):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([0, 1, 0, 2, 1])
    straight, shuffled = TimestepObserver(3, 8), TimestepObserver(3, 8)
    straight(x, rows)
    for i in order:
        shuffled(x[i : i + 1], rows[i : i + 1])
    for a, b in zip(straight.calculate_qparams(), shuffled.calculate_qparams(), strict=True):
        assert torch.equal(a, b)


def test_a_timestep_that_was_never_seen_is_an_error():
    observer = TimestepObserver(3, 8)
    observer(torch.randn(2, 4), torch.tensor([0, 2]))
    with pytest.raises(CalibrationError, match="1 of 3 timesteps"):
        observer.calculate_qparams()


def test_each_row_is_quantized_with_its_own_parameters():
    observer = TimestepObserver(2, 8)
    x = torch.stack([torch.linspace(-1, 1, 9), 100 * torch.linspace(-1, 1, 9)])
    rows = torch.tensor([1, 0])
    observer(x, rows)
    relative = ((observer.fake_quantize(x, rows) - x).abs().amax(1)) / x.abs().amax(1)
    assert float(relative.max()) < 1 / 127
