"""Bind a call to an interface: names, structure, shapes, dtypes, devices, values; contiguous tensors come out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfmq_fx._torch import pytree
from tfmq_fx.errors import InputError
from tfmq_fx.frontend.interface import ConstantInput, Interface, TensorInput, dict_keys
from tfmq_fx.frontend.tensors import check_finite, check_memory, contiguous, described
from tfmq_fx.frontend.timesteps import bind_timestep

__all__ = ["Call", "bind", "named_arguments"]


@dataclass(frozen=True)
class Call:
    """A call in the captured form.

    Attributes:
        interface: What it was bound with.
        leaves: The value of each input; tensors are contiguous.
        batch: Its batch size; None where the program has a fixed one.
    """

    interface: Interface
    leaves: list[Any]
    batch: int | None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` in the captured structure."""
        return self.interface.arguments(self.leaves)

    def take(self, items: Tensor) -> Call:
        """The call for some items of the batch, int64 ``[n]``.

        Raises:
            InputError: An input has several entries for each item, so that a batch cannot be cut.
        """
        leaves = list(self.leaves)
        for index, expected in enumerate(self.interface.inputs):
            axis = expected.batch_axis if isinstance(expected, TensorInput) else None
            if axis is None or isinstance(expected, ConstantInput):
                continue
            size = expected.sizes[axis]
            if not isinstance(size, int) and size.times != 1:
                msg = f"a batch cannot be split here: {expected.name!r} is {expected}; call with a smaller batch"
                raise InputError(msg)
            leaves[index] = leaves[index].index_select(axis, items)
        return replace(self, leaves=leaves, batch=len(items))


def bind(interface: Interface, args: Sequence[Any], kwargs: Mapping[str, Any], timestep: str = "timestep") -> Call:
    """Bind the arguments of a call.

    Args:
        interface: What the program was captured with.
        args: Positional arguments, in the order of the model's own ``forward``.
        kwargs: Arguments by name.
        timestep: Name of the timestep input: it may be a number, 0-dim, ``[1]`` or one per item, whatever was captured.

    Raises:
        InputError: The call does not fit; one sentence says which argument differs and how.
    """
    return bind_named(interface, named_arguments(interface, args, kwargs), timestep)


def named_arguments(interface: Interface, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments by name.

    Raises:
        InputError: There are too many positional arguments, or one is given twice.
    """
    order = [parameter.name for parameter in interface.parameters if parameter.positional] or interface.names
    if len(args) > len(order):
        msg = f"this program takes {len(order)} arguments ({', '.join(order)}), not {len(args)}"
        raise InputError(msg)
    given = dict(zip(order, args, strict=False))
    if twice := [name for name in kwargs if name in given]:
        msg = f"argument {twice[0]!r} is given twice, by position and by name"
        raise InputError(msg)
    return {**given, **kwargs}


def bind_named(interface: Interface, given: Mapping[str, Any], timestep: str = "timestep") -> Call:
    """As :func:`bind`, from arguments by name."""
    leaves = _flat(interface, _completed(interface, given))
    batch = _batch(interface, leaves, timestep)
    for index, expected in enumerate(interface.inputs):
        if isinstance(expected, ConstantInput):
            _check_constant(expected, leaves[index])
        elif expected.name == timestep:
            leaves[index] = bind_timestep(expected, leaves[index], batch)
        else:
            leaves[index] = _tensor(expected, leaves[index], batch)
    return Call(interface, leaves, batch)


# -- names and structure -----------------------------------------------------------------------------------------


def _captured_with(interface: Interface) -> str:
    return f"this program was captured with ({', '.join(interface.names)})"


def _completed(interface: Interface, given: Mapping[str, Any]) -> list[Any]:
    """The value of every captured argument; one that is left out has the model's own default."""
    defaults = {parameter.name: parameter for parameter in interface.parameters}
    captured = set(interface.names)
    for name, value in given.items():
        if name in captured:
            continue
        default = defaults.get(name)
        unset = value is None if default is None else default.plain and _same(value, default.default)
        if not unset:
            msg = (
                f"argument {name!r} was not captured; {_captured_with(interface)}: capture it again with what you pass"
            )
            raise InputError(msg)
    values = []
    for name in interface.names:
        if name in given:
            values.append(given[name])
        elif (default := defaults.get(name)) is not None and not default.required:
            values.append(default.default)
        elif default is None and name in (nothing := _captured_as_none(interface)):
            values.append(nothing[name])
        else:
            msg = f"argument {name!r} is missing; {_captured_with(interface)}"
            raise InputError(msg)
    return values


def _captured_as_none(interface: Interface) -> dict[str, None]:
    return {leaf.name: None for leaf in interface.inputs if isinstance(leaf, ConstantInput) and leaf.value is None}


def _flat(interface: Interface, values: Sequence[Any]) -> list[Any]:
    """The leaves of the arguments, in the captured structure."""
    args, kwargs = interface.spec.children()
    leaves: list[Any] = []
    for name, spec, value in zip(interface.names, [*args.children(), *kwargs.children()], values, strict=True):
        _flatten_like(spec, value, name, leaves)
    return leaves


def _flatten_like(spec: pytree.TreeSpec, value: Any, name: str, leaves: list[Any]) -> None:
    if spec.is_leaf():
        leaves.append(value)
        return
    children = spec.children()
    keys = dict_keys(spec)
    if keys is not None:
        if not isinstance(value, Mapping) or set(value) != set(keys):
            found = sorted(map(str, value)) if isinstance(value, Mapping) else described(value)
            _refuse_structure(name, found, f"a dictionary of {sorted(map(str, keys))}")
        for key, child in zip(keys, children, strict=True):
            _flatten_like(child, value[key], f"{name}[{key!r}]", leaves)
    elif spec.type in (tuple, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(children):
            found = f"{len(value)} values" if isinstance(value, (tuple, list)) else described(value)
            _refuse_structure(name, found, f"a list of {len(children)}")
        for index, (child, item) in enumerate(zip(children, value, strict=True)):
            _flatten_like(child, item, f"{name}[{index}]", leaves)
    else:
        found_leaves, found_spec = pytree.tree_flatten(value)
        if found_spec != spec:
            _refuse_structure(name, described(value), f"a {getattr(spec.type, '__name__', spec.type)}")
        leaves.extend(found_leaves)


def _refuse_structure(name: str, found: object, captured: str) -> None:
    msg = f"argument {name!r} is {found}, but this program was captured with {captured}; capture it again for this"
    raise InputError(msg)


# -- values ------------------------------------------------------------------------------------------------------


def _same(value: Any, other: Any) -> bool:
    """Whether two plain values are equal; True is not 1."""
    if isinstance(value, Tensor) and value.ndim == 0 and isinstance(other, (int, float)):
        value = value.item()
    if isinstance(value, bool) or isinstance(other, bool) or value is None or other is None:
        return value is other
    return isinstance(value, (int, float, str)) and isinstance(other, (int, float, str)) and value == other


def _check_constant(expected: ConstantInput, value: Any) -> None:
    if not _same(value, expected.value):
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected.value!r}, "
            "which is part of it; capture it again with what you pass"
        )
        raise InputError(msg)


def _batch(interface: Interface, leaves: Sequence[Any], timestep: str) -> int | None:
    """The batch size: that of the first input that has one and is not the timestep; else the timestep's own."""
    found: int | None = None
    for expected, leaf in zip(interface.inputs, leaves, strict=True):
        axis = expected.batch_axis if isinstance(expected, TensorInput) else None
        if axis is None or isinstance(expected, ConstantInput) or not isinstance(leaf, Tensor) or leaf.ndim <= axis:
            continue
        size = expected.sizes[axis]
        count, rest = divmod(int(leaf.shape[axis]), size if isinstance(size, int) else size.times)
        if count == 0 or rest:
            msg = f"argument {expected.name!r} has shape {list(leaf.shape)}, where this program takes {expected}"
            raise InputError(msg)
        if expected.name != timestep:
            return count
        found = count
    return found if found is not None or interface.fixed_batch else 1


def _tensor(expected: TensorInput, value: Any, batch: int | None) -> Tensor:
    """A tensor as it was captured, but for its memory format."""
    if not expected.sizes and isinstance(value, (int, float)):
        value = _number(expected, value)
    shape = expected.shape(batch)
    if not isinstance(value, Tensor) or list(value.shape) != shape:
        rest = "" if batch is None else f" (here the batch is {batch})"
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected}{rest}; "
            "capture it again for this shape"
        )
        raise InputError(msg)
    if value.dtype != expected.dtype and _widens(value.dtype, expected.dtype):
        value = value.to(expected.dtype)
    if value.dtype != expected.dtype or value.device.type != expected.device or value.layout is not torch.strided:
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected} on "
            f"{expected.device}; convert it before the call"
        )
        raise InputError(msg)
    check_memory(value, expected.name)
    check_finite(value, expected.name, mask=expected.mask)
    return contiguous(value)


def _widens(given: torch.dtype, captured: torch.dtype) -> bool:
    """Whether every integer of one dtype is one of the other."""
    widths: Collection[torch.dtype] = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return captured is torch.int64 and given in widths


def _number(expected: TensorInput, value: int | float) -> Any:
    """A number for a 0-dim input; itself, which is refused, where the input's dtype cannot hold it."""
    boolean = isinstance(value, bool)
    if boolean is not (expected.dtype is torch.bool):
        return value
    whole = boolean or float(value).is_integer()
    return torch.tensor(value, dtype=expected.dtype) if whole or expected.dtype.is_floating_point else value
