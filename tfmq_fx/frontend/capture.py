"""Capture: a module, a traced graph or an exported program becomes one canonical ATen graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tfmq_fx._torch.tensors import FakeTensor
from tfmq_fx.errors import CaptureError, InputError
from tfmq_fx.frontend.binding import bind
from tfmq_fx.frontend.canonical import canonicalize
from tfmq_fx.frontend.export_inputs import Batched, check_batched
from tfmq_fx.frontend.exporting import BatchChoice, export, max_batch
from tfmq_fx.frontend.functional import without_writes
from tfmq_fx.frontend.interface import INTERFACE_KEY, Interface
from tfmq_fx.frontend.notes import keep_notes, noted
from tfmq_fx.frontend.program_stage import CAPTURED, describe, held_model, stage_of
from tfmq_fx.frontend.state import check_state
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.frontend.unwrapping import unwrap
from tfmq_fx.frontend.weights import check_weights, detach_from_inference

__all__ = ["capture"]


@pipeline_stage
def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    batched: Batched | None = None,
    dynamic_shapes: Any = None,
    timestep: str = "timestep",
) -> fx.GraphModule:
    """Capture ``model`` as one ATen graph, the only representation that the passes work on.

    Args:
        model: Any module, a graph from ``torch.fx.symbolic_trace``, or an ``ExportedProgram``. A graph that is captured
            already is returned as it is; example inputs that are given must fit it.
        example_inputs: Positional example inputs, or a single tensor. Not needed for an ``ExportedProgram``.
        example_kwargs: Example inputs by name. Values that are no tensors become part of the program, but for numbers
            that enter arithmetic, which stay inputs.
        dynamic_batch: Whether the batch is symbolic. Without it the graph serves exactly the example batch size.
        batched: The names of the inputs that have the batch along axis 0, or the axis by name; by default every
            example tensor whose axis 0 is as long as the first one's.
        dynamic_shapes: Instead of ``batched``, what ``torch.export.export`` takes under this name, with one ``Dim``.
        timestep: Name of the timestep input.

    Returns:
        A ``GraphModule`` whose placeholders carry the model's own argument names and whose nodes keep
        their ``nn_module_stack``; assertions, guards, dropouts and no-op casts are gone. It is called
        like the model and returns the same structure; ``meta["tfmq_fx.interface"]`` is its
        :class:`~tfmq_fx.frontend.interface.Interface`. The model itself is not changed. What the model computes in
        bfloat16, float16 or float64, the graph computes in float32; its inputs and results keep the model's types.

    Raises:
        CaptureError: The inputs do not fit, the model has NaN or infinite weights or is not on the CPU, layers stand
            where no pass can reach them (:func:`tfmq_fx.frontend.canonical.canonicalize`), or export fails.
    """
    if batched is not None and dynamic_shapes is not None:
        msg = "batched= and dynamic_shapes= say the same thing in two ways; pass one of them"
        raise CaptureError(msg)
    args, kwargs = _examples(example_inputs, example_kwargs)
    check_batched(batched)
    model = unwrap(model)
    if getattr(model, "quantization_method", None) == "tfmq_fx":  # what stands in a pipeline of diffusers
        msg = f"the {type(model).__name__} is quantized already; capture the float model that it was made from"
        raise CaptureError(msg)
    if isinstance(model, fx.GraphModule) and stage_of(model) != CAPTURED:
        msg = f"capture needs a float model, it was given {describe(model)}"
        raise CaptureError(msg)
    if isinstance(model, fx.GraphModule) and isinstance(noted(model, INTERFACE_KEY), Interface):
        _check_captured(model, args, kwargs, timestep)
        if batched is not None or dynamic_shapes is not None or not dynamic_batch:
            msg = (
                "a graph that is captured already keeps its batch: leave dynamic_batch=, batched= and dynamic_shapes= "
                "out, or capture the float model with them"
            )
            raise CaptureError(msg)
        return model
    if isinstance(model, ExportedProgram):
        program = model
    elif isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        check_weights(model)
        batch = BatchChoice(dynamic_batch, batched, dynamic_shapes)
        program = export(model, args, kwargs, batch, timestep)
    else:
        held = held_model(model)
        advice = f"pass pipe.{held}" if held else "pass a torch.nn.Module, fx.GraphModule or ExportedProgram"
        msg = f"cannot capture a {type(model).__name__}: {advice}"
        raise CaptureError(msg)
    _check_constants(program)
    program = without_writes(program)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    check_weights(graph_module)
    detach_from_inference(graph_module)
    canonicalize(graph_module)
    check_state(graph_module)
    interface = Interface.of(graph_module)
    route, limit = _route(model, program), max_batch(program)
    graph_module.meta[INTERFACE_KEY] = interface.of_model(model, route=route, max_batch=limit)
    keep_notes(graph_module)
    return graph_module


def _examples(inputs: Any, by_name: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as ``(args, kwargs)``."""
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if inputs is not None and (not isinstance(inputs, Sequence) or isinstance(inputs, str)):
        msg = (
            f"example_inputs= is a {type(inputs).__name__}: pass a tuple of the model's inputs, and those by name as "
            "example_kwargs="
        )
        raise CaptureError(msg)
    if by_name is not None and not (isinstance(by_name, Mapping) and all(isinstance(name, str) for name in by_name)):
        msg = f"example_kwargs= is a {type(by_name).__name__}: pass a dictionary of inputs by name"
        raise CaptureError(msg)
    return tuple(inputs or ()), dict(by_name or {})


def _check_captured(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], timestep: str) -> None:
    """Refuse example inputs that a graph was not captured for."""
    if not args and not kwargs:
        return
    interface: Interface = noted(graph_module, INTERFACE_KEY)
    try:
        bind(interface, args, kwargs, timestep)
    except InputError as error:
        msg = f"the example inputs do not fit this graph, which is captured already: {error}"
        raise CaptureError(msg) from error


def _check_constants(program: ExportedProgram) -> None:
    """Refuse what torch.export 2.13 makes of a tensor that comes into being outside torch (numpy) during a call."""
    for name, value in program.constants.items():
        if isinstance(value, FakeTensor):
            msg = (
                f"the model makes the constant {name!r} of shape {tuple(value.shape)} outside torch while it runs, and "
                "torch.export does not keep its values: use sizes for which it has them stored (those of its config)"
            )
            raise CaptureError(msg)


def _route(model: Any, program: ExportedProgram) -> str:
    """How the graph came about, in words."""
    if model is program:
        return "exported program"
    return "symbolic_trace, export" if isinstance(model, fx.GraphModule) else "export"
