"""The model that a program was made from, without weights, and whether the two go together."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from tfmq_fx.errors import ArtefactError, UnsupportedError
from tfmq_fx.frontend.interface import Interface
from tfmq_fx.frontend.plain_config import plain_config

__all__ = ["check_accelerate", "check_same_model", "empty_model", "find_model_class"]


def check_accelerate() -> None:
    """Find out whether accelerate is installed, with which diffusers makes models without weights.

    Raises:
        UnsupportedError: It is not.
    """
    if importlib.util.find_spec("accelerate") is None:
        msg = 'quantized models of diffusers need accelerate: pip install "tfmq-fx[diffusers]"'
        raise UnsupportedError(msg)


def find_model_class(interface: Interface) -> type:
    """The class of diffusers whose model was captured.

    Args:
        interface: What the program says of that model; it may come from anyone.

    Raises:
        UnsupportedError: It is none of diffusers'.
    """
    import diffusers

    name = interface.model_class
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        msg = (
            f"the program was made from {name[:60] or 'a graph'!r}, which is no model class of diffusers: pass "
            "model_class=, or call the denoiser itself (tfmq_fx.lower)"
        )
        raise UnsupportedError(msg)
    return found


def empty_model(model_class: Any, interface: Interface) -> nn.Module:
    """A model of this class and of the configuration that was captured, with its parameters on the meta device.

    Raises:
        UnsupportedError: accelerate is not installed, or the class does not take the configuration.
    """
    check_accelerate()
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    try:
        with no_init_weights(), init_empty_weights():
            model: nn.Module = model_class.from_config(interface.config)
    except (AttributeError, TypeError, ValueError) as error:
        msg = f"{model_class.__name__} cannot be made from the configuration of the program: {error}"
        raise UnsupportedError(msg) from error
    return model


def check_same_model(model: nn.Module, interface: Interface, where: str) -> None:
    """Find out whether a model is what a program was made from, as far as pipelines see it.

    Args:
        model: Made from ``config.json``.
        interface: What the program says of the model that was captured.
        where: The folder, for the message.

    Raises:
        ArtefactError: It is of another class, or its configuration has another value.
    """
    if type(model).__name__ != interface.model_class:
        msg = f"{where} holds a quantized {interface.model_class[:60]!r}; load it with that class"
        raise ArtefactError(msg)
    config = plain_config(model)
    for name, value in interface.config.items():
        if name in config and not name.startswith("_") and config[name] != value:
            msg = (
                f"{where}: {name!r} is {str(config[name])[:60]} in config.json, but the quantized program was made "
                f"with {str(value)[:60]}; copy or save the model again"
            )
            raise ArtefactError(msg)
