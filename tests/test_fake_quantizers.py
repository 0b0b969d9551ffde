"""Fake quantizers compute what the integers will, to the bit, and their gradients are the published ones."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.pt2e import ObserverBase

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.reconstruction_cases import calibrated
from tfmq_fx import CalibrationError
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    TimestepQuantizer,
    float_mode,
    insert_fake_quantizers,
    quantizers_of,
)
from tfmq_fx.fake_quantizers.adaround import (
    annealed_beta,
    initial_variable,
    rectified_sigmoid,
    round_loss,
    soft_weight,
)
from tfmq_fx.observers import EMAMinMaxObserver, PerChannelWeightObserver, TimestepObserver
from tfmq_fx.observers.ranges import asymmetric_parameters
from tfmq_fx.reconstruction.rounding import RoundingTrainer, StepSize

decomposed = torch.ops.quantized_decomposed


def generator(seed):
    return torch.Generator().manual_seed(seed)


def adaround(weight, bits, symmetric, search=False, axis=0):
    observer = PerChannelWeightObserver(bits, symmetric, search, axis)
    observer(weight)
    return AdaRoundQuantizer(observer, weight), observer


def aligned(values, quantizer):
    """One value per channel, to broadcast against the weight."""
    return values.reshape([-1 if i == quantizer.axis else 1 for i in range(quantizer.up.ndim)])


@st.composite
def weights(draw):
    """A quantizer of a random weight, and the observer that it came from."""
    shape = draw(st.sampled_from([(6, 5), (1, 7), (4, 3, 3, 3), (5, 2, 1, 1), (3, 4, 3)]))
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]))
    symmetric = bits >= 8 or draw(st.booleans())
    values = torch.randn(shape, generator=generator(draw(st.integers(0, 2**31)))) * draw(st.sampled_from([1e-3, 1, 50]))
    if draw(st.booleans()):
        values = values.abs()
    return adaround(values, bits, symmetric, draw(st.booleans()), draw(st.integers(0, len(shape) - 1)))


# --- weights ----------------------------------------------------------------------------------------


@given(weights())
def test_a_weight_starts_rounded_to_nearest(pair):
    quantizer, observer = pair
    assert torch.equal(quantizer(observer.weight), observer.dequantized())
    for ours, theirs in zip(quantizer.quantize(), observer.quantize(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


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
    assert torch.equal(integers, torch.where(quantizer.up, floor + 1, floor).clamp(low, high).to(integers.dtype))
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
        clear = reference.variable.abs() > 1e-2
        assert torch.equal(quantizer.up[clear], reference.variable[clear] >= 0)


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


def test_weights_that_are_trained_together_learn_what_each_learns_alone():
    def make():
        other, _ = adaround(torch.randn(4, 6, 3, 3, generator=generator(2)), 3, symmetric=False, search=True, axis=1)
        return [clipping(0, (6, 10)), other, clipping(1, (3, 8))]

    check_against_autograd(make(), compiled=False, warmup=4, iterations=12)


def test_the_compiled_step_is_the_same_step():
    check_against_autograd([clipping(3, (4, 10)), clipping(4, (2, 9))], compiled=True, warmup=2, iterations=6)


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


# --- activations ------------------------------------------------------------------------------------


def activation(seed=0, bits=8):
    observer = EMAMinMaxObserver(dtype=torch.uint8, quant_min=0, quant_max=2**bits - 1, qscheme=torch.per_tensor_affine)
    observer(torch.randn(200, generator=generator(seed)))
    return ActivationQuantizer(observer)


ROWS = torch.tensor([2, 0, 1, 2])


def temporal(seed=0, bits=8):
    observer = TimestepObserver(3, bits)
    observer(torch.randn(3, 50, generator=generator(seed)) * torch.tensor([[0.1], [1.0], [10.0]]), torch.arange(3))
    return TimestepQuantizer(observer)


def values(seed, shape=(4, 300)):
    """Values inside the range and well outside."""
    return 3 * torch.randn(shape, generator=generator(seed))


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_an_activation_is_what_the_converted_operators_compute(seed, bits):
    quantizer, x = activation(seed, bits), values(seed)
    numbers = float(quantizer.scale), int(quantizer.zero_point), 0, 2**bits - 1, torch.uint8
    expected = decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *numbers), *numbers)
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer(x.clone().requires_grad_()), expected)
    quantizer.learn_step()
    assert torch.equal(quantizer(x), expected)


@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([(4, 60), (4, 5, 6)]))
def test_a_timesteps_activation_is_what_the_converted_operators_compute(seed, bits, shape):
    quantizer, x = temporal(seed, bits), values(seed, shape)
    scale, zero = quantizer.calculate_qparams()
    numbers = scale[ROWS], zero[ROWS], 0, 0, 2**bits - 1, torch.uint8
    expected = decomposed.dequantize_per_channel(decomposed.quantize_per_channel(x, *numbers), *numbers)
    assert torch.equal(quantizer(x, ROWS), expected)
    assert torch.equal(quantizer(x.clone().requires_grad_(), ROWS), expected)
    quantizer.learn_step()
    assert torch.equal(quantizer(x, ROWS), expected)


def step_parameters(quantizer):
    """Scale and zero point to broadcast against ``[4, n]``."""
    scale, zero = quantizer.calculate_qparams()
    return (scale[ROWS][:, None], zero[ROWS][:, None]) if isinstance(quantizer, TimestepQuantizer) else (scale, zero)


def call(quantizer, x):
    return quantizer(x, ROWS) if isinstance(quantizer, TimestepQuantizer) else quantizer(x)


@pytest.mark.parametrize("make", [activation, temporal])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_gradients_pass_where_nothing_is_clipped(make, learned, bits):
    quantizer, x = make(bits=bits), values(1).requires_grad_()
    if learned:
        quantizer.learn_step()
    weight = torch.randn(x.shape, generator=generator(2))
    (call(quantizer, x) * weight).sum().backward()
    scale, zero = step_parameters(quantizer)
    level = (x.detach() * scale.reciprocal()).round() + zero
    inside = (level >= 0) & (level <= 2**bits - 1)
    assert 0 < int(inside.sum()) < x.numel()
    torch.testing.assert_close(x.grad, weight * inside, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [activation, temporal])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_gradient_of_the_step_is_that_of_lsq(make, bits):
    """Equation 3 of LSQ, times the step, because its logarithm is what learns."""
    quantizer, x = make(bits=bits), values(3)
    weight = torch.randn(x.shape, generator=generator(4))
    log_step = quantizer.learn_step()
    (call(quantizer, x) * weight).sum().backward()
    scale, zero = step_parameters(quantizer)
    ratio = x / scale
    level = ratio.round() + zero
    slope = torch.where(level < 0, -zero, torch.where(level > 2**bits - 1, 2**bits - 1 - zero, ratio.round() - ratio))
    each = (weight * slope * scale).sum(1)
    if isinstance(quantizer, TimestepQuantizer):
        expected = torch.zeros(3).index_add_(0, ROWS, each)
    else:
        expected = each.sum()[None]
    torch.testing.assert_close(log_step.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [activation, temporal])
def test_a_learned_step_is_kept_and_is_no_parameter_any_more(make):
    quantizer, x = make(), values(5)
    before, (scale, zero) = call(quantizer, x), quantizer.calculate_qparams()
    names = set(quantizer.state_dict())
    log_step = quantizer.learn_step()
    change = torch.linspace(-0.4, 0.3, len(log_step))
    log_step.data.copy_(change)
    learned = call(quantizer, x).detach()
    assert not torch.equal(learned, before)
    quantizer.keep_step()
    torch.testing.assert_close(call(quantizer, x), learned, rtol=1e-5, atol=1e-5)
    new_scale, new_zero = quantizer.calculate_qparams()
    torch.testing.assert_close(new_scale, scale * change.exp())
    assert torch.equal(new_zero, zero)
    assert set(quantizer.state_dict()) == names and not list(quantizer.parameters())
    quantizer.keep_step()  # nothing to keep
    assert torch.equal(quantizer.calculate_qparams()[0], new_scale)


def test_a_learned_step_can_be_forgotten_even_when_a_state_was_loaded():
    quantizer = activation()
    scale = quantizer.scale.clone()
    quantizer.load_state_dict({"scale": 2 * scale, "zero_point": quantizer.zero_point})
    quantizer.learn_step().data.fill_(1.0)
    quantizer.keep_step()
    quantizer.forget_step()
    assert torch.equal(quantizer.scale, scale)


def test_observing_takes_the_range_of_the_moment_alone():
    quantizer, x = activation(), torch.linspace(-0.25, 0.5, 40)
    quantizer.observing = True
    seen = quantizer(x)
    scale, zero = asymmetric_parameters(torch.tensor([-0.25]), torch.tensor([0.5]), 0, 255)
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero)
    quantizer.observing = False
    assert torch.equal(quantizer(x), seen)
    quantizer(100 * x)
    assert torch.equal(quantizer.scale, scale)


def test_observing_a_timestep_changes_its_row_alone():
    quantizer = temporal()
    low, high = quantizer.low.clone(), quantizer.high.clone()
    quantizer.observing = True
    quantizer(torch.tensor([[0.5, 2.0], [-3.0, -1.0]]), torch.tensor([2, 0]))
    assert quantizer.low.tolist() == [-3.0, float(low[1]), 0.0]
    assert quantizer.high.tolist() == [0.0, float(high[1]), 2.0]


@pytest.mark.parametrize("make", [activation, temporal])
def test_dropping_leaves_elements_as_they_are(make):
    quantizer, x = make(bits=3), values(6)
    quantized = call(quantizer, x)
    quantizer.drop = 0.5
    torch.manual_seed(0)
    mixed = call(quantizer, x)
    dropped = (mixed == x) & (quantized != x)
    assert bool((dropped | (mixed == quantized)).all())
    assert 0.4 < float(dropped.float().mean()) < 0.6
    quantizer.drop = 1.0
    assert torch.equal(call(quantizer, x), x)


# --- in a graph -------------------------------------------------------------------------------------


def observers(graph):
    return {name: module for name, module in graph.named_modules() if isinstance(module, ObserverBase)}


def test_insertion_replaces_every_observer_once_under_its_name():
    graph = calibrated(observers=True)
    before, nodes = observers(graph), [str(node) for node in graph.graph.nodes]
    kinds = {name: type(module) for name, module in before.items()}
    count = insert_fake_quantizers(graph)
    found = quantizers_of(graph)
    assert count == len(before) == len(found) and found.keys() == before.keys()
    for name, kind in kinds.items():
        expected = {PerChannelWeightObserver: AdaRoundQuantizer, TimestepObserver: TimestepQuantizer}
        assert type(found[name]) is expected.get(kind, ActivationQuantizer)
    assert [str(node) for node in graph.graph.nodes] == nodes
    assert insert_fake_quantizers(graph) == 0
    assert all(found[name] is module for name, module in quantizers_of(graph).items())


def test_insertion_into_a_graph_that_was_not_calibrated_changes_nothing():
    graph = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    before = observers(graph)
    with pytest.raises(CalibrationError, match="never observed"):
        insert_fake_quantizers(graph)
    after = observers(graph)
    assert after.keys() == before.keys() and all(after[name] is module for name, module in before.items())


@pytest.mark.parametrize("config", [{}, {"temporal": "shared"}, {"weight_bits": 8, "activation_bits": 4}])
def test_the_graph_computes_what_the_program_will(config):
    graph, inputs = calibrated(**config), batch(5, seed=9)
    program = tfmq_fx.convert(graph)
    with torch.no_grad():
        assert torch.equal(graph(*inputs), program(*inputs))


def test_in_float_mode_the_graph_is_the_float_graph():
    graph, inputs = calibrated(observers=True), batch(5, seed=9)
    with torch.no_grad():
        expected = graph(*inputs)  # observers change nothing
        torch.testing.assert_close(expected, small_denoiser()(*inputs), rtol=1e-4, atol=1e-5)
        insert_fake_quantizers(graph)
        quantizers = quantizers_of(graph)
        quantized = graph(*inputs)
        assert not torch.equal(quantized, expected)
        off = next(iter(quantizers.values()))
        off.enabled = False
        with pytest.raises(ZeroDivisionError), float_mode(quantizers.values()):
            assert torch.equal(graph(*inputs), expected)
            raise ZeroDivisionError
    assert [q for q in quantizers.values() if not q.enabled] == [off]
