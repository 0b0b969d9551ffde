"""Capture a model as the one of a quantized program was captured: with inputs of the same names, shapes and types."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from tfmq_fx.frontend.capture import capture
from tfmq_fx.frontend.examples import example_arguments
from tfmq_fx.frontend.interface import INTERFACE_KEY, TensorInput
from tfmq_fx.frontend.notes import noted
from tfmq_fx.frontend.sizes import BatchSize
from tfmq_fx.frontend.unwrapping import unwrap
from tfmq_fx.frontend.weights import check_float_weights
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.same_architecture import refuse_architecture

__all__ = ["capture_like"]


def capture_like(model: Any, program: QuantizedProgram) -> fx.GraphModule:
    """Capture ``model`` with the inputs of ``program``.

    Args:
        model: What :func:`tfmq_fx.capture` takes; what is captured already stays as it is.
        program: A quantized program of the same architecture.

    Raises:
        CaptureError: The model cannot be captured, has quantized weights, or takes other inputs.
    """
    model = unwrap(model)
    if isinstance(model, nn.Module):
        check_float_weights(model)
    is_captured = isinstance(model, fx.GraphModule) and noted(model, INTERFACE_KEY) is not None
    if is_captured or isinstance(model, ExportedProgram) or not isinstance(model, nn.Module):
        return capture(model)
    args, kwargs = example_arguments(program.graph_module, program.indexed)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        refuse_architecture(f"{type(model).__name__} is not called with the program's inputs ({error})")
    axes = _batch_axes(program)
    return capture(
        model,
        args,
        example_kwargs=kwargs,
        dynamic_batch=bool(axes),
        batched=axes or None,
        timestep=program.timestep,
    )


def _batch_axes(program: QuantizedProgram) -> dict[str, int]:
    """By name, the batch axis of each input that has one; empty where the batch is fixed."""
    axes = {}
    for entry in program.interface.inputs:
        if not isinstance(entry, TensorInput) or (axis := entry.batch_axis) is None:
            continue
        size = entry.sizes[axis]
        if isinstance(size, BatchSize) and size.times > 1:
            refuse_architecture(
                f"its input {entry.name!r} is {entry}, which only dynamic_shapes= of tfmq_fx.capture can ask for; "
                "capture the model so and pass the captured graph"
            )
        axes[entry.name] = axis
    return axes
