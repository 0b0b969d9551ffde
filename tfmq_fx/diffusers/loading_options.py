"""What ``from_pretrained(..., quantization_config=TFMQConfig(lower=…))`` says, kept where the folder has one too."""

from __future__ import annotations

from typing import Any

from tfmq_fx.diffusers.configuration import TFMQConfig

__all__ = ["keep_loading_options"]

#: Marks the method that was wrapped.
WRAPPED = "keeps_options_of_tfmq_fx"


def keep_loading_options(auto_quantizer: Any) -> None:
    """Let our configuration of a folder take up the options of the one that its user passes.

    diffusers warns that the user's is dropped, and drops it, for every method but one of its own.

    Args:
        auto_quantizer: ``DiffusersAutoQuantizer``.
    """
    merge = auto_quantizer.merge_quantization_configs
    if hasattr(merge, WRAPPED):
        return

    def merge_quantization_configs(
        cls: Any,  # the class, which `merge` is bound to
        quantization_config: Any,
        quantization_config_from_args: Any,
    ) -> Any:
        stored, asked = quantization_config, quantization_config_from_args
        if isinstance(asked, TFMQConfig):
            stored = auto_quantizer.from_dict(stored) if isinstance(stored, dict) else stored
            if isinstance(stored, TFMQConfig):
                return stored.loaded_with(asked)
        return merge(stored, asked)

    setattr(merge_quantization_configs, WRAPPED, True)
    auto_quantizer.merge_quantization_configs = classmethod(merge_quantization_configs)
