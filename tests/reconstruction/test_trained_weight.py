"""Weights that learn through their rounding start where they were rounded to, and end as integers."""

import pytest
import torch

from tests.weight_cases import adaround, generator
from tfmq_fx.reconstruction.trained_weight import AdaptedWeight, WholeWeight


def started(axis=0):
    """A quantizer whose weights were rounded to more than the nearest integers."""
    weight = torch.randn(6, 4, 3, 3, generator=generator(0))
    quantizer, _ = adaround(weight, 4, False, axis=axis)
    scale = quantizer.scale.reshape([-1 if i == axis else 1 for i in range(4)])
    steps = (torch.arange(36).reshape(4, 3, 3) % 3 == 0).float()
    quantizer.put((quantizer.dequantized() / scale).round() + steps)
    return weight, quantizer


KINDS = {"adapted": lambda quantizer: AdaptedWeight(quantizer, 2, generator(1)), "whole": WholeWeight}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_where_a_weight_was_rounded_to_and_gradients_pass(kind, axis):
    weight, quantizer = started(axis)
    rounded = quantizer.dequantized()
    with KINDS[kind](quantizer) as trained:
        soft = trained.soft()
        assert soft.shape == weight.shape and torch.allclose(soft, rounded, atol=1e-6)
        soft.square().sum().backward()
        assert trained.variables[-1].grad.abs().sum() > 0
        assert trained.log_scale is None or trained.log_scale.grad.abs().min() > 0
    assert torch.allclose(quantizer.dequantized(), rounded, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_kept_as_integers(kind, axis):
    _, quantizer = started(axis)
    rounded = quantizer.dequantized()
    with KINDS[kind](quantizer) as trained, torch.no_grad():
        trained.variables[-1] += torch.randn(trained.variables[-1].shape, generator=generator(2))
        if trained.log_scale is not None:
            trained.log_scale += 0.3 * torch.randn(trained.log_scale.shape, generator=generator(3))
        moved = trained.soft()
    assert torch.allclose(quantizer.dequantized(), moved, atol=1e-5) and not torch.allclose(moved, rounded, atol=1e-2)
    integers, _ = quantizer.quantize()
    assert integers.dtype == torch.int8


def test_an_error_leaves_the_quantizer_as_it_was():
    _, quantizer = started()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with pytest.raises(ZeroDivisionError), WholeWeight(quantizer) as trained:
        with torch.no_grad():
            trained.moved += 2.0
            trained.log_scale += 1.0
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_a_bfloat16_weight_stays_one():
    weight = torch.randn(4, 3, generator=generator(0)).bfloat16()
    quantizer, _ = adaround(weight, 8, True)
    assert WholeWeight(quantizer).soft().dtype == torch.bfloat16
