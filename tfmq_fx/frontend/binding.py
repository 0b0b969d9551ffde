"""Bind a call to an interface: names, structure, shapes, dtypes, devices, values; contiguous tensors come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tfmq_fx._torch import pytree
from tfmq_fx.errors import InputError
from tfmq_fx.frontend.argument_values import bind_tensor, check_constant, equal_scalars
from tfmq_fx.frontend.interface import ConstantInput, Interface, TensorInput
from tfmq_fx.frontend.leaf_names import dict_keys
from tfmq_fx.frontend.tensors import described
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
    arguments = dict(zip(order, args, strict=False))
    if duplicates := [name for name in kwargs if name in arguments]:
        msg = f"argument {duplicates[0]!r} is given twice, by position and by name"
        raise InputError(msg)
    return {**arguments, **kwargs}


def bind_named(interface: Interface, arguments: Mapping[str, Any], timestep: str = "timestep") -> Call:
    """As :func:`bind`, from arguments by name."""
    leaves = _flatten(interface, _with_defaults(interface, arguments))
    batch = _batch_size(interface, leaves, timestep)
    for index, expected in enumerate(interface.inputs):
        if isinstance(expected, ConstantInput):
            check_constant(expected, leaves[index])
        elif expected.name == timestep:
            leaves[index] = bind_timestep(expected, leaves[index], batch)
        else:
            leaves[index] = bind_tensor(expected, leaves[index], batch)
    return Call(interface, leaves, batch)


def _captured_names(interface: Interface) -> str:
    return f"this program was captured with ({', '.join(interface.names)})"


def _with_defaults(interface: Interface, arguments: Mapping[str, Any]) -> list[Any]:
    """The value of every captured argument; one that is left out has the model's own default."""
    defaults = {parameter.name: parameter for parameter in interface.parameters}
    captured = set(interface.names)
    for name, value in arguments.items():
        if name in captured:
            continue
        default = defaults.get(name)
        is_default = value is None if default is None else default.plain and equal_scalars(value, default.default)
        if not is_default:
            msg = (
                f"argument {name!r} was not captured; {_captured_names(interface)}: capture it again with what you pass"
            )
            raise InputError(msg)
    values = []
    for name in interface.names:
        if name in arguments:
            values.append(arguments[name])
        elif (default := defaults.get(name)) is not None and not default.required:
            values.append(default.default)
        elif default is None and name in (nones := _captured_nones(interface)):
            values.append(nones[name])
        else:
            msg = f"argument {name!r} is missing; {_captured_names(interface)}"
            raise InputError(msg)
    return values


def _captured_nones(interface: Interface) -> dict[str, None]:
    return {leaf.name: None for leaf in interface.inputs if isinstance(leaf, ConstantInput) and leaf.value is None}


def _flatten(interface: Interface, values: Sequence[Any]) -> list[Any]:
    """The leaves of the arguments, in the captured structure."""
    args, kwargs = interface.spec.children()
    leaves: list[Any] = []
    for name, spec, value in zip(interface.names, [*args.children(), *kwargs.children()], values, strict=True):
        _append_leaves(spec, value, name, leaves)
    return leaves


def _append_leaves(spec: pytree.TreeSpec, value: Any, name: str, leaves: list[Any]) -> None:
    if spec.is_leaf():
        leaves.append(value)
        return
    children = spec.children()
    keys = dict_keys(spec)
    if keys is not None:
        if not isinstance(value, Mapping) or set(value) != set(keys):
            actual = sorted(map(str, value)) if isinstance(value, Mapping) else described(value)
            _raise_structure_error(name, actual, f"a dictionary of {sorted(map(str, keys))}")
        for key, child in zip(keys, children, strict=True):
            _append_leaves(child, value[key], f"{name}[{key!r}]", leaves)
    elif spec.type in (tuple, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(children):
            actual = f"{len(value)} values" if isinstance(value, (tuple, list)) else described(value)
            _raise_structure_error(name, actual, f"a list of {len(children)}")
        for index, (child, item) in enumerate(zip(children, value, strict=True)):
            _append_leaves(child, item, f"{name}[{index}]", leaves)
    else:
        value_leaves, value_spec = pytree.tree_flatten(value)
        if value_spec != spec:
            _raise_structure_error(name, described(value), f"a {getattr(spec.type, '__name__', spec.type)}")
        leaves.extend(value_leaves)


def _raise_structure_error(name: str, actual: object, captured: str) -> None:
    msg = f"argument {name!r} is {actual}, but this program was captured with {captured}; capture it again for this"
    raise InputError(msg)


def _batch_size(interface: Interface, leaves: Sequence[Any], timestep: str) -> int | None:
    """The batch size: that of the first input that has one and is not the timestep; else the timestep's own."""
    timestep_batch: int | None = None
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
        timestep_batch = count
    return timestep_batch if timestep_batch is not None or interface.fixed_batch else 1
