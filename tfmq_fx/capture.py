"""Capture: a module, a traced graph or an exported program becomes one canonical ATen graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tfmq_fx._compat import FakeTensor
from tfmq_fx.errors import CaptureError
from tfmq_fx.given import held_model
from tfmq_fx.notes import keep_notes
from tfmq_fx.passes import CANONICALIZE, run_pipeline

__all__ = ["capture"]

#: What export reports when the batch may not take every size, e.g. "batch = Dim('batch', max=63)".
BATCH_LIMIT = re.compile(r"batch = Dim\('batch', (?:min=\d+, )?max=(\d+)\)")

#: The same where it is a multiple of the batch that is limited, such as the frames of videos: "batch < 64/3".
MULTIPLE_LIMIT = re.compile(r"for batch < (\d+)/(\d+)")

#: Upper bounds of symbolic sizes beyond this mean "no bound".
UNLIMITED = 2**31


def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
) -> fx.GraphModule:
    """Capture ``model`` as one ATen graph, the only representation that the passes work on.

    Args:
        model: Any module, a graph from ``torch.fx.symbolic_trace``, or an ``ExportedProgram``.
        example_inputs: Positional example inputs. Not needed for an ``ExportedProgram``.
        example_kwargs: Example inputs by name.
        dynamic_batch: Whether axis 0 of every example tensor that has the example batch size becomes
            symbolic. Without it the graph serves exactly the example batch size.

    Returns:
        A ``GraphModule`` whose placeholders carry the model's own argument names and whose nodes keep
        their ``nn_module_stack``; assertions, guards, dropouts and no-op casts are gone. It is called
        like the model and returns the same structure. The model itself is not changed.

    Raises:
        CaptureError: The inputs do not fit, the model has NaN or infinite weights, or export fails.
    """
    if isinstance(model, ExportedProgram):
        program = model
    elif isinstance(model, nn.Module):
        _check_weights(model)
        program = _export(model, tuple(example_inputs), dict(example_kwargs or {}), dynamic_batch)
    else:
        held = held_model(model)
        wanted = f"pass pipe.{held}" if held else "pass a torch.nn.Module, fx.GraphModule or ExportedProgram"
        msg = f"cannot capture a {type(model).__name__}: {wanted}"
        raise CaptureError(msg)
    _check_constants(program)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    _check_weights(graph_module)
    run_pipeline(graph_module, CANONICALIZE)
    about = {"max_batch": _max_batch(program), "route": _route(model, program)}
    graph_module.meta["tfmq_fx.interface"] = {**_interface(model), **about}
    keep_notes(graph_module)
    return graph_module


def _check_constants(program: ExportedProgram) -> None:
    """Refuse what torch.export 2.13 makes of a tensor that comes into being outside torch (numpy) during a call."""
    for name, value in program.constants.items():
        if isinstance(value, FakeTensor):
            msg = (
                f"the model makes the constant {name!r} of shape {tuple(value.shape)} outside torch while it runs, and "
                "torch.export does not keep its values: use sizes for which it has them stored (those of its config)"
            )
            raise CaptureError(msg)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            msg = f"weight {name!r} holds NaN or infinite values; repair or reload the model before quantizing it"
            raise CaptureError(msg)


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bind the examples to the forward signature; turn keywords into positions as far as they are contiguous."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        msg = f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        raise CaptureError(msg) from error
    positional: list[Any] = []
    for name, parameter in signature.parameters.items():
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or name not in bound.arguments:
            break
        positional.append(bound.arguments[name])
    if parameter_takes_rest := bound.args[len(positional) :]:
        return (*positional, *parameter_takes_rest), bound.kwargs
    taken = list(signature.parameters)[: len(positional)]
    rest = {name: value for name, value in bound.arguments.items() if name not in taken}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in rest:
            rest.update(rest.pop(name))
    return tuple(positional), rest


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return int(leaf.shape[0])
    return None


def _twice(leaf: Any, batch: int) -> Any:
    """Repeat a batch of one, which export would otherwise take for a constant."""
    if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch == 1:
        return torch.cat([leaf, leaf])
    return leaf


def _as_tensor_timestep(leaf: Any) -> Any:
    """A Python number would be baked into the graph; as a 0-dim tensor it stays an input."""
    if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
        return torch.tensor(leaf)
    return leaf


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> ExportedProgram:
    args, kwargs = _bind(model, args, kwargs)
    args, kwargs = pytree.tree_map(_as_tensor_timestep, (args, kwargs))
    batch = _batch_size(args, kwargs)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if not dynamic or batch is None:
                return _traced(lambda strict: torch.export.export(model, args, kwargs, strict=strict))
            args, kwargs = pytree.tree_map(lambda leaf: _twice(leaf, batch), (args, kwargs))
            return _traced(lambda strict: _export_dynamic(model, args, kwargs, max(batch, 2), strict))
    except CaptureError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        msg = f"torch.export cannot capture {type(model).__name__} with these example inputs: {first.strip()}"
        raise CaptureError(msg) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _traced(export: Callable[[bool], ExportedProgram]) -> ExportedProgram:
    """Trace by running the model; where that fails, by reading its bytecode (``strict``), which takes other models."""
    try:
        return export(False)
    except CaptureError:
        raise
    except Exception as error:
        try:
            return export(True)
        except Exception:  # what the usual way said is the clearer message
            raise error from None


def _export_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, strict: bool
) -> ExportedProgram:
    """Export with a symbolic batch; when the model limits it (diffusers' upsampler at 64), take its limit."""

    def attempt(dimension: Any) -> ExportedProgram:
        def shape(leaf: Any) -> dict[int, Any] | None:
            return {0: dimension} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

        # As torch.export itself names them: what *args or **kwargs takes is one entry of its own.
        by_name = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        return torch.export.export(model, args, kwargs, dynamic_shapes=pytree.tree_map(shape, by_name), strict=strict)

    try:
        return attempt(Dim("batch", min=1))
    except (torch._dynamo.exc.UserError, AssertionError) as error:
        limit = _batch_limit(str(error))
        if limit is None:
            first = str(error).strip().splitlines()[0]
            msg = f"the batch of {type(model).__name__} cannot be dynamic ({first}); pass dynamic_batch=False"
            raise CaptureError(msg) from error
    return attempt(Dim("batch", min=1, max=limit))


def _batch_limit(message: str) -> int | None:
    """The largest batch that an error message of export names, None when it names none."""
    if limit := BATCH_LIMIT.search(message):
        return int(limit.group(1))
    if limit := MULTIPLE_LIMIT.search(message):
        bound, times = map(int, limit.groups())
        return (bound - 1) // times
    return None


def _max_batch(program: ExportedProgram) -> int | None:
    """The largest batch that the capture admits, None without a limit."""
    limits = [int(r.upper) for r in program.range_constraints.values() if r.upper < UNLIMITED]
    return min(limits, default=None)


def _route(model: Any, program: ExportedProgram) -> str:
    """How the graph came about, in words."""
    if model is program:
        return "exported program"
    return "symbolic_trace, export" if isinstance(model, fx.GraphModule) else "export"


def _interface(model: Any) -> dict[str, Any]:
    """What a caller of the model expects beside its outputs: class name and diffusers configuration."""
    config = getattr(model, "config", None)
    plain = dict(config) if isinstance(config, Mapping) else {}
    return {"model_class": type(model).__name__, "config": plain}
