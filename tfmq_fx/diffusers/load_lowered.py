"""The compiled code of a model that is loaded, where its configuration asks for it then."""

from __future__ import annotations

import logging
from pathlib import Path

from tfmq_fx.diffusers.configuration import TFMQConfig
from tfmq_fx.diffusers.folder import package_path
from tfmq_fx.errors import ArtefactError
from tfmq_fx.lowering.backends.registry import find_backend
from tfmq_fx.lowering.lower import load_denoiser, lower
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["lower_at_load"]

log = logging.getLogger(__name__)


def lower_at_load(program: QuantizedProgram, folder: Path, config: TFMQConfig) -> Denoiser | None:
    """Lower a program as a configuration says; None where it says nothing, and the first call does.

    A backend that writes packages finds its own beside the weights, by the program and precision in its name. One that
    is missing, damaged or for another machine is compiled, and put there.

    Args:
        program: What was loaded.
        folder: Where from.
        config: What the user of ``from_pretrained`` chose; a file cannot choose (:meth:`TFMQConfig.from_dict`).

    Raises:
        LoweringError: It cannot be lowered here.
    """
    if config.lower is None:
        return None
    backend = find_backend(config.lower)
    if backend.package_suffix is None:
        return lower(program, config.lower, precision=config.precision)
    package = package_path(folder, backend.resolve_precision(config.precision))
    if package.is_file():
        try:
            return load_denoiser(package)
        except ArtefactError as error:
            log.warning("compiling again: %s", error)
    else:
        log.warning("compiling: there is no package of this program at %s yet", package)
    return lower(program, config.lower, precision=config.precision, path=package)
