"""Example inputs for diffusers denoisers, made from their signature and configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tfmq_fx.data.model_inputs import sample_shape
from tfmq_fx.errors import CaptureError, ConfigError

__all__ = ["example_inputs", "unconditional_inputs"]

BATCH = 2
#: Length of an example prompt; models accept any.
TOKENS = 8
#: SDXL's original size, crop corner and target size.
TIME_IDS = 6


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs by name that ``model`` can be captured with, batch 2.

    Covers samples, timesteps, class labels, text embeddings and SDXL's added conditions.

    Raises:
        CaptureError: The model needs an input that its configuration does not describe.
    """
    config: Mapping[str, Any] = getattr(model, "config", None) or {}
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    for position, (name, parameter) in enumerate(parameters.items()):
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        value = torch.randn(BATCH, *_sample(model, config)) if position == 0 else _input(name, config)
        if value is not None:
            inputs[name] = value
        elif required:
            msg = (
                f"{type(model).__name__} needs {name!r}, which the command line cannot make up; "
                "capture it from Python with tfmq_fx.capture(model, example_inputs)"
            )
            raise CaptureError(msg)
    return inputs


def unconditional_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs for a model that needs nothing but a sample and a timestep.

    Raises:
        ConfigError: It needs more, such as a prompt.
    """
    inputs = example_inputs(model)
    further = [name for name in list(inputs)[1:] if name != "timestep"]
    if further:
        msg = (
            f"{type(model).__name__} also takes {', '.join(further)}, and the command line samples without; "
            "from Python, tfmq_fx.record_trajectories records its pipeline and tfmq_fx.quantize takes it from there"
        )
        raise ConfigError(msg)
    return inputs


def _sample(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return sample_shape(config, type(model).__name__)
    except ConfigError as error:
        raise CaptureError(str(error)) from error


def _input(name: str, config: Mapping[str, Any]) -> Any:
    """An example of the input with this name, or None when the model does without."""
    if name == "timestep":
        return torch.ones(BATCH, dtype=torch.int64)
    if name == "class_labels" and (config.get("num_class_embeds") or config.get("norm_type") == "ada_norm_zero"):
        return torch.zeros(BATCH, dtype=torch.int64)
    if name == "encoder_hidden_states" and isinstance(config.get("cross_attention_dim"), int):
        return torch.randn(BATCH, TOKENS, config["cross_attention_dim"])
    if name == "added_cond_kwargs" and config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        return {"text_embeds": torch.randn(BATCH, width), "time_ids": torch.ones(BATCH, TIME_IDS)}
    return None
