"""What a quantized model does otherwise than the class that it is an instance of: methods that are bound to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.diffusers.folder import save_model
from tfmq_fx.diffusers.refusals import TRAINING
from tfmq_fx.errors import UnsupportedError

__all__ = ["METHODS"]


def to(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model, for the dtype and device that it has.

    Raises:
        UnsupportedError: For others.
    """
    # Past the method of diffusers, which refuses the same dtype too.
    return nn.Module.to(model, *args, **kwargs)


def half(model: Any, *args: Any) -> Any:
    """As ``to(torch.float16)``."""
    return to(model, torch.float16)


def as_float(model: Any, *args: Any) -> Any:
    """As ``to(torch.float32)``."""
    return to(model, torch.float32)


def cuda(model: Any, device: int | torch.device | None = None) -> Any:
    """As ``to("cuda")``."""
    return to(model, "cuda")


def apply_to_tensors(model: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """What moves and casts a module calls this, with what it does to each tensor."""
    try:
        requested = fn(torch.empty(0, dtype=model.dtype))
    except (AssertionError, RuntimeError) as error:  # a torch without that device
        msg = f"a quantized model runs on the CPU, and cannot be moved elsewhere ({error}); leave it there"
        raise UnsupportedError(msg) from error
    if requested.dtype != model.dtype:
        own, other = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, requested.dtype))
        msg = (
            f"a quantized model stays in {own}, and cannot be cast to {other}: leave the cast out, or quantize the "
            "float model in that dtype"
        )
        raise UnsupportedError(msg)
    if requested.device.type != "cpu":
        msg = (
            f"a quantized model runs on the CPU, and cannot be moved to {requested.device}: leave the pipeline there, "
            "and move other components one by one"
        )
        raise UnsupportedError(msg)
    return model


def train(model: Any, mode: bool = True) -> Any:
    """The model, in evaluation mode.

    Raises:
        UnsupportedError: Training mode is asked for.
    """
    if mode:
        msg = f"a quantized {type(model).__name__} has no training mode: {TRAINING}"
        raise UnsupportedError(msg)
    return nn.Module.train(model, False)


def requires_grad(model: Any, requires_grad: bool = True) -> Any:
    """The model.

    Raises:
        UnsupportedError: Gradients are asked for.
    """
    if requires_grad:
        msg = f"a quantized {type(model).__name__} has no gradients: {TRAINING}"
        raise UnsupportedError(msg)
    return model


def memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Bytes of the quantized weights, tables and parameters."""
    footprint: int = model.served.memory_footprint()
    return footprint


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **kwargs: Any,
) -> None:
    """Write the model so that ``from_pretrained`` loads it: its configuration, and an artefact of tfmq_fx.

    Args:
        model: The model.
        save_directory: The folder.
        is_main_process: Whether to write at all, where several processes hold the model.
        save_function: Not supported.
        safe_serialization: False, which would pickle, is refused.
        variant: As diffusers means it: part of the name of the file that ``from_pretrained`` looks for.
        max_shard_size: Of no effect: an artefact is one file of tensors.
        push_to_hub: Not supported.
        use_flashpack: Not supported.
        **kwargs: Of no effect.

    Raises:
        UnsupportedError: What is not supported is asked for, or the model was made from a denoiser alone.
        ArtefactError: The folder holds something else, or cannot be written.
    """
    refused = {
        "safe_serialization=False": (not safe_serialization, "its files are never pickled; leave it out"),
        "save_function": (save_function is not None, "its files are written by tfmq_fx; leave it out"),
        "use_flashpack": (use_flashpack, "an artefact is a safetensors file; leave it out"),
        "push_to_hub": (push_to_hub, "save to a folder, and upload that with huggingface_hub.upload_folder"),
    }
    for name, (asked, advice) in refused.items():
        if asked:
            msg = f"a quantized {type(model).__name__} cannot be saved with {name}: {advice}"
            raise UnsupportedError(msg)
    if is_main_process:
        save_model(model, model.served.program, save_directory, variant)


#: The methods by the names that diffusers and torch call them by.
METHODS: dict[str, Callable[..., Any]] = {
    "_apply": apply_to_tensors,
    "cuda": cuda,
    "float": as_float,
    "get_memory_footprint": memory_footprint,
    "half": half,
    "requires_grad_": requires_grad,
    "save_pretrained": save_pretrained,
    "to": to,
    "train": train,
}
