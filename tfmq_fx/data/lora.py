r"""Fuse a LoRA into the weights of a model: :math:`W \leftarrow W + s \frac{\alpha}{r} B A`.

Source: LoRA (Hu et al., ICLR 2022), section 4.1. The files of diffusers, peft and kohya's scripts are read, as
safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tfmq_fx.config.checks import check_number
from tfmq_fx.errors import ConfigError

__all__ = ["fuse_lora"]

#: How the names of the two factors and of alpha end. Older files name a layer's factors behind its attention's
#: processor.
PARTS = (
    (re.compile(r"(?P<layer>.+)\.(?:lora_A|lora_down)(?:\.default)?\.weight"), "down"),
    (re.compile(r"(?P<layer>.+)\.(?:lora_B|lora_up)(?:\.default)?\.weight"), "up"),
    (re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight"), ""),
    (re.compile(r"(?P<layer>.+)_lora\.(?P<part>down|up)\.weight"), ""),
    (re.compile(r"(?P<layer>.+)\.alpha"), "alpha"),
)
#: What stands before the names of layers: of the denoiser, and of other models of the pipeline, which are passed over.
PREFIXES = ("unet.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "base_model.model.")
OTHERS = ("text_encoder", "lora_te", "vae.")
#: Where diffusers writes what peft was configured with.
METADATA = "lora_adapter_metadata"
LIBRARY = (
    "let diffusers do it: pipe.load_lora_weights(…), pipe.fuse_lora(), pipe.unload_lora_weights(), which need peft"
)


@torch.no_grad()
def fuse_lora(model: nn.Module, lora: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> tuple[str, ...]:
    """Add a LoRA to the weights of a float model, in place; with ``-scale`` it is taken out again, up to rounding.

    Linears and convolutions with factors of one rank are fused, by their names in the model. What a file has for other
    models of the pipeline, such as text encoders, is left alone.

    Args:
        model: The float denoiser, such as ``pipe.unet``.
        lora: A ``.safetensors`` file, or the tensors by name: ``lora_A`` and ``lora_B``, or ``down`` and ``up``, with
            ``alpha`` where it is not the rank.
        scale: Its strength.

    Returns:
        The names of the layers that were changed.

    Raises:
        ConfigError: The file is no safetensors file; it does not fit the model; or it holds more than two factors a
            layer, as DoRA and LoKr do. The model is as it was then.
    """
    strength = check_number("scale", scale, -1e3, 1e3)
    what, tensors, metadata = _read(lora)
    layers = {name: module for name, module in model.named_modules() if _weight(module) is not None}
    flat = {name.replace(".", "_"): name for name in layers}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(OTHERS):
            continue
        layer, part = _parsed(key, what)
        name = next((name for name in _candidates(layer, flat) if name in layers), None)
        if name is None:
            _refuse(what, f"it has {key!r}, and the model has no such layer")
        factors.setdefault(name, {})[part] = value
    if not factors:
        _refuse(what, "it holds nothing for the denoiser")
    usual = _usual_scaling(metadata, what)
    changes = {name: _change(name, parts, layers[name], usual, what) for name, parts in factors.items()}
    for name, change in changes.items():
        weight = _weight(layers[name])
        assert weight is not None
        weight.copy_((weight.float() + strength * change()).to(weight.dtype))
    return tuple(changes)


def _read(lora: Any) -> tuple[str, Mapping[str, Tensor], dict[str, str]]:
    """What the source is called, its tensors, and its metadata."""
    if isinstance(lora, Mapping):
        return "the LoRA", lora, {}
    path = Path(lora)
    what = f"the LoRA {str(path)!r}"
    if not path.is_file():
        msg = f"there is no LoRA file {str(path)!r}"
        raise ConfigError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            return what, {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        msg = f"{what} is no safetensors file ({error}), and no other is read; convert it with the tool that made it"
        raise ConfigError(msg) from error


def _refuse(what: str, problem: str) -> NoReturn:
    msg = f"{what} cannot be fused: {problem}; check that it belongs to this model, or {LIBRARY}"
    raise ConfigError(msg)


def _parsed(key: str, what: str) -> tuple[str, str]:
    """The layer that a name is of, and which part of it."""
    for pattern, part in PARTS:
        if match := pattern.fullmatch(key):
            return match["layer"], part or match["part"]
    _refuse(what, f"{key!r} is neither a factor nor an alpha")


def _candidates(layer: str, flat: Mapping[str, str]) -> list[str]:
    """The names that a layer may have in the model."""
    names = [layer, *(layer.removeprefix(prefix) for prefix in PREFIXES)]
    # Attention processors stand beside the layers that their names end in.
    names += [name.replace(".processor.", ".") for name in names]
    names += [f"{name}.0" for name in names if name.endswith("to_out")]
    return [*names, *(flat[name] for name in names if name in flat)]


def _weight(module: nn.Module) -> Tensor | None:
    is_layer = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return module.weight if is_layer else None  # type: ignore[return-value]  # a module's attribute may be a module


def _usual_scaling(metadata: Mapping[str, str], what: str) -> float | None:
    """What the product is multiplied by where a layer has no alpha: alpha over rank; None where the file is silent.

    Raises:
        ConfigError: The file asks for more than that.
    """
    if METADATA not in metadata:
        return None
    try:
        values: dict[str, Any] = json.loads(metadata[METADATA])
    except ValueError as error:
        _refuse(what, f"its metadata is no JSON ({error})")
    fields = {key.rpartition(".")[2]: value for key, value in values.items() if not key.startswith(OTHERS)}
    for name in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern"):
        if fields.get(name):
            _refuse(what, f"it was trained with {name}")
    if "lora_alpha" not in fields or not fields.get("r"):
        return None
    return float(fields["lora_alpha"]) / float(fields["r"])


def _change(
    name: str, parts: Mapping[str, Tensor], layer: nn.Module, usual: float | None, what: str
) -> Callable[[], Tensor]:
    """Makes what is added to a layer's weight at strength 1, float32; everything is checked before."""
    if "down" not in parts or "up" not in parts:
        _refuse(what, f"layer {name!r} has one factor instead of two")
    down, up, weight = parts["down"], parts["up"], _weight(layer)
    assert weight is not None
    rank = down.shape[0]
    fits = up.flatten(1).shape == (weight.shape[0], rank) and math.prod(down.shape[1:]) == math.prod(weight.shape[1:])
    if not fits or getattr(layer, "groups", 1) != 1:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        _refuse(what, f"factors of {shapes} do not make up the weight {list(weight.shape)} of {name!r}")
    if not all(bool(torch.isfinite(factor.float()).all()) for factor in parts.values()):
        _refuse(what, f"layer {name!r} has NaN or infinite values")
    scaling = float(parts["alpha"]) / rank if "alpha" in parts else 1.0 if usual is None else usual
    return lambda: scaling * (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
