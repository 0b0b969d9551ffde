"""Samplers that know their denoiser is quantized: wrappers of diffusers schedulers."""

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.schedulers.drift import DriftCorrection
from tfmq_fx.schedulers.drift_fit import collect_drift_correction
from tfmq_fx.schedulers.drift_scheduler import DriftCorrectedScheduler
from tfmq_fx.schedulers.noise_statistics import NoiseStatistics, collect_noise_statistics
from tfmq_fx.schedulers.ptqd import PTQDScheduler
from tfmq_fx.schedulers.quantized_sample import QuantizedSampleScheduler
from tfmq_fx.schedulers.sample_ranges import SampleRanges, collect_sample_ranges
from tfmq_fx.schedulers.wrapper import SchedulerWrapper

__all__ = [
    "DriftCorrectedScheduler",
    "DriftCorrection",
    "NoiseStatistics",
    "PTQDScheduler",
    "QuantizedSampleScheduler",
    "SampleRanges",
    "Scheduler",
    "SchedulerWrapper",
    "collect_drift_correction",
    "collect_noise_statistics",
    "collect_sample_ranges",
]
