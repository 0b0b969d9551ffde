"""What a model's weights must be before they are quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq_fx._torch.modules import tensors_by_name
from tfmq_fx._torch.tensors import FakeTensor
from tfmq_fx.errors import CaptureError

__all__ = ["check_float_weights", "check_weights", "detach_from_inference"]

#: How to get weights from where they cannot be computed with.
MOVES_TO_CPU = {"meta": "load them, for instance with low_cpu_mem_usage=False"}


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not there, not on the CPU, or not finite.

    Raises:
        CaptureError: Names the weight and says what to do.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, FakeTensor):  # what the graphs of torch.cond keep beside the weights themselves
            continue
        if tensor.device.type != "cpu":
            advice = MOVES_TO_CPU.get(tensor.device.type, "move the model there with model.to('cpu')")
            msg = f"weight {name!r} is on {str(tensor.device)!r}, but models are quantized on the CPU: {advice}"
            raise CaptureError(msg)
        if tensor.is_floating_point() and not _is_finite(tensor):
            msg = f"weight {name!r} holds NaN or infinite values; repair or reload the model before quantizing it"
            raise CaptureError(msg)


def check_float_weights(model: nn.Module) -> None:
    """Refuse a model whose weights were quantized before: what is lost cannot be rounded anew.

    Raises:
        CaptureError: Names the weight.
    """
    plain = (Tensor, nn.Parameter, nn.Buffer)
    for name, tensor in model.named_parameters():
        # Libraries keep integers in parameters, or make the parameter a class of their own.
        if type(tensor) not in plain or not (tensor.is_floating_point() or tensor.is_complex()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            msg = (
                f"weight {name!r} is a {type(tensor).__name__} of {dtype}, so it is quantized already: load the model "
                "with float weights"
            )
            raise CaptureError(msg)


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    # Types of one byte know no comparison.
    return bool(torch.isfinite(values if values.element_size() > 1 else values.float()).all())


def detach_from_inference(module: nn.Module) -> None:
    """Replace the tensors of ``module`` that were made in inference mode by copies that autograd takes."""
    copies: dict[int, Tensor] = {}
    for owner in module.modules():
        for states in tensors_by_name(owner):
            for name, value in states.items():
                if value is not None and value.is_inference():
                    if id(value) not in copies:
                        copy = value.detach().clone()
                        copies[id(value)] = nn.Parameter(copy) if isinstance(value, nn.Parameter) else copy
                    states[name] = copies[id(value)]
