"""Export a module with a symbolic batch, and decide which of its inputs stay inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from tfmq_fx._torch import pytree
from tfmq_fx._torch.compilation import ExportUserError
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.batch_limit import check_batch_limit
from tfmq_fx.frontend.evaluation_mode import evaluation_mode
from tfmq_fx.frontend.interface import leaf_names
from tfmq_fx.frontend.tensors import contiguous
from tfmq_fx.frontend.unwrapping import uncompiled_parts
from tfmq_fx.passes.analysis import data_dependence
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["BatchChoice", "Batched", "export", "max_batch"]

#: Names of inputs whose first axis is the batch, or the axis by name.
Batched = Collection[str] | Mapping[str, int]

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
    example = _Example.of(model, args, kwargs)
    axes = {} if batch.dynamic_shapes is not None or not batch.dynamic else example.batch_axes(batch.batched)
    example = example.with_batch_of_two(axes)
    failure: CaptureError | None = None
    pending = example.number_choices(timestep)
    while pending:
        tensors = pending.pop(0)
        try:
            program = _exported(model, example.with_tensors(tensors), axes, batch)
        except CaptureError as error:
            failure = error
            continue
        shaping = _read_back(program, tensors)
        if not shaping:
            return program
        pending.insert(0, tensors - shaping)
    assert failure is not None
    raise failure


def max_batch(program: ExportedProgram) -> int | None:
    """The largest batch that an exported program admits, None without a limit."""
    limits = [int(r.upper) for r in program.range_constraints.values() if r.upper < UNLIMITED]
    return min(limits, default=None)


# -- examples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Example:
    """Example inputs, leaf by leaf, with a name for each."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    names: list[str]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Example:
        """Bind and flatten; tensors in any memory format are normal input, so the graph is that of contiguous ones."""
        args, kwargs, names = _bound(model, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        plain = [contiguous(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(plain, spec, leaf_names(names, spec))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)``."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return tuple(args), dict(kwargs)

    def batch_axes(self, batched: Batched | None) -> dict[int, int]:
        """The batch axis of each leaf that has one, by the number of the leaf.

        Raises:
            CaptureError: A name is no input, or an axis is not there or not as long as the others.
        """
        tensors = {index: leaf for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.ndim}
        if batched is None:
            size = next((leaf.shape[0] for leaf in tensors.values()), None)
            return {index: 0 for index, leaf in tensors.items() if leaf.shape[0] == size}
        axes: dict[int, int] = {}
        for name in batched:
            axis = batched[name] if isinstance(batched, Mapping) else 0
            found = [
                index for index in tensors if self.names[index] == name or self.names[index].startswith(f"{name}[")
            ]
            if not found or any(not 0 <= axis < tensors[index].ndim for index in found):
                known = ", ".join(f"{self.names[i]!r} {list(leaf.shape)}" for i, leaf in tensors.items())
                msg = f"batched= names axis {axis} of {name!r}, which no tensor input has; the tensors are {known}"
                raise CaptureError(msg)
            axes.update(dict.fromkeys(found, axis))
        sizes = {self.names[index]: self.leaves[index].shape[axis] for index, axis in axes.items()}
        if len(set(sizes.values())) > 1:
            msg = f"the inputs of batched= differ in their batch: {', '.join(f'{n} {s}' for n, s in sizes.items())}"
            raise CaptureError(msg)
        return axes

    def with_batch_of_two(self, axes: Mapping[int, int]) -> _Example:
        """A batch of one repeated: export would take it for a constant."""
        leaves = list(self.leaves)
        for index, axis in axes.items():
            if leaves[index].shape[axis] == 1:
                leaves[index] = torch.cat([leaves[index], leaves[index]], axis)
        return replace(self, leaves=leaves)

    def with_batch_of(self, size: int, axes: Mapping[int, int]) -> _Example:
        """The first item over and over, in no memory of its own."""
        leaves = list(self.leaves)
        for index, axis in axes.items():
            shape = list(leaves[index].shape)
            shape[axis] = size
            leaves[index] = leaves[index].narrow(axis, 0, 1).expand(shape)
        return replace(self, leaves=leaves)

    def number_choices(self, timestep: str) -> list[frozenset[int]]:
        """Which numbers become tensors, in the order to try: all; floats and the timestep; the timestep; none."""
        numbers = {i: leaf for i, leaf in enumerate(self.leaves) if type(leaf) in (int, float)}
        time = frozenset(index for index in numbers if self.names[index] == timestep)
        floats = frozenset(index for index, value in numbers.items() if isinstance(value, float))
        return list(dict.fromkeys((frozenset(numbers), floats | time, time, frozenset())))

    def with_tensors(self, numbers: Collection[int]) -> _Example:
        """With these numbers as 0-dim tensors."""
        leaves = [torch.tensor(leaf) if index in numbers else leaf for index, leaf in enumerate(self.leaves)]
        return replace(self, leaves=leaves)


def _bound(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """Bind the examples to the forward signature; turn keywords into positions as far as they are contiguous.

    Returns:
        Positional arguments, arguments by name, and the names of all of them.
    """
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
    taken = list(signature.parameters)[: len(positional)]
    if further := bound.args[len(positional) :]:
        numbered = [f"argument {len(positional) + index}" for index in range(len(further))]
        return (*positional, *further), bound.kwargs, [*taken, *numbered, *bound.kwargs]
    rest = {name: value for name, value in bound.arguments.items() if name not in taken}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in rest:
            rest.update(rest.pop(name))
    return tuple(positional), rest, [*taken, *rest]


# -- export ------------------------------------------------------------------------------------------------------


def _exported(model: nn.Module, example: _Example, axes: Mapping[int, int], batch: BatchChoice) -> ExportedProgram:
    args, kwargs = example.arguments()
    with evaluation_mode(model), torch.no_grad(), uncompiled_parts(model):
        try:
            if not axes:
                return _traced(
                    lambda strict: torch.export.export(
                        model, args, kwargs, dynamic_shapes=batch.dynamic_shapes, strict=strict
                    )
                )
            return _traced(lambda strict: _export_dynamic(model, example, axes, strict))
        except CaptureError:
            raise
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            msg = f"torch.export cannot capture {type(model).__name__} with these example inputs: {first.strip()}"
            raise CaptureError(msg) from error


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


def _export_dynamic(model: nn.Module, example: _Example, axes: Mapping[int, int], strict: bool) -> ExportedProgram:
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
    check_batch_limit(model, lambda size: example.with_batch_of(size, axes).arguments(), limit)
    return attempt(Dim("batch", min=1, max=limit))


def _batch_limit(message: str) -> int | None:
    """The largest batch that an error message of export names, None when it names none."""
    if limit := BATCH_LIMIT.search(message):
        return int(limit.group(1))
    if limit := MULTIPLE_LIMIT.search(message):
        bound, times = map(int, limit.groups())
        return (bound - 1) // times
    return None


def _read_back(program: ExportedProgram, numbers: Collection[int]) -> frozenset[int]:
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
