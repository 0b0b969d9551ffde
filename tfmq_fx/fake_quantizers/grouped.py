"""Fake quantizer of an activation with one parameter set per timestep group."""

from __future__ import annotations

from torch import Tensor, fx

from tfmq_fx.fake_quantizers.activation import ActivationQuantizer
from tfmq_fx.fake_quantizers.straight_through import drop_quantization, fake_quantize_fixed, quantize_straight_through
from tfmq_fx.observers.gathered import convert_gathered

__all__ = ["GroupedQuantizer"]


class GroupedQuantizer(ActivationQuantizer):
    """Quantizes each entry with the parameters of its timestep group; called as ``quantizer(x, groups)``.

    Made from a :class:`~tfmq_fx.observers.GroupedObserver`; attributes as :class:`ActivationQuantizer`, with scales,
    zero points and learned steps ``[G]``. It stands outside the temporal block, where ranges are calibrated alone,
    so ``observing`` is not for it.
    """

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:  # type: ignore[override]  # it takes the groups too
        """Quantize and dequantize ``x`` (``[N, ...]``, float) with the parameters of the groups (``[N]``)."""
        if not self.enabled:
            return x
        shape = [-1] + [1] * (x.ndim - 1)
        scale, quantize = self.scale, fake_quantize_fixed
        if self.log_step is not None:
            scale, quantize = self.scale * self.log_step.exp(), quantize_straight_through
        zero = self.zero_point[groups].reshape(shape)
        quantized = quantize(x, scale[groups].reshape(shape), zero, self.quant_min, self.quant_max)
        return drop_quantization(quantized, x, self.drop)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace ``node`` by quantize and dequantize with gathered parameters (called by ``convert_pt2e``)."""
        convert_gathered(self, model, node)
