"""Export a module with a symbolic batch, and decide which of its inputs stay inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from tfmq_fx._torch import pytree
from tfmq_fx._torch.compilation import ExportUserError
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.batch_limit import check_batch_limit
from tfmq_fx.frontend.export_inputs import Batched, ExportInputs
from tfmq_fx.frontend.surroundings import evaluation_mode
from tfmq_fx.frontend.unwrapping import uncompiled_parts
from tfmq_fx.passes.analysis import data_dependence
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["BatchChoice", "export", "max_batch"]

#: What export reports when the batch may not take every size, e.g. "batch = Dim('batch', max=63)".
BATCH_LIMIT = re.compile(r"batch = Dim\('batch', (?:min=\d+, )?max=(\d+)\)")

#: The same where it is a multiple of the batch that is limited, such as the frames of videos: "batch < 64/3".
MULTIPLE_LIMIT = re.compile(r"for batch < (\d+)/(\d+)")

#: Upper bounds of symbolic sizes beyond this mean "no bound".
UNLIMITED = 2**31

#: Operators that turn a tensor back into a Python number: what it shapes would be a size that nobody knows.
READS_NUMBER = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


@dataclass(frozen=True)
class BatchChoice:
    """Which axes are the batch.

    Attributes:
        dynamic: Whether the batch is symbolic.
        batched: The inputs that have it; None: every tensor whose first axis is as long as that of the first tensor.
        dynamic_shapes: ``torch.export``'s own argument instead, passed on as it is.
    """

    dynamic: bool = True
    batched: Batched | None = None
    dynamic_shapes: Any = None


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: BatchChoice, timestep: str
) -> ExportedProgram:
    """Export ``model`` in evaluation mode.

    A Python number becomes a 0-dim tensor, and so stays an input, where it enters arithmetic; one that shapes the
    graph becomes a constant. Which is which only tracing can tell: it is tried with tensors first.

    Args:
        model: The module.
        args: Example inputs.
        kwargs: Example inputs by name.
        batch: Which axes are the batch.
        timestep: Name of the timestep, the last number to be given up as an input.

    Raises:
        CaptureError: The inputs do not fit, or export fails.
    """
    example = ExportInputs.of(model, args, kwargs)
    axes = {} if batch.dynamic_shapes is not None or not batch.dynamic else example.batch_axes(batch.batched)
    example = example.with_batch_of_two(axes)
    failure: CaptureError | None = None
    pending = example.number_choices(timestep)
    while pending:
        tensors = pending.pop(0)
        try:
            program = _export_static_or_dynamic(model, example.with_tensors(tensors), axes, batch)
        except CaptureError as error:
            failure = error
            continue
        constants = _numbers_read_as_constants(program, tensors)
        if not constants:
            return program
        pending.insert(0, tensors - constants)
    assert failure is not None
    raise failure


def max_batch(program: ExportedProgram) -> int | None:
    """The largest batch that an exported program admits, None without a limit."""
    limits = [int(r.upper) for r in program.range_constraints.values() if r.upper < UNLIMITED]
    return min(limits, default=None)


def _export_static_or_dynamic(
    model: nn.Module, example: ExportInputs, axes: Mapping[int, int], batch: BatchChoice
) -> ExportedProgram:
    args, kwargs = example.arguments()
    with evaluation_mode(model), torch.no_grad(), uncompiled_parts(model):
        try:
            if not axes:
                return _trace(
                    lambda strict: torch.export.export(
                        model, args, kwargs, dynamic_shapes=batch.dynamic_shapes, strict=strict
                    )
                )
            return _trace(lambda strict: _export_dynamic(model, example, axes, strict))
        except CaptureError:
            raise
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            msg = f"torch.export cannot capture {type(model).__name__} with these example inputs: {first.strip()}"
            raise CaptureError(msg) from error


def _trace(export: Callable[[bool], ExportedProgram]) -> ExportedProgram:
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


def _export_dynamic(model: nn.Module, example: ExportInputs, axes: Mapping[int, int], strict: bool) -> ExportedProgram:
    """Export with a symbolic batch; when the model limits it (diffusers' upsampler at 64), take its limit."""
    args, kwargs = example.arguments()

    def attempt(dimension: Any) -> ExportedProgram:
        shapes = [{axes[index]: dimension} if index in axes else None for index in range(len(example.leaves))]
        shaped_args, shaped_kwargs = pytree.tree_unflatten(shapes, example.spec)
        # As torch.export itself names them: what *args or **kwargs takes is one entry of its own.
        by_name = dict(inspect.signature(model.forward).bind(*shaped_args, **shaped_kwargs).arguments)
        return torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=strict)

    try:
        return attempt(Dim("batch", min=1))
    except (ExportUserError, AssertionError) as error:
        limit = _batch_limit(str(error))
        if limit is None:
            first = str(error).strip().splitlines()[0]
            msg = (
                f"the batch of {type(model).__name__} cannot be dynamic ({first}); name the inputs that have it with "
                "batched=, or pass dynamic_batch=False"
            )
            raise CaptureError(msg) from error
    check_batch_limit(model, lambda size: example.with_batch_size(size, axes).arguments(), limit)
    return attempt(Dim("batch", min=1, max=limit))


def _batch_limit(message: str) -> int | None:
    """The largest batch that an error message of export names, None when it names none."""
    if limit := BATCH_LIMIT.search(message):
        return int(limit.group(1))
    if limit := MULTIPLE_LIMIT.search(message):
        bound, times = map(int, limit.groups())
        return (bound - 1) // times
    return None


def _numbers_read_as_constants(program: ExportedProgram, numbers: Collection[int]) -> frozenset[int]:
    """Those of the numbers that the graph turns back into Python numbers."""
    if not numbers:
        return frozenset()
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    placeholders = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    dependence = data_dependence(graph_module)
    readers = [node for node in graph_module.graph.nodes if is_call(node, *READS_NUMBER)]
    read = frozenset().union(*(dependence[node] for node in readers))
    return frozenset(index for index in numbers if placeholders[index] in read)
