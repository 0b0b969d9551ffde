"""The observer of weights: one scale per output channel, stored as integers with zero point 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.finite import require_finite, weight_of
from tfmq_fx.observers.ranges import (
    asymmetric_parameters,
    search_asymmetric,
    search_symmetric,
    symmetric_parameters,
)
from tfmq_fx.passes.quantized.fold_weight_zero_points import fold_zero_points
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, read_attribute, replace_node

__all__ = ["PerChannelWeightObserver"]

DEQUANTIZE = decomposed.dequantize_per_channel.default


def _state_of(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight's memory or values do."""
    return weight.data_ptr(), weight._version


class PerChannelWeightObserver(ObserverBase):  # type: ignore[misc]  # torchao has no types
    """Chooses a scale and zero point for every channel of a constant weight.

    At conversion the weight becomes ``dequantize_per_channel`` of an integer constant. Up to 8 bits the
    zero points are folded into the int8 integers, because the oneDNN kernels ignore any other than 0.

    Args:
        bits: Width, 2 to 8 or 16.
        symmetric: Whether zero points are 0 before folding.
        search: Whether the range is searched (L2.4) instead of min-max.
        ch_axis: The channel axis (PT2E's name for it).
        dtype: Storage dtype of the specification that this observer was made for.
        subject: What the weight is called in errors.
    """

    def __init__(self, bits: int, symmetric: bool, search: bool, ch_axis: int = 0, dtype: torch.dtype = torch.int8,
                 subject: str = weight_of(""), **_: Any) -> None:  # fmt: skip
        super().__init__(dtype)
        self.subject = subject
        self.bits, self.symmetric, self.search, self.axis = bits, symmetric, search, ch_axis
        self.register_buffer("weight", None)
        self.weight: Tensor | None
        self._chosen: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._checked: tuple[int, int] | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """The integer range: ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` symmetric, ``[0, 2^b - 1]`` asymmetric.

        The symmetric range leaves out ``-2^(b-1)``: the scale is ``max |w| / (2^(b-1) - 1)``.
        """
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            return -top, top
        return 0, 2**self.bits - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Remember ``weight`` (it is constant) and return it.

        Raises:
            NonFiniteError: It holds NaN or infinite values.
        """
        self.weight = weight.detach()
        state = _state_of(self.weight)
        if self._checked != state:
            require_finite(*torch.aminmax(self.weight), self.weight, self.subject)
            self._checked = state
        return weight

    def seen_weight(self) -> Tensor:
        """The weight.

        Raises:
            CalibrationError: None was seen.
        """
        if self.weight is None:
            msg = f"{self.subject} was never observed; calibrate, or run the prepared model once, before converting"
            raise CalibrationError(msg)
        return self.weight

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (int64), each ``[channels]``; raises as :meth:`seen_weight`."""
        weight = self.seen_weight()
        # The search is slow and asked for at every stage, while the weight stays the same.
        state = _state_of(weight)
        if self._chosen is None or self._chosen[0] != state:
            self._chosen = (state, self._choose(weight))
        return self._chosen[1]

    def _choose(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        channels = weight.to(torch.float32).movedim(self.axis, 0).flatten(1)
        low, high = channels.amin(1), channels.amax(1)
        q_min, q_max = self.bounds
        if self.search:
            find = search_symmetric if self.symmetric else search_asymmetric
            low, high = find(channels, low, high, q_min, q_max)
        if self.symmetric:
            return symmetric_parameters(low, high, q_max)
        return asymmetric_parameters(low, high, q_min, q_max)

    def quantize(self) -> tuple[Tensor, Tensor]:
        """The integers (int8 with zero points folded, or int16) and the scales."""
        weight, (scale, zero) = self.seen_weight(), self.calculate_qparams()
        shape = [-1 if i == self.axis else 1 for i in range(weight.ndim)]
        levels = (weight.to(torch.float32) / scale.reshape(shape)).round_().add_(zero.reshape(shape))
        levels.clamp_(*self.bounds)
        if self.bits == 16:
            return levels.to(torch.int16), scale
        if self.symmetric:  # there is nothing to fold, and int64 would be most of the time
            return levels.to(torch.int8), scale
        return self.folded(levels.to(torch.int64), zero), scale

    def folded(self, integers: Tensor, zero: Tensor) -> Tensor:
        """The integers less their zero points, in int8.

        Raises:
            CalibrationError: They do not fit.
        """
        folded = fold_zero_points(integers, zero, self.axis)
        if folded is None:
            msg = f"{self.subject} does not fit in int8 with its zero points; use at most 7 bits, or symmetric weights"
            raise CalibrationError(msg)
        return folded

    def dequantized(self) -> Tensor:
        """The weight as the integers give it back, float32."""
        integers, scale = self.quantize()
        return integers * scale.reshape([-1 if i == self.axis else 1 for i in range(integers.ndim)])

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace ``node`` by a dequantized integer constant (called by ``convert_pt2e``)."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.forward(read_attribute(model, str(source.target)))
        integers, scale = self.quantize()
        limits = torch.iinfo(integers.dtype)
        base, layer = str(source.target), next(iter(node.users))
        with model.graph.inserting_before(node):
            reads = [
                insert_get_attr(model, add_buffer(model, f"{base}_{suffix}", value), anchor=layer)
                for suffix, value in (
                    (f"int{self.bits}", integers),
                    ("scale", scale),
                    ("zero_point", torch.zeros(len(scale), dtype=torch.int64)),
                )
            ]
            args = (*reads, self.axis, limits.min, limits.max, integers.dtype)
            new = insert_call(model.graph, DEQUANTIZE, args, anchor=layer)
        replace_node(node, new)
