"""Fake quantizer of an activation: one scale and zero point per tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.fake_quantizers.straight_through import drop_quantization, fake_quantize_fixed, quantize_straight_through
from tfmq_fx.observers.activation import per_tensor_parameters
from tfmq_fx.observers.finite import input_of, require_finite

__all__ = ["ActivationQuantizer"]


class ActivationQuantizer(ObserverBase):  # type: ignore[misc]  # torchao has no types
    """Quantizes with the parameters of the observer that it replaces; its step size can be learned.

    Args:
        observer: A calibrated per-tensor observer (``calculate_qparams``, ``dtype``, ``quant_min``,
            ``quant_max``, ``qscheme``).

    Attributes:
        enabled: Off, the activation passes through.
        observing: On, the parameters become those of the range of what is seen now.
        drop: Probability that an element is left unquantized (training only).
        log_step: While the step size is learned, the logarithm of its change; None otherwise.
    """

    def __init__(self, observer: ObserverBase) -> None:
        super().__init__(observer.dtype)
        self.quant_min, self.quant_max, self.qscheme = observer.quant_min, observer.quant_max, observer.qscheme
        self.subject: str = getattr(observer, "subject", input_of(""))
        scale, zero = observer.calculate_qparams()
        self.register_buffer("scale", scale.detach().clone().reshape(-1).to(torch.float32))
        self.register_buffer("zero_point", zero.detach().clone().reshape(-1).to(torch.int64))
        # What learning starts from, however often it is run; no part of the state.
        self.register_buffer("calibrated_scale", self.scale.clone(), persistent=False)
        self.scale: Tensor
        self.zero_point: Tensor
        self.calibrated_scale: Tensor
        self.enabled = True
        self.observing = False
        self.drop = 0.0
        self.log_step: nn.Parameter | None = None

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), each ``[1]``."""
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x`` (any shape, float); the gradient passes where nothing was clipped."""
        if not self.enabled:
            return x
        if self.observing:
            low, high = torch.aminmax(x.detach())
            require_finite(low, high, x, self.subject)
            self.scale, self.zero_point = per_tensor_parameters(
                low.reshape(1).float(), high.reshape(1).float(), self.quant_min, self.quant_max, self.qscheme
            )
        if self.log_step is None:
            quantized = fake_quantize_fixed(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        else:
            scale = self.scale * self.log_step.exp()
            quantized = quantize_straight_through(x, scale, self.zero_point, self.quant_min, self.quant_max)
        return drop_quantization(quantized, x, self.drop)

    def learn_step(self) -> nn.Parameter:
        """Start learning the step size; returns what to train."""
        self.log_step = nn.Parameter(torch.zeros_like(self.scale))
        return self.log_step

    @torch.no_grad()
    def keep_step(self) -> None:
        """Stop learning the step size and keep it."""
        if self.log_step is not None:
            self.scale = self.scale * self.log_step.exp()
            self.log_step = None

    def forget_step(self) -> None:
        """Go back to the step size of calibration."""
        self.scale = self.calibrated_scale.clone()
