"""Observers by timestep group, and the fake quantizer that is made from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx import CalibrationError
from tfmq_fx.fake_quantizers import GroupedQuantizer
from tfmq_fx.observers import (
    EMAMinMaxObserver,
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    MSEObserver,
)

SPEC = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 15, "qscheme": torch.per_tensor_affine}
ALL = [GroupedEMAObserver, GroupedMinMaxObserver, GroupedMSEObserver]


def batches(seed, count=3, rows=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 5, 7, generator=generator) * (1 + step) for step in range(count)]


def parameters(observer):
    return [value.tolist() for value in observer.calculate_qparams()]


@given(st.integers(0, 2**31))
def test_one_group_is_the_observer_without_groups(seed):
    grouped, plain = GroupedEMAObserver(1, 4), EMAMinMaxObserver(**SPEC)
    for x in batches(seed):
        assert grouped(x, torch.zeros(len(x), dtype=torch.int64)) is x
        plain(x)
    assert parameters(grouped) == parameters(plain)


def test_one_group_of_the_search_is_the_search():
    grouped, plain = GroupedMSEObserver(1, 4), MSEObserver(**SPEC)
    for x in batches(0, rows=500):
        grouped(x, torch.zeros(len(x), dtype=torch.int64))
        plain(x)
    assert float(grouped.counts.sum()) == float(plain.counts.sum())
    # Values on the edge of two bins may fall into either.
    for got, want in zip(grouped.observed_ranges(), plain.observed_range(), strict=True):
        assert float(got) == pytest.approx(float(want), rel=0.02)


@pytest.mark.parametrize("make", ALL)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(6)))
def test_mixed_batches_are_the_groups_apart(make, seed, order):
    """A group's parameters are those of an observer that sees this group's items alone, in whatever order they lie."""
    groups = torch.tensor([0, 2, 2, 0, 1, 2])[list(order)]
    mixed = make(3, 4)
    for x in batches(seed):
        mixed(x, groups)
    for group in range(3):
        alone = make(1, 4)
        for x in batches(seed):
            items = x[groups == group]
            alone(items, torch.zeros(len(items), dtype=torch.int64))
        assert [values[group] for values in parameters(mixed)] == [value for (value,) in parameters(alone)]


def test_smoothing_counts_the_batches_in_which_a_group_occurs():
    observer = GroupedEMAObserver(2, 8, momentum=0.5)
    observer(torch.tensor([[0.0, 8.0]]), torch.tensor([1]))
    observer(torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    observer(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    low, high = observer.observed_ranges()
    # (0.5 * 0.5 * 8 + 0.5 * 2) / (1 - 0.25), as without the batch between them.
    assert high.tolist() == pytest.approx([5.0, 4.0]) and low.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", ALL)
def test_a_group_without_samples_takes_the_nearest(make):
    observer = make(6, 8)
    observer(torch.tensor([[-1.0, 1.0], [-4.0, 4.0]]), torch.tensor([1, 4]))
    scale, zero = observer.calculate_qparams()
    assert scale.tolist() == [scale[1]] * 3 + [scale[4]] * 3 and scale[4] > scale[1]
    assert zero.tolist() == [zero[1]] * 3 + [zero[4]] * 3


@pytest.mark.parametrize("make", ALL)
def test_an_observer_that_saw_nothing_says_so(make):
    observer = make(3, 8)
    observer(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(CalibrationError, match="never observed"):
        observer.calculate_qparams()


def test_the_search_clips_outliers_group_by_group():
    observer = GroupedMSEObserver(2, 3)
    clean = torch.linspace(-1, 1, 1000)
    observer(torch.stack([clean, torch.cat([clean[:-1], torch.tensor([4.0])])]), torch.tensor([0, 1]))
    _, high = observer.observed_ranges()
    assert float(high[0]) == pytest.approx(1.0, abs=0.1) and float(high[1]) < 4.0


def test_the_fake_quantizer_has_parameters_by_group_and_learns_its_steps():
    observer = GroupedMinMaxObserver(2, 8)
    x = torch.stack([torch.linspace(-1, 1, 9), 100 * torch.linspace(-1, 1, 9)])
    groups = torch.tensor([1, 0])
    observer(x, groups)
    quantizer = GroupedQuantizer(observer)
    assert float(((quantizer(x, groups) - x).abs().amax(1) / x.abs().amax(1)).max()) < 1 / 127
    assert torch.equal(quantizer(x[1:], groups[1:]), quantizer(x, groups)[1:])
    step = quantizer.learn_step()
    quantizer(x[:1], groups[:1]).square().sum().backward()
    assert step.shape == (2,) and float(step.grad[0]) == 0.0 and float(step.grad[1]) != 0.0
    with torch.no_grad():
        step[1] += 0.5
    before = quantizer.scale.clone()
    quantizer.keep_step()
    assert torch.allclose(quantizer.scale, before * torch.tensor([0.0, 0.5]).exp())
    quantizer.forget_step()
    assert torch.equal(quantizer.scale, before)
    quantizer.enabled = False
    assert quantizer(x, groups) is x
