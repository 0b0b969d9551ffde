import pytest
import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401

import tfmq_fx
from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import HoistQuantizers
from tfmq_fx.testing import assert_pass_contract

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
X = torch.linspace(-3, 3, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)


def pair(x, zero=7, scale=0.03, other=None):
    integers = QUANTIZE(x, scale, zero, 0, 255, torch.uint8)
    return DEQUANTIZE(integers, other or scale, zero, 0, 255, torch.uint8)


class Graph(torch.nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return self.compute(x.relu())


def graph(compute):
    return tfmq_fx.capture(Graph(compute), (X,))


MOVES = {
    "upsample": lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 1, 0, 1)),
    "transpose": lambda x: x.transpose(1, 3),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 4),
}


@pytest.mark.parametrize("name", MOVES)
def test_fires(name):
    hoisted = graph(lambda x: pair(MOVES[name](x)).sin())
    assert HoistQuantizers()(hoisted).modified
    (quantize,) = calls(hoisted, QUANTIZE)
    assert quantize.args[0].target is aten.relu.default
    (last,) = calls(hoisted, aten.sin.default)
    assert last.args[0].target is not DEQUANTIZE


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: pair(x.sin()),
        lambda x: pair(torch.nn.functional.pad(x, (1, 1), value=0.5)),
        lambda x: pair(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")),
        lambda x: pair(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")),
        lambda x: pair(x.transpose(1, 2), other=0.04),
        lambda x: QUANTIZE(x.transpose(1, 2), 0.1, 0, 0, 255, torch.uint8),
    ],
    ids=["other operator", "other value", "other mode", "computes", "other parameters", "no pair"],
)
def test_does_not_fire(compute):
    assert unchanged(HoistQuantizers(), graph(compute))


def test_does_not_fire_where_zero_is_not_on_the_grid():
    class Shifted(torch.nn.Module):
        def forward(self, x):
            padded = torch.nn.functional.pad(x, (1, 1))
            integers = QUANTIZE(padded, 0.1, 3, 4, 255, torch.uint8)
            return DEQUANTIZE(integers, 0.1, 3, 4, 255, torch.uint8)

    assert unchanged(HoistQuantizers(), tfmq_fx.capture(Shifted(), (X,)))


@pytest.mark.parametrize("name", MOVES)
def test_numerics(name):
    captured = graph(lambda x: pair(MOVES[name](x)).sin())
    assert_pass_contract(HoistQuantizers, captured, (X,), exact=True, more_inputs=[(X[:1],)])


def test_several_readers_of_what_is_moved():
    def compute(x):
        moved = x.transpose(1, 2)
        return pair(moved) + pair(moved, scale=0.2) + moved

    captured = graph(compute)
    result = assert_pass_contract(HoistQuantizers, captured, (X,), exact=True)
    found = operators(result.graph_module)
    # One each for the two pairs, and the one that the sum reads.
    assert found[aten.transpose.int] == 3 and found[QUANTIZE] == 2
