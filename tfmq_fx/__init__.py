"""tfmq_fx: a trained diffusion model in, a real int8 denoiser out.

A pipeline of graph passes on torch.export and torchao's PT2E that finds the temporal information block
of a diffusion model by data flow, quantizes it with one set of parameters per timestep, quantizes
everything else, and lowers to integer kernels. From TFMQ-DM (CVPR 2024) and PTQ4DM (CVPR 2023).
"""

from pathlib import Path

# In a checkout the passes lie beside the package, installed they lie in it; never those of another checkout.
if not Path(__file__).with_name("passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from tfmq_fx._torch import quiet_imports  # isort: skip  (first: it is about how the others import)
from tfmq_fx.artefact import load, save
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.data import record_trajectories, sample_trajectories
from tfmq_fx.data.bundled_model import bundled_model_path
from tfmq_fx.errors import (
    ArtefactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    InputError,
    LoweringError,
    NonFiniteError,
    ReconstructionError,
    TfmqError,
    TimestepError,
)
from tfmq_fx.frontend.capture import capture
from tfmq_fx.lowering.lower import load_denoiser, lower
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.passes.analysis import EmbeddingLayer, TemporalBlock, find_temporal_block
from tfmq_fx.quantization.add_timesteps import add_timesteps
from tfmq_fx.quantization.annotate import TFMQQuantizer
from tfmq_fx.quantization.calibrate import calibrate
from tfmq_fx.quantization.convert import convert, program_from_graph
from tfmq_fx.quantization.prepare import prepare
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.reconstruction.reconstruct import reconstruct
from tfmq_fx.reconstruction.report import ReconstructionReport
from tfmq_fx.temporal.values import recorded_timesteps
from tfmq_fx.workflow.quantize import quantize

__all__ = [
    "ArtefactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "Denoiser",
    "EmbeddingLayer",
    "InputError",
    "LoweringError",
    "LoweringReport",
    "NonFiniteError",
    "QuantizationConfig",
    "QuantizedProgram",
    "ReconstructionConfig",
    "ReconstructionError",
    "ReconstructionReport",
    "TFMQQuantizer",
    "TemporalBlock",
    "TfmqError",
    "TimestepError",
    "add_timesteps",
    "bundled_model_path",
    "calibrate",
    "capture",
    "convert",
    "find_temporal_block",
    "load",
    "load_denoiser",
    "lower",
    "prepare",
    "program_from_graph",
    "quantize",
    "reconstruct",
    "record_trajectories",
    "recorded_timesteps",
    "sample_trajectories",
    "save",
]
__version__ = "0.1.0"
del quiet_imports
