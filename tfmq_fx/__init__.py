"""tfmq_fx: a trained diffusion model in, a real int8 denoiser out.

A pipeline of graph passes on torch.export and torchao's PT2E that finds the temporal information block
of a diffusion model by data flow, quantizes it with one set of parameters per timestep, quantizes
everything else, and lowers to integer kernels. From TFMQ-DM (CVPR 2024) and PTQ4DM (CVPR 2023).

Importing the package imports no torch: each public name is imported when it is first used (PEP 562).
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_fx.diffusers.registration import announce as _announce
from tfmq_fx.errors import (
    ArtefactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    FidelityError,
    InputError,
    LoweringError,
    NonFiniteError,
    ReconstructionError,
    TfmqError,
    TimestepError,
    UnsupportedError,
)

#: The one place for the version: the build reads it here.
__version__ = "0.2.0"

# In a checkout the passes lie beside the package, installed they lie in it; never those of another checkout.
if not Path(__file__).with_name("passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from tfmq_fx import (
        artefact,
        config,
        data,
        diagnostics,
        diffusers,
        errors,
        fake_quantizers,
        frontend,
        observers,
        passes,
        schedulers,
        testing,
    )
    from tfmq_fx.artefact.folder import check_target
    from tfmq_fx.artefact.load import load
    from tfmq_fx.artefact.save import save
    from tfmq_fx.config.quantization import QuantizationConfig
    from tfmq_fx.config.reconstruction import ReconstructionConfig
    from tfmq_fx.data.bundled_model import bundled_model_path
    from tfmq_fx.data.lora import fuse_lora
    from tfmq_fx.data.recording import record_trajectories
    from tfmq_fx.data.sampling import sample_trajectories
    from tfmq_fx.data.timestep_samplers import NormalTimesteps, TimestepSampler, UniformTimesteps
    from tfmq_fx.diffusers.pipeline_quantization import quantize_pipeline
    from tfmq_fx.frontend.capture import capture
    from tfmq_fx.lowering.lower import load_denoiser, lower
    from tfmq_fx.lowering.report.report import LoweringReport
    from tfmq_fx.lowering.run.denoiser import Denoiser
    from tfmq_fx.passes.analysis.temporal_block import EmbeddingLayer, TemporalBlock, find_temporal_block
    from tfmq_fx.quantization.add_timesteps import add_timesteps
    from tfmq_fx.quantization.annotate import TFMQQuantizer
    from tfmq_fx.quantization.calibrate import calibrate
    from tfmq_fx.quantization.convert import convert, program_from_graph
    from tfmq_fx.quantization.fidelity import Fidelity
    from tfmq_fx.quantization.prepare import prepare
    from tfmq_fx.quantization.program import QuantizedProgram
    from tfmq_fx.reconstruction.reconstruct import reconstruct
    from tfmq_fx.reconstruction.report import ReconstructionReport
    from tfmq_fx.search.result import SearchResult
    from tfmq_fx.search.search_bits import search_bits
    from tfmq_fx.temporal.values import recorded_timesteps
    from tfmq_fx.workflow.quantize import quantize
    from tfmq_fx.workflow.requantize import requantize

__all__ = [
    "ArtefactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "Denoiser",
    "EmbeddingLayer",
    "Fidelity",
    "FidelityError",
    "InputError",
    "LoweringError",
    "LoweringReport",
    "NonFiniteError",
    "NormalTimesteps",
    "QuantizationConfig",
    "QuantizedProgram",
    "ReconstructionConfig",
    "ReconstructionError",
    "ReconstructionReport",
    "SearchResult",
    "TFMQQuantizer",
    "TemporalBlock",
    "TfmqError",
    "TimestepError",
    "TimestepSampler",
    "UniformTimesteps",
    "UnsupportedError",
    "add_timesteps",
    "artefact",
    "bundled_model_path",
    "calibrate",
    "capture",
    "check_target",
    "config",
    "convert",
    "data",
    "diagnostics",
    "diffusers",
    "errors",
    "fake_quantizers",
    "find_temporal_block",
    "frontend",
    "fuse_lora",
    "load",
    "load_denoiser",
    "lower",
    "observers",
    "passes",
    "prepare",
    "program_from_graph",
    "quantize",
    "quantize_pipeline",
    "reconstruct",
    "record_trajectories",
    "recorded_timesteps",
    "requantize",
    "sample_trajectories",
    "save",
    "schedulers",
    "search_bits",
    "testing",
]

#: The public rooms, which the reference lists, and the modules that define public names; each is imported on first use.
_ROOMS = (
    "artefact",
    "config",
    "data",
    "diagnostics",
    "diffusers",
    "errors",
    "fake_quantizers",
    "frontend",
    "observers",
    "passes",
    "schedulers",
    "testing",
)
_MODULES = {
    "artefact.folder": ("check_target",),
    "artefact.load": ("load",),
    "artefact.save": ("save",),
    "config.quantization": ("QuantizationConfig",),
    "config.reconstruction": ("ReconstructionConfig",),
    "data.bundled_model": ("bundled_model_path",),
    "data.lora": ("fuse_lora",),
    "data.recording": ("record_trajectories",),
    "data.sampling": ("sample_trajectories",),
    "data.timestep_samplers": ("NormalTimesteps", "TimestepSampler", "UniformTimesteps"),
    "diffusers.pipeline_quantization": ("quantize_pipeline",),
    "frontend.capture": ("capture",),
    "lowering.lower": ("load_denoiser", "lower"),
    "lowering.report.report": ("LoweringReport",),
    "lowering.run.denoiser": ("Denoiser",),
    "passes.analysis.temporal_block": ("EmbeddingLayer", "TemporalBlock", "find_temporal_block"),
    "quantization.add_timesteps": ("add_timesteps",),
    "quantization.annotate": ("TFMQQuantizer",),
    "quantization.calibrate": ("calibrate",),
    "quantization.convert": ("convert", "program_from_graph"),
    "quantization.fidelity": ("Fidelity",),
    "quantization.prepare": ("prepare",),
    "quantization.program": ("QuantizedProgram",),
    "reconstruction.reconstruct": ("reconstruct",),
    "reconstruction.report": ("ReconstructionReport",),
    "search.result": ("SearchResult",),
    "search.search_bits": ("search_bits",),
    "temporal.values": ("recorded_timesteps",),
    "workflow.quantize": ("quantize",),
    "workflow.requantize": ("requantize",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker that saw this function would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, and keep it."""
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, imported by now or not, and those that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


_announce()  # so that diffusers loads what was saved, with no import but that of this package
