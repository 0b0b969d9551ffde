"""Fake quantizers compute what the integers will, to the bit, and their gradients are the published ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.pt2e import ObserverBase

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.reconstruction_cases import calibrated
from tests.weight_cases import generator, weights
from tfmq_fx import CalibrationError
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    GroupedQuantizer,
    TimestepQuantizer,
    float_mode,
    insert_fake_quantizers,
    quantizers_of,
)
from tfmq_fx.observers import (
    EMAMinMaxObserver,
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    PerChannelWeightObserver,
    TimestepObserver,
)
from tfmq_fx.observers.ranges import asymmetric_parameters

decomposed = torch.ops.quantized_decomposed


# --- weights ----------------------------------------------------------------------------------------


@given(weights())
def test_a_weight_starts_rounded_to_nearest(pair):
    quantizer, observer = pair
    assert torch.equal(quantizer(observer.weight), observer.dequantized())
    for ours, theirs in zip(quantizer.quantize(), observer.quantize(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


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
        expected = {
            PerChannelWeightObserver: AdaRoundQuantizer,
            TimestepObserver: TimestepQuantizer,
            GroupedEMAObserver: GroupedQuantizer,
            GroupedMinMaxObserver: GroupedQuantizer,
        }
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
