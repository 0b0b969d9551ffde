"""Training the rounding of weights: the fused step is autograd and Adam, and nothing else."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.weight_cases import adaround, aligned, generator, weights
from tfmq_fx.fake_quantizers.adaround import (
    annealed_beta,
    initial_variable,
    rectified_sigmoid,
    round_loss,
    soft_weight,
)
from tfmq_fx.reconstruction.rounding import RoundingTrainer, StepSize


@given(weights())
def test_the_soft_weight_starts_as_the_weight_itself_where_nothing_is_clipped(pair):
    quantizer, observer = pair
    scale, zero = aligned(quantizer.scale, quantizer), aligned(quantizer.zero_point, quantizer)
    q_min, q_max = quantizer.bounds
    with RoundingTrainer([quantizer], compiled=False):
        soft = quantizer(observer.weight)
        assert soft.requires_grad
    bounded = observer.weight.clamp((q_min - zero) * scale, (q_max - zero) * scale)
    # Levels are float32 numbers of up to 2^bits, fractions go through a sigmoid and back.
    tolerance = scale * (2**quantizer.bits * 2.5e-7 + 1e-5)
    assert bool(((soft - bounded).abs() <= tolerance).all())


@given(weights(), st.integers(0, 2**31))
def test_hard_rounding_takes_one_of_the_two_neighbours_by_the_sign_of_the_variable(pair, seed):
    quantizer, observer = pair
    with RoundingTrainer([quantizer], compiled=False) as trainer:
        trainer.variable.copy_(3 * torch.randn(trainer.variable.shape, generator=generator(seed)))
        positive = trainer.variable >= 0
    moved = quantizer.up.movedim(quantizer.axis, 0)
    assert torch.equal(moved, positive.reshape(moved.shape))
    integers, scale = quantizer.quantize()
    low, high = (bound - aligned(quantizer.zero_point, quantizer) for bound in quantizer.bounds)
    floor = (observer.weight / aligned(scale, quantizer)).floor()
    assert torch.equal(integers, (floor + quantizer.up).clamp(low, high).to(integers.dtype))
    assert torch.equal(quantizer(observer.weight), integers * aligned(scale, quantizer))
    quantizer.round_to_nearest()
    assert torch.equal(quantizer.dequantized(), observer.dequantized())


def test_an_error_inside_training_leaves_the_rounding_as_it_was():
    quantizer, observer = adaround(torch.randn(4, 6, generator=generator(0)), 4, symmetric=False)
    with pytest.raises(KeyboardInterrupt), RoundingTrainer([quantizer], compiled=False) as trainer:
        trainer.variable.neg_()
        raise KeyboardInterrupt
    assert torch.equal(quantizer(observer.weight), observer.dequantized())


class AutogradAdaRound:
    """The same training by the book: autograd through the formulas, and torch's Adam."""

    def __init__(self, quantizer, rate):
        ratio = quantizer.ratio()
        self.fraction = ratio - ratio.floor()
        self.variable = initial_variable(self.fraction).requires_grad_()
        self.scale, self.zero = aligned(quantizer.scale, quantizer), aligned(quantizer.zero_point, quantizer)
        self.level, self.bounds = ratio.floor() + self.zero, quantizer.bounds
        self.adam = torch.optim.Adam([self.variable], lr=rate)

    def soft(self):
        return soft_weight(self.variable, self.level, self.scale, self.zero, *self.bounds)

    def step(self, loss, beta, round_weight):
        self.adam.zero_grad()
        (loss(self.soft()) + round_weight * round_loss(self.variable, beta)).backward()
        self.adam.step()


def check_against_autograd(quantizers, *, compiled, warmup, iterations):
    rate = 0.02
    references = [AutogradAdaRound(quantizer, rate) for quantizer in quantizers]
    targets = [torch.randn(q.up.shape, generator=generator(100 + i)) for i, q in enumerate(quantizers)]
    with RoundingTrainer(quantizers, compiled=compiled) as trainer:
        for iteration in range(iterations):
            beta = annealed_beta(iteration, iterations, 0.25, 20.0, 2.0)
            round_weight = 0.0 if iteration < warmup else 0.05
            losses = [
                lambda soft, target=target: ((soft - target).square() * (1 + target.abs())).sum() for target in targets
            ]
            sum(loss(quantizer.soft) for loss, quantizer in zip(losses, quantizers, strict=True)).backward()
            trainer.step(StepSize(rate, beta, round_weight))
            for loss, reference in zip(losses, references, strict=True):
                reference.step(loss, beta, round_weight)
        moved = 0.0
        for quantizer, reference in zip(quantizers, references, strict=True):
            # On the grid itself the slope of the clamp is a matter of rounding.
            inner = (reference.fraction > 1e-3) & (reference.fraction < 1 - 1e-3)
            ours, theirs = (soft.detach() / reference.scale for soft in (quantizer.soft, reference.soft()))
            assert quantizer.soft.grad is None
            torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-3)
            start = (reference.level + reference.fraction).clamp(*reference.bounds) - reference.zero
            moved = max(moved, float((ours - start).abs()[inner].max()))
        assert moved > 0.02, "training did not move anything: the test would show nothing"
    for quantizer, reference in zip(quantizers, references, strict=True):
        # Where both neighbours are clipped to one bound, there is no choice to compare.
        inside = (reference.level >= reference.bounds[0]) & (reference.level < reference.bounds[1])
        clear = (reference.variable.abs() > 1e-2) & inside
        assert torch.equal(quantizer.up[clear] == 1, reference.variable[clear] >= 0)


@pytest.mark.parametrize("warmup", [0, 6, 12])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True), (8, True)])
def test_the_fused_step_is_autograd_and_adam(bits, symmetric, warmup):
    weight = torch.randn(5, 4, 3, 3, generator=generator(bits))
    quantizer, _ = adaround(weight, bits, symmetric, search=True)
    check_against_autograd([quantizer], compiled=False, warmup=warmup, iterations=12)


def clipping(seed, shape, bits=3):
    """A quantizer whose range leaves out the largest weights at both ends."""
    quantizer, _ = adaround(torch.randn(shape, generator=generator(seed)), bits, symmetric=False)
    quantizer.scale *= 0.5
    level = quantizer.ratio().floor() + aligned(quantizer.zero_point, quantizer)
    assert int((level < 0).sum()) and int((level > 2**bits - 1).sum())
    return quantizer


def test_the_fused_step_passes_no_gradient_to_clipped_weights():
    quantizers = [clipping(0, (6, 40))]
    check_against_autograd(quantizers, compiled=False, warmup=3, iterations=10)


def test_clipped_weights_stay_at_their_bound_whatever_pulls():
    quantizer = clipping(0, (6, 40))
    q_min, q_max = quantizer.bounds
    zero, scale = aligned(quantizer.zero_point, quantizer), aligned(quantizer.scale, quantizer)
    level = quantizer.ratio().floor() + zero
    bound = torch.where(level < q_min, q_min, torch.where(level >= q_max, q_max, -1000))
    clipped = bound > -1000
    assert bool((bound[clipped] == q_min).any()) and bool((bound[clipped] == q_max).any())
    with RoundingTrainer([quantizer], compiled=False) as trainer:
        for sign in (1, -1, 1):
            (1e3 * sign * quantizer.soft).sum().backward()
            trainer.step(StepSize(0.5, 2.0, 0.1))
            assert torch.equal(quantizer.soft.detach()[clipped], ((bound - zero) * scale)[clipped])
    integers, _ = quantizer.quantize()
    assert torch.equal(integers[clipped], (bound - zero).expand_as(integers)[clipped].to(integers.dtype))


def test_weights_that_are_trained_together_learn_what_each_learns_alone():
    def make():
        other, _ = adaround(torch.randn(4, 6, 3, 3, generator=generator(2)), 3, symmetric=False, search=True, axis=1)
        return [clipping(0, (6, 10)), other, clipping(1, (3, 8))]

    check_against_autograd(make(), compiled=False, warmup=4, iterations=12)


def test_weights_of_different_widths_are_trained_together():
    wide, _ = adaround(torch.randn(3, 7, generator=generator(5)), 8, symmetric=True)
    wider, _ = adaround(torch.randn(3, 5, generator=generator(6)), 16, symmetric=True)
    check_against_autograd([clipping(0, (6, 10)), wide], compiled=False, warmup=4, iterations=12)
    with RoundingTrainer([clipping(0, (6, 10)), wider], compiled=False) as trainer:
        assert trainer.level.dtype is torch.int32  # what 16 bits need; each alone takes what it needs


def test_the_compiled_step_is_the_same_step():
    check_against_autograd([clipping(3, (4, 10)), clipping(4, (2, 9))], compiled=True, warmup=2, iterations=6)


def several():
    """Quantizers of one width, of different shapes."""
    shapes = [(4, 6), (3, 4), (5, 4)]
    return [adaround(torch.randn(s, generator=generator(i)), 4, symmetric=False)[0] for i, s in enumerate(shapes)]


def chain(quantizers, x):
    """A loss in which every weight's gradient depends on all the others."""
    first, *others = quantizers
    x = torch.nn.functional.linear(x, first.soft)
    outputs = [torch.nn.functional.linear(x, other.soft) for other in others]
    return sum(output.float().square().sum() for output in outputs)


def test_a_weight_that_the_loss_does_not_reach_still_feels_the_regulariser():
    quantizers = several()
    with RoundingTrainer(quantizers, compiled=False) as trainer:
        start = trainer.variable.clone()
        quantizers[0].soft.square().sum().backward()
        trainer.step(StepSize(0.02, 2.0, 0.05))
        moved = torch.split(trainer.variable != start, [q.up.numel() for q in quantizers])
        assert all(bool(part.any()) for part in moved)
        assert quantizers[0].soft.grad is None


def test_soft_weights_in_bfloat16_are_what_autocast_would_make_of_them():
    x = torch.randn(9, 6, generator=generator(5))
    learned = []
    for dtype in (torch.float32, torch.bfloat16):
        quantizers = several()
        with RoundingTrainer(quantizers, compiled=False, dtype=dtype) as trainer:
            for beta in (20.0, 8.0, 2.0):
                assert all(quantizer.soft.dtype is dtype for quantizer in quantizers)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = chain([quantizers[0], quantizers[2]], x)
                loss.backward()
                trainer.step(StepSize(0.02, beta, 0.05))
            assert trainer.variable.dtype is torch.float32
            learned.append(trainer.variable.clone())
    assert torch.equal(*learned)


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_the_variable_of_a_fraction_gives_it_back(fraction):
    assert float(rectified_sigmoid(initial_variable(torch.tensor([fraction])))) == pytest.approx(fraction, abs=2e-6)


def test_the_regulariser_is_zero_when_all_is_decided_and_largest_in_between():
    decided = torch.tensor([-9.0, 9.0, -20.0])
    assert float(round_loss(decided, 2.0)) == 0.0
    assert float(round_loss(torch.zeros(3), 2.0)) == pytest.approx(3.0)
    assert 0 < float(round_loss(torch.full((3,), 1.0), 2.0)) < float(round_loss(torch.full((3,), 1.0), 20.0)) < 3


def test_beta_stays_during_the_warm_up_then_falls_to_its_end_at_the_last_iteration():
    values = [annealed_beta(i, 100, 0.2, 20.0, 2.0) for i in range(100)]
    assert values[:21] == [20.0] * 21
    assert values[-1] == pytest.approx(2.0)
    steps = [one - other for one, other in itertools.pairwise(values[20:])]
    assert all(step == pytest.approx(18 / 79) for step in steps)
    assert [annealed_beta(i, 3, 1.0, 20.0, 2.0) for i in range(3)] == [20.0] * 3
    assert annealed_beta(0, 1, 0.0, 20.0, 2.0) == 20.0
    uneven = [annealed_beta(i, 7, 0.2, 20.0, 2.0) for i in range(7)]
    assert (
        uneven[:2] == [20.0, 20.0]
        and uneven[-1] == pytest.approx(2.0)
        and uneven[2] == pytest.approx(20 - 18 * (2 - 1.4) / (6 - 1.4))
    )
