"""The example inputs of an export, leaf by leaf: their names, their batch axes, and the variants that are traced."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx._torch import pytree
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.leaf_names import leaf_names
from tfmq_fx.frontend.tensors import contiguous

__all__ = ["Batched", "ExportInputs", "check_batched"]

#: Names of inputs whose first axis is the batch (a string is one name), or the axis by name.
Batched = Collection[str] | Mapping[str, int]


def check_batched(batched: Any) -> None:
    """Raise :class:`CaptureError` unless this is a :data:`Batched`, or None."""
    axes = batched.values() if isinstance(batched, Mapping) else ()
    names = isinstance(batched, Collection) and all(isinstance(name, str) for name in batched)
    if batched is not None and not (names and all(type(axis) is int for axis in axes)):
        msg = f"batched={batched!r} must be names of inputs, such as ('sample',), or their batch axes, {{'sample': 0}}"
        raise CaptureError(msg)


@dataclass(frozen=True)
class ExportInputs:
    """Example inputs, leaf by leaf, with a name for each."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    names: list[str]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportInputs:
        """Bind and flatten; tensors in any memory format are normal input, so the graph is that of contiguous ones."""
        args, kwargs, names = _bind_examples(model, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        contiguous_leaves = [contiguous(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(contiguous_leaves, spec, leaf_names(names, spec))

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
        for name in (batched,) if isinstance(batched, str) else batched:
            axis = batched[name] if isinstance(batched, Mapping) else 0
            matches = [
                index for index in tensors if self.names[index] == name or self.names[index].startswith(f"{name}[")
            ]
            if not matches or any(not 0 <= axis < tensors[index].ndim for index in matches):
                available = ", ".join(f"{self.names[i]!r} {list(leaf.shape)}" for i, leaf in tensors.items())
                msg = f"batched= names axis {axis} of {name!r}, which no tensor input has; the tensors are {available}"
                raise CaptureError(msg)
            axes.update(dict.fromkeys(matches, axis))
        sizes = {self.names[index]: self.leaves[index].shape[axis] for index, axis in axes.items()}
        if len(set(sizes.values())) > 1:
            msg = f"the inputs of batched= differ in their batch: {', '.join(f'{n} {s}' for n, s in sizes.items())}"
            raise CaptureError(msg)
        return axes

    def with_batch_of_two(self, axes: Mapping[int, int]) -> ExportInputs:
        """A batch of one repeated: export would take it for a constant."""
        leaves = list(self.leaves)
        for index, axis in axes.items():
            if leaves[index].shape[axis] == 1:
                leaves[index] = torch.cat([leaves[index], leaves[index]], axis)
        return replace(self, leaves=leaves)

    def with_batch_size(self, size: int, axes: Mapping[int, int]) -> ExportInputs:
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

    def with_tensors(self, numbers: Collection[int]) -> ExportInputs:
        """With these numbers as 0-dim tensors."""
        leaves = [torch.tensor(leaf) if index in numbers else leaf for index, leaf in enumerate(self.leaves)]
        return replace(self, leaves=leaves)


def _bind_examples(
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
        takes_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not takes_position or name not in bound.arguments:
            break
        positional.append(bound.arguments[name])
    positional_names = list(signature.parameters)[: len(positional)]
    if variadic := bound.args[len(positional) :]:
        numbered = [f"argument {len(positional) + index}" for index in range(len(variadic))]
        return (*positional, *variadic), bound.kwargs, [*positional_names, *numbered, *bound.kwargs]
    rest = {name: value for name, value in bound.arguments.items() if name not in positional_names}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in rest:
            rest.update(rest.pop(name))
    return tuple(positional), rest, [*positional_names, *rest]
