"""A place in diffusers: a quantized model that is its original class there, saved and loaded by diffusers' own calls.

Importing ``tfmq_fx`` is enough for ``from_pretrained`` to load what was saved; neither imports the other. Each name is
imported when it is first used, since diffusers takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_fx.diffusers.configuration import TFMQConfig
    from tfmq_fx.diffusers.convert import to_diffusers
    from tfmq_fx.diffusers.pipeline_quantization import quantize_pipeline
    from tfmq_fx.diffusers.quantizer import TFMQDiffusersQuantizer

__all__ = ["TFMQConfig", "TFMQDiffusersQuantizer", "quantize_pipeline", "to_diffusers"]

_MODULES = {
    "TFMQConfig": "configuration",
    "TFMQDiffusersQuantizer": "quantizer",
    "quantize_pipeline": "pipeline_quantization",
    "to_diffusers": "convert",
}
_MODULE_OF = {name: f"{__name__}.{module}" for name, module in _MODULES.items()}

if not TYPE_CHECKING:  # a type checker that saw this function would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, and keep it."""
        if name not in _MODULE_OF:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, imported by now or not, and those that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
