"""Tell diffusers of our quantizer, whichever of the two is imported first, and import nothing for it.

diffusers has no hook for quantizers of others: two dictionaries in ``diffusers.quantizers.auto`` decide, and whoever is
not one of its own writes into them. A finder in front of ``sys.meta_path`` does so as soon as that module has been
executed; every other module is left to the finders behind it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["AUTO", "QUANT_METHOD", "announce", "register"]

#: The module of diffusers that holds its mappings.
AUTO = "diffusers.quantizers.auto"
#: What our quantizer is called there, and in the ``config.json`` of models that we saved.
QUANT_METHOD = "tfmq_fx"

log = logging.getLogger(__name__)


def announce() -> None:
    """Have :func:`register` called: now where diffusers' mappings are there, else when they come."""
    loaded = sys.modules.get(AUTO)
    if loaded is not None:
        register(loaded)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(auto: ModuleType) -> None:
    """Write our quantizer and its configuration into diffusers' mappings; a diffusers without them is left alone.

    Args:
        auto: ``diffusers.quantizers.auto``.
    """
    configuration = import_module("tfmq_fx.diffusers.configuration")
    quantizer = import_module("tfmq_fx.diffusers.quantizer")
    if not (hasattr(configuration, "TFMQConfig") and hasattr(quantizer, "TFMQDiffusersQuantizer")):
        return  # one of them is importing diffusers at this moment, and announces itself at its end
    try:
        auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer.TFMQDiffusersQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = configuration.TFMQConfig
        import_module("tfmq_fx.diffusers.loading_options").keep_loading_options(auto.DiffusersAutoQuantizer)
    except AttributeError as error:
        log.warning("this diffusers takes no quantizers of others (%s): models of tfmq_fx cannot be loaded", error)


class _Finder(MetaPathFinder):
    """Finds :data:`AUTO` as the finders behind it do, and registers when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec; None, so that others are asked, for every other name."""
        if fullname != AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        loader = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        # On this loader alone, which finds and executes nothing else.
        loader.exec_module = execute_and_register  # type: ignore[method-assign]  # a loader is made for each module
        return spec
