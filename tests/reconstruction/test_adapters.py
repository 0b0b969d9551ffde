"""Adapters: all weights together, from where they were rounded to, against the float model's prediction."""

import pytest
import torch

from tests.models import batch, relative, small_denoiser
from tests.reconstruction_cases import SCALAR_BATCHES, calibrated, rec, same, state
from tests.weight_cases import adaround, generator
from tfmq_fx import ReconstructionError
from tfmq_fx.reconstruction import adapters
from tfmq_fx.reconstruction.adapters import AdaptedWeight

FOUR = {"activation_bits": 4, "low_rank": 2}
TRAINED = {"method": "adapters", "iterations": 30, "batch_size": 16, "step_learning_rate": 3e-3}


def test_training_starts_where_a_weight_was_rounded_to_and_gradients_pass():
    weight = torch.randn(6, 4, 3, 3, generator=generator(0))
    quantizer, _ = adaround(weight, 4, False)
    nearest = quantizer.dequantized()
    steps = (torch.arange(36).reshape(4, 3, 3) % 3 == 0).float()
    quantizer.put((nearest / quantizer.scale[:, None, None, None]).round() + steps)
    rounded = quantizer.dequantized()
    with AdaptedWeight(quantizer, 2, generator(1)) as adapted:
        adapted.refresh()
        assert torch.allclose(quantizer(weight), rounded, atol=1e-6)
        quantizer(weight).square().sum().backward()
        assert adapted.up.grad.abs().sum() > 0
    assert torch.equal(quantizer.dequantized(), rounded) and quantizer.soft is None
    with AdaptedWeight(quantizer, 2, generator(1)) as adapted, torch.no_grad():
        adapted.up += 3.0
        adapted.refresh()
        moved = quantizer(weight)
    assert torch.allclose(quantizer.dequantized(), moved, atol=1e-6) and not torch.equal(moved, rounded)


def test_the_whole_model_learns_on_top_of_gptq():
    graph = calibrated(**FOUR)
    whole = rec(graph, **{**TRAINED, "iterations": 200, "learning_rate": 1e-2}).units[-1]
    assert (whole.name, whole.kind, whole.iterations) == ("whole model", "whole", 200)
    assert whole.after < 0.95 * whole.before and 0 < whole.changed < 0.5
    data = batch(24, seed=3)
    other = calibrated(**FOUR)
    rec(other, method="gptq")
    with torch.no_grad():
        assert relative(graph(*data), small_denoiser()(*data)) < relative(other(*data), small_denoiser()(*data))


def test_it_is_the_same_each_time_and_goes_on_after_an_interrupt(tmp_path):
    one, two, three = (calibrated(**FOUR) for _ in range(3))
    rec(one, **TRAINED, directory=tmp_path)
    rec(two, **TRAINED)
    rec(three, **TRAINED, directory=tmp_path)
    assert same(state(one), state(two)) and same(state(one), state(three))


def test_batches_that_do_not_mix():
    graph = calibrated(scalar=True, **FOUR)
    whole = rec(graph, SCALAR_BATCHES, **TRAINED).units[-1]
    assert whole.kind == "whole" and whole.after <= whole.before


def test_what_is_not_finite_leaves_the_rounding(monkeypatch):
    monkeypatch.setattr(adapters.math, "isfinite", lambda value: False)
    graph = calibrated(**FOUR)
    with pytest.raises(ReconstructionError, match="NaN or infinite"):
        rec(graph, **TRAINED)
    data = batch(8, seed=3)
    assert torch.isfinite(graph(*data)).all()
