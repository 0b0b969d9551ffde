"""The observers of activations by name; configurations, the quantizer and the command line derive from this."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from tfmq_fx.errors import ConfigError
from tfmq_fx.observers.activation import EMAMinMaxObserver, MinMaxObserver, MSEObserver, PerTensorObserver
from tfmq_fx.observers.grouped import (
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    GroupedObserver,
)

__all__ = [
    "ActivationObserver",
    "RecordedObserver",
    "activation_observer",
    "activation_observer_names",
    "check_activation_observer",
    "register_activation_observer",
    "unregister_activation_observer",
]


@dataclass(frozen=True)
class ActivationObserver:
    """How activation ranges are chosen, under the name that ``QuantizationConfig.activation_range`` takes.

    Attributes:
        name: What a configuration calls it.
        per_tensor: One range per tensor.
        grouped: One range per group of timesteps (``activation_groups``); None where there is no such form.
    """

    name: str
    per_tensor: type[PerTensorObserver]
    grouped: type[GroupedObserver] | None = None


class RecordedObserver(str):
    """The name of the observer that ranges were chosen with, in the configuration of a program that has them.

    Nothing is observed any more, so a configuration takes it whether or not it is registered here. Who prepares a model
    with such a configuration needs the observer itself.
    """

    __slots__ = ()


_OBSERVERS: dict[str, ActivationObserver] = {
    entry.name: entry
    for entry in (
        ActivationObserver("ema", EMAMinMaxObserver, GroupedEMAObserver),
        ActivationObserver("minmax", MinMaxObserver, GroupedMinMaxObserver),
        ActivationObserver("mse", MSEObserver, GroupedMSEObserver),
    )
}
#: Ours; one that takes the place of one of them gives it back.
_BUILT_IN = dict(_OBSERVERS)


def register_activation_observer(
    name: str,
    per_tensor: type[PerTensorObserver],
    grouped: type[GroupedObserver] | None = None,
    *,
    override: bool = False,
) -> ActivationObserver:
    """Let configurations name an observer of activations: ``QuantizationConfig(activation_range=name)``.

    Args:
        name: A new name.
        per_tensor: Made as ``per_tensor(dtype=…, quant_min=…, quant_max=…, qscheme=…, subject=…)`` once per activation;
            it implements ``forward``, which returns its input itself, and ``observed_range``, two float tensors
            ``[1]``.
        grouped: Made as ``grouped(groups, bits, subject)``; it implements ``observe``. Without one, configurations with
            ``activation_groups`` above 1 refuse the name.
        override: Whether to replace an observer of the same name.

    Raises:
        ConfigError: The name is taken or empty, or a class is not of the kind that its place takes: another base, a
            method missing, or other arguments.
    """
    if not isinstance(name, str) or not name:
        msg = f"the name of an observer must be a string that is not empty, not {name!r}"
        raise ConfigError(msg)
    if name in _OBSERVERS and not override:
        msg = f"an observer {name!r} is registered already; choose another name, or pass override=True"
        raise ConfigError(msg)
    _check_class(name, "per_tensor", per_tensor, PerTensorObserver)
    _check_methods(name, per_tensor, PerTensorObserver, ("forward", "observed_range"))
    _check_arguments(name, per_tensor, dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine,
                     subject="")  # fmt: skip
    if grouped is not None:
        _check_class(name, "grouped", grouped, GroupedObserver)
        if grouped.forward is GroupedObserver.forward:
            _check_methods(name, grouped, GroupedObserver, ("observe",))
        _check_arguments(name, grouped, 2, 8, "")
    _OBSERVERS[name] = ActivationObserver(name, per_tensor, grouped)
    return _OBSERVERS[name]


def unregister_activation_observer(name: str) -> None:
    """Take back :func:`register_activation_observer`; one of ours of that name is there again.

    Raises:
        ConfigError: There is no such observer, or it is one of ours, which configurations name by default.
    """
    entry = activation_observer(name)
    if _BUILT_IN.get(name) is entry:
        msg = f"the observer {name!r} belongs to tfmq_fx and was not registered by a call; it cannot be taken back"
        raise ConfigError(msg)
    if name in _BUILT_IN:
        _OBSERVERS[name] = _BUILT_IN[name]
    else:
        del _OBSERVERS[name]


def activation_observer_names() -> tuple[str, ...]:
    """The names of all observers, in the order of their registration."""
    return tuple(_OBSERVERS)


def activation_observer(name: str) -> ActivationObserver:
    """The observer that is registered under ``name``.

    Raises:
        ConfigError: There is none.
    """
    check_activation_observer(str(name) if isinstance(name, RecordedObserver) else name)
    return _OBSERVERS[name]


def check_activation_observer(name: Any, *, grouped: bool = False) -> None:
    """Check a configuration's ``activation_range``.

    Args:
        name: The name; any that is a :class:`RecordedObserver`.
        grouped: Whether a form for timestep groups is needed.

    Raises:
        ConfigError: No observer is registered under this name, or none with such a form.
    """
    if isinstance(name, RecordedObserver) and name:
        return
    if not isinstance(name, str) or name not in _OBSERVERS:
        msg = (
            f"activation_range={' '.join(repr(name).split())} is not supported: use one of "
            f"{', '.join(map(repr, _OBSERVERS))}, or register "
            "an observer with tfmq_fx.observers.register_activation_observer first"
        )
        raise ConfigError(msg)
    if grouped and _OBSERVERS[name].grouped is None:
        msg = (
            f"activation_range={name!r} was registered without a grouped observer, which activation_groups needs: "
            "register it with grouped=, or use activation_groups=1"
        )
        raise ConfigError(msg)


def _check_class(name: str, argument: str, value: object, base: type) -> None:
    if not (isinstance(value, type) and issubclass(value, base)):
        msg = f"observer {name!r}: {argument}= must be a subclass of tfmq_fx.observers.{base.__name__}, not {value!r}"
        raise ConfigError(msg)


def _check_methods(name: str, value: type, base: type, needed: tuple[str, ...]) -> None:
    missing = [method for method in needed if getattr(value, method) is getattr(base, method)]
    if missing:
        msg = f"observer {name!r}: {value.__name__} has no {' and no '.join(missing)} of its own; implement that"
        raise ConfigError(msg)


def _check_arguments(name: str, value: type, *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(value).bind(*args, **kwargs)
    except TypeError as error:
        form = "groups, bits, subject" if args else ", ".join(f"{argument}=…" for argument in kwargs)
        msg = f"observer {name!r}: {value.__name__} cannot be made as {value.__name__}({form}): {error}"
        raise ConfigError(msg) from error
