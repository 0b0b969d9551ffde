"""tfmq_fx: a trained diffusion model in, a real int8 denoiser out.

A pipeline of graph passes on torch.export and torchao's PT2E that finds the temporal information block
of a diffusion model by data flow, quantizes it with one set of parameters per timestep, quantizes
everything else, and lowers to integer kernels. From TFMQ-DM (CVPR 2024) and PTQ4DM (CVPR 2023).
"""

from tfmq_fx import _quiet_imports  # isort: skip  (first: it is about how the others import)
from tfmq_fx.artefact import load, save
from tfmq_fx.batch_timesteps import recorded_timesteps
from tfmq_fx.calibration import calibrate
from tfmq_fx.capture import capture
from tfmq_fx.config import QuantizationConfig
from tfmq_fx.convert import convert, program_from_graph
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
from tfmq_fx.lowering import Denoiser, LoweringReport, load_denoiser, lower
from tfmq_fx.models_bundle import bundled_model_path
from tfmq_fx.passes.analysis import EmbeddingLayer, TemporalBlock, find_temporal_block
from tfmq_fx.prepare import prepare
from tfmq_fx.program import QuantizedProgram
from tfmq_fx.quantize import quantize
from tfmq_fx.quantizer import TFMQQuantizer
from tfmq_fx.reconstruction import ReconstructionReport, reconstruct
from tfmq_fx.reconstruction_config import ReconstructionConfig
from tfmq_fx.table import add_timesteps
from tfmq_fx.trajectories import record_trajectories, sample_trajectories

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
del _quiet_imports
