"""The small models that torchao's quantizers are tested with, and models whose layers share their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

# torchao 0.18 ships the tests' quantizer cases; the models themselves still come with torch.
SHIPPED = pytest.importorskip("torch.testing._internal.common_quantization").TestHelperModules


class Case(NamedTuple):
    """A model, how to make it and what to call it with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


class SharedConv(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class SharedConvSum(nn.Module):
    """One convolution on two inputs, and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + self.conv(y)


class SharedLinear(nn.Module):
    """One linear, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).relu())


class TiedLinears(nn.Module):
    """Two linears with one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class TiedEmbedding(nn.Module):
    """A table that is also the weight of the last linear, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.last.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.last(self.table(indices))


class SharedConcatenation(nn.Module):
    """One convolution on two concatenations: its weight is split once for both, or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.conv(torch.cat([x, y], 1))
        return self.conv(torch.cat([z, x], 1))


def _images(count: int = 1, channels: int = 3, batch: int = 2, size: int = 5, dims: int = 2) -> Callable[[], Any]:
    return lambda: tuple(torch.randn(batch, channels, *[size] * dims) for _ in range(count))


def _indices(*shape: int) -> Callable[[], Any]:
    return lambda: (torch.randint(0, 10, shape),)


def _rows(width: int, count: int = 1) -> Callable[[], Any]:
    return lambda: tuple(torch.randn(4, width) for _ in range(count))


def _normed(**options: Any) -> Case:
    return Case(lambda: SHIPPED.ConvWithBNRelu(**options), _images(dims=options.get("dim", 2)))


def _transposed(**options: Any) -> Case:
    return Case(lambda: SHIPPED.ConvTWithBNRelu(**options), _images(dims=options.get("dim", 2)))


CASES: dict[str, Case] = {
    "Conv2dPropAnnotaton": Case(SHIPPED.Conv2dPropAnnotaton, _images()),
    "Conv2dWithObsSharingOps": Case(SHIPPED.Conv2dWithObsSharingOps, _images()),
    "Conv2dWithTwoLinearPermute": Case(SHIPPED.Conv2dWithTwoLinearPermute, _images()),
    "Conv2dWithTwoLinear": Case(SHIPPED.Conv2dWithTwoLinear, _images(size=4)),
    "ConvLinearWPermute": Case(SHIPPED.ConvLinearWPermute, _images()),
    "TwoLinearModule": Case(SHIPPED.TwoLinearModule, _rows(8)),
    "ConvMaxPool2d": Case(SHIPPED.ConvMaxPool2d, _images(channels=2)),
    "ConvWithAdaptiveAvgPool2d": Case(SHIPPED.ConvWithAdaptiveAvgPool2d, _images()),
    "Conv2dThenConv1d": Case(SHIPPED.Conv2dThenConv1d, _images(batch=1)),
    "Conv2dWithCat": Case(SHIPPED.Conv2dWithCat, _images(2)),
    "Conv2dWithTwoCat": Case(SHIPPED.Conv2dWithTwoCat, lambda: (*_images(2)(), *_images(2, channels=6, size=3)())),
    "Conv2dWithSplit": Case(SHIPPED.Conv2dWithSplit, _images(size=8)),
    "ThreeAdd": Case(SHIPPED.ThreeAdd, _images(4)),
    "EmbeddingModule": Case(SHIPPED.EmbeddingModule, _indices(6)),
    "EmbeddingConvLinearModule": Case(SHIPPED.EmbeddingConvLinearModule, _indices(4, 6)),
    "AddInplaceAdd": Case(SHIPPED.AddInplaceAdd, _images(2)),
    "MulInplaceMul": Case(SHIPPED.MulInplaceMul, _images(2)),
    "AddMulScalar": Case(SHIPPED.AddMulScalar, _images()),
    "ConvBnReLU2dAndLinearReLU": Case(SHIPPED.ConvBnReLU2dAndLinearReLU, _images()),
    "GroupwiseConv2d": Case(SHIPPED.GroupwiseConv2d, _images(channels=4)),
    "LinearReluModel": Case(SHIPPED.LinearReluModel, _rows(5)),
    "ControlFlow": Case(SHIPPED.ControlFlow, lambda: SHIPPED.ControlFlow().example_inputs()),
    **{
        f"ConvWithBNRelu-{dim}d{'-relu' * relu}{'-bn' * bn}{'-bias' * bias}": _normed(
            relu=relu, dim=dim, bn=bn, bias=bias, padding=int(bias)
        )
        for dim, relu, bn, bias in (
            (1, True, True, True),
            (1, False, True, False),
            (2, True, True, True),
            (2, True, True, False),
            (2, True, False, True),
            (2, False, True, True),
            (2, False, False, False),
            (3, True, True, True),
        )
    },
    **{
        f"ConvTWithBNRelu-{dim}d{'-relu' * relu}{'-bn' * bn}": _transposed(relu=relu, dim=dim, bn=bn)
        for dim, relu, bn in ((1, True, True), (2, True, True), (2, False, True), (2, True, False))
    },
    "SharedConv": Case(SharedConv, _images()),
    "SharedConvSum": Case(SharedConvSum, _images(2)),
    "SharedLinear": Case(SharedLinear, _rows(8)),
    "TiedLinears": Case(TiedLinears, _rows(8)),
    "TiedEmbedding": Case(TiedEmbedding, _indices(6)),
    "SharedConcatenation": Case(SharedConcatenation, _images(2)),
}
