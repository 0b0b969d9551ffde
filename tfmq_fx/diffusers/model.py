"""A quantized model that is its original class to diffusers: its empty skeleton, and a program that computes.

The skeleton is an instance of the original class and has all that pipelines read: configuration, sizes, embedders,
rotary positions. It has no weights; a parameter without elements says dtype and device. What computes, casts, saves or
changes it is bound to the instance (:mod:`tfmq_fx.diffusers.methods`, :mod:`tfmq_fx.diffusers.refusals`), because
diffusers compares classes by identity.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from tfmq_fx.diffusers.configuration import QuantMethod
from tfmq_fx.diffusers.methods import METHODS
from tfmq_fx.diffusers.output_class import output_class
from tfmq_fx.diffusers.refusals import refusing_methods
from tfmq_fx.diffusers.served import RETURN_DICT, ServedProgram

__all__ = ["serve_"]

#: The parameter that stands for all weights.
PLACEHOLDER = "quantized"


def serve_(model: nn.Module, served: ServedProgram) -> None:
    """Make a model of diffusers compute with a quantized program, in place.

    Args:
        model: An instance of the class that was quantized; its weights are given up.
        served: The program. It is ``model.served`` from then on.
    """
    _empty_(model, served.dtype)
    methods = {"forward": _forward_of(type(model)), **METHODS, **refusing_methods(type(model))}
    values = {
        "served": served,
        # What diffusers sets on quantized models, and asks them for.
        "is_quantized": True,
        "quantization_method": QuantMethod.TFMQ,
        **{name: MethodType(method, model) for name, method in methods.items()},
    }
    for name, value in values.items():
        setattr(model, name, value)
    model.eval()


def _empty_(model: nn.Module, dtype: torch.dtype) -> None:
    """Take out of ``model`` all that a state dict of it holds; what its layers compute themselves stays."""
    stored = set(model.state_dict())
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if prefix + name in stored:
                setattr(module, name, None)
    model.register_parameter(PLACEHOLDER, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


def _forward_of(model_class: Any) -> Callable[..., Any]:
    """``forward`` of a model class, with its signature, computed by the program."""
    parameter = inspect.signature(model_class.forward).parameters.get(RETURN_DICT)
    default = parameter is None or parameter.default is not False
    outputs = output_class(model_class)

    @functools.wraps(model_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.served.call(args, kwargs, outputs, default)

    return forward
