"""GPTQ: as its definition says, column by column; exact integers; better than rounding to nearest on other rows."""

import pytest
import torch
from torch import fx

from tests.weight_cases import adaround, generator
from tfmq_fx import ReconstructionError
from tfmq_fx.reconstruction import gptq
from tfmq_fx.reconstruction.gptq import InputMoments, round_columns
from tfmq_fx.reconstruction.layer_inputs import grouped_weight, input_rows, takes_rows
from tfmq_fx.reconstruction.layer_rounding import LayerRounding

aten = torch.ops.aten


def correlated(rows, columns, seed=0):
    mixing = torch.randn(columns, columns, generator=generator(1)) + 1.0
    return torch.randn(rows, columns, generator=generator(seed)) @ mixing


def by_the_inverse(weight, hessian, scale, low, high, damping):
    """Algorithm 1 of the paper, with act-order, one column at a time, in float64."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = hessian.diagonal().argsort(stable=True).flip(0)
    weight, hessian = weight[:, order], hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    integers = torch.zeros_like(weight)
    for column in range(len(hessian)):
        integers[:, column] = torch.clamp((weight[:, column] / scale).round(), low, high)
        error = (weight[:, column] - integers[:, column] * scale) / inverse[column, column]
        weight[:, column:] -= error[:, None] * inverse[column, column:]
    return integers[:, order.argsort()].float()


@pytest.mark.parametrize("columns", [1, 7, 128, 300])
def test_the_integers_are_those_of_the_paper(columns):
    weight = torch.randn(5, columns, generator=generator(2))
    low, high = torch.tensor([-7.0, -7, 0, -9, -15]), torch.tensor([7.0, 8, 15, 6, 0])
    scale = weight.abs().amax(1) / 7
    moments = InputMoments(weight[None])
    moments.add(correlated(600, columns)[None], None)
    expected = by_the_inverse(weight, moments.hessian[0], scale.double(), low, high, 0.01)
    found, scales = round_columns(moments, *(x.reshape(1, 5, 1) for x in (scale, low, high)), 0.01)
    assert torch.equal(found[0], expected) and torch.equal(scales[0, :, 0], scale)


@pytest.mark.parametrize("exact", [True, False])
def test_in_float32_it_is_as_good(exact, monkeypatch):
    monkeypatch.setattr(gptq, "MOST_EXACT", 4096 if exact else 10)
    weight, rows = torch.randn(4, 60, generator=generator(3)), correlated(500, 60)
    moments = InputMoments(weight[None])
    assert moments.hessian.dtype == (torch.float64 if exact else torch.float32)
    moments.add(rows[None], None)
    scale = weight.abs().amax(1).reshape(1, 4, 1) / 7
    levels = round_columns(moments, scale, torch.full_like(scale, -7), torch.full_like(scale, 7), 0.01)[0][0]
    other, nearest = correlated(500, 60, seed=5), (weight / scale[0]).round()
    error, before = ((other @ (q * scale[0] - weight).T).square().mean() for q in (levels, nearest))
    assert error < 0.5 * before


def test_columns_that_are_never_seen_are_rounded_to_nearest():
    weight, rows = torch.randn(1, 4, 6, generator=generator(4)), torch.zeros(1, 20, 6)
    for seen in (rows, torch.cat([correlated(20, 3)[None], rows[:, :, :3]], 2)):
        moments = InputMoments(weight)
        moments.add(seen, None)
        one = torch.full((1, 4, 1), 0.2)
        levels, _ = round_columns(moments, one, -50 * one, 50 * one, 0.01)
        assert torch.equal(levels[:, :, 3:], (weight / one).round().clamp(-10, 10)[:, :, 3:])


def test_a_part_of_the_error_of_the_input_is_made_up_for():
    """With all of it and a fine grid the weights are those of least squares."""
    weight, original = torch.randn(1, 3, 8, generator=generator(6)), correlated(400, 8)[None]
    quantized = original + 0.5 * torch.randn(original.shape, generator=generator(7))
    moments = InputMoments(weight, corrected=1.0)
    moments.add(quantized, original)
    scale = torch.full((1, 3, 1), 1e-5)
    found = round_columns(moments, scale, -1e9 * scale.sign(), 1e9 * scale.sign(), 1e-9)[0] * scale
    best = torch.linalg.lstsq(quantized[0], original[0] @ weight[0].T).solution.T
    assert torch.allclose(found[0], best, atol=1e-3)


def test_each_channel_takes_the_scale_that_leaves_it_least():
    weight, rows = torch.randn(6, 40, generator=generator(8)), correlated(500, 40)[None]
    scale = (weight.abs().amax(1) / 7).reshape(1, 6, 1) * torch.tensor([0.4, 0.6, 0.8, 1.0, 1.4, 2.0]).reshape(1, 6, 1)
    low, high = torch.full_like(scale, -7), torch.full_like(scale, 7)

    def rounded(tried):
        moments = InputMoments(weight[None])
        moments.add(rows, None)
        levels, scales = round_columns(moments, scale, low, high, 1e-6, tried)
        assert bool((levels.abs() <= 7).all()) and torch.equal(levels, levels.round())
        return scales / scale, (rows @ (levels * scales - weight).mT).square().sum(1)[0]

    tried = (0.5, 1.0, 2.0)
    each = torch.stack([rounded((share,))[1] for share in tried])
    chosen, errors = rounded(tried)
    assert torch.equal(chosen[0, :, 0], torch.tensor(tried)[each.argmin(0)])
    assert torch.allclose(errors, each.amin(0)) and len(set(chosen.flatten().tolist())) > 1


def test_inputs_whose_squares_overflow_are_refused():
    moments = InputMoments(torch.ones(1, 2, 3))
    moments.add(torch.full((1, 5, 3), 1e30), None)
    moments.hessian *= float("inf")
    with pytest.raises(ReconstructionError, match="overflow"):
        round_columns(moments, *(torch.ones(1, 2, 1),) * 3, 0.01)


CONVS = [
    (aten.conv2d.default, (2, 6, 9, 8), (4, 3, 3, 2), ([2, 1], [1, 0], [1, 2], 2)),
    (aten.conv2d.default, (2, 6, 9, 8), (4, 6, 3, 3), ()),
    (aten.conv2d.default, (2, 4, 7, 7), (4, 1, 3, 3), ([1], [1], [1], 4)),
    (aten.convolution.default, (2, 6, 9, 8), (5, 6, 2, 3), ([2, 2], [0, 1], [1, 1], False, [0, 0], 1)),
    (aten.conv1d.default, (3, 4, 11), (6, 2, 3), ([2], [1], [2], 2)),
    (aten.conv3d.default, (1, 2, 4, 5, 6), (3, 2, 3, 1, 2), ()),
    (aten.linear.default, (2, 5, 7), (3, 7), ()),
]


def layer(target, *arguments):
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    return graph.call_function(target, (x, weight, None, *arguments))


@pytest.mark.parametrize(("target", "shape", "weight_shape", "arguments"), CONVS)
def test_a_layer_is_its_rows_times_its_columns(target, shape, weight_shape, arguments):
    x, weight = torch.randn(shape, generator=generator(1)), torch.randn(weight_shape, generator=generator(2))
    node, kernel = layer(target, *arguments), weight_shape[2:]
    assert takes_rows(node)
    (rows,) = next(input_rows(node, (x,), kernel, 10**6, generator(0)))
    expected = target(x, weight, None, *arguments)
    expected = expected if not kernel else expected.movedim(1, -1)
    found = rows @ grouped_weight(node, weight).mT
    assert torch.allclose(found.movedim(0, 1).flatten(1), expected.flatten(0, -2), atol=1e-5)
    drawn = [piece[0] for piece in input_rows(node, (x,), kernel, 5, generator(0))]
    assert sum(piece.shape[1] for piece in drawn) == 5
    again = [piece[0] for piece in input_rows(node, (x,), kernel, 5, generator(0))]
    assert all(map(torch.equal, drawn, again))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("target", "shape", "weight_shape", "arguments"), CONVS)
def test_the_weight_ends_on_its_grid_and_does_better_on_other_inputs(target, shape, weight_shape, arguments, symmetric):
    weight = torch.randn(weight_shape, generator=generator(2))
    quantizer, _ = adaround(weight, 4, symmetric, search=True)
    node = layer(target, *arguments)

    def inputs(seed):
        x = torch.randn(40, *shape[1:], generator=generator(seed))
        return x.cumsum(-1) + x.mean(1, keepdim=True) * 3

    def error():
        return (target(inputs(9), quantizer.dequantized() - weight, None, *arguments)).square().mean().item()

    before, x = error(), inputs(8)
    rounding = LayerRounding(node, quantizer, seed=0, corrected=0.0)
    rounding.see(x, x, 1.0)
    rounding.finish(0.01)
    assert error() < before
    integers, scale = quantizer.quantize()
    low, high = quantizer.bounds
    zero = quantizer.zero_point.reshape(-1, *[1] * (weight.ndim - 1))
    assert integers.dtype == torch.int8 and int((integers + zero).min()) >= low and int((integers + zero).max()) <= high
    assert torch.equal(quantizer(weight), integers * scale.reshape(zero.shape))
