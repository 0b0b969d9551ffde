"""What a quantized model cannot do that a model of diffusers can: one sentence for each, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from tfmq_fx.errors import UnsupportedError

__all__ = ["REFUSALS", "refusing_methods"]

ATTENTION = (
    "how attention is computed is part of the compiled program; set it in the float model and quantize that, or leave "
    "it out"
)
FREE_U = "FreeU scales features between compiled layers; switch it on in the float pipeline and quantize that"
LORA = (
    "a LoRA changes float weights, and here they are integers; fuse it into the float model (pipe.load_lora_weights, "
    "pipe.fuse_lora) and quantize that"
)
ADAPTER = "image prompts add layers to the model; load them into the float pipeline and quantize that"
TRAINING = "its weights are integers and cannot be trained; train the float model and quantize that"
PLACEMENT = (
    "its weights are in compiled code, as integers, and are not moved or cast layer by layer; leave it out, or "
    "quantize the model in another dtype"
)
COMPILING = "it is compiled already; choose how with to_diffusers(program, lower=...) or TFMQConfig(lower=...)"
CACHING = "what is skipped between steps is decided between its layers, which are compiled; leave it out"
WEIGHTS = (
    "it has integers in place of its weights; write them with save_pretrained, read them with from_pretrained, and "
    "load the float model where float weights are needed"
)

#: The methods of diffusers' models that cannot be had, and why.
REFUSALS = {
    **dict.fromkeys(
        (
            "disable_xformers_memory_efficient_attention", "enable_forward_chunking", "disable_forward_chunking",
            "enable_xformers_memory_efficient_attention", "fuse_qkv_projections", "reset_attention_backend",
            "set_attention_backend", "set_attention_slice", "set_attn_processor", "set_default_attn_processor",
            "set_use_memory_efficient_attention_xformers", "set_use_npu_flash_attention",
            "set_use_xla_flash_attention", "unfuse_qkv_projections",
        ),
        ATTENTION,
    ),
    **dict.fromkeys(("disable_freeu", "enable_freeu"), FREE_U),
    **dict.fromkeys(
        (
            "add_adapter", "enable_lora_hotswap", "fuse_lora", "load_attn_procs", "load_lora_adapter",
            "save_attn_procs", "save_lora_adapter", "set_adapter", "set_adapters",
        ),
        LORA,
    ),
    **dict.fromkeys(("_load_ip_adapter_weights",), ADAPTER),
    **dict.fromkeys(("enable_gradient_checkpointing",), TRAINING),
    **dict.fromkeys(("enable_group_offload", "enable_layerwise_casting", "enable_parallelism"), PLACEMENT),
    **dict.fromkeys(("compile", "compile_repeated_blocks"), COMPILING),
    **dict.fromkeys(("enable_cache",), CACHING),
    **dict.fromkeys(("dequantize", "load_state_dict", "state_dict"), WEIGHTS),
}  # fmt: skip


def refusing_methods(original: type) -> dict[str, Callable[..., NoReturn]]:
    """A method that refuses for each of :data:`REFUSALS` that ``original`` has: it then has no more names than before.

    Args:
        original: A model class of diffusers.
    """
    return {name: _refusing(original, name) for name in REFUSALS if hasattr(original, name)}


def _refusing(original: type, name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        msg = f"a quantized {original.__name__} has no {name.lstrip('_')}: {REFUSALS[name]}"
        raise UnsupportedError(msg)

    refuse.__name__, refuse.__qualname__ = name, f"{original.__qualname__}.{name}"
    refuse.__doc__ = f"Raise an :class:`UnsupportedError`: {REFUSALS[name]}."
    return refuse
