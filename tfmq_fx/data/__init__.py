"""Calibration data: what a denoiser really sees along the sampler's trajectories."""

from tfmq_fx.data.recording import record_trajectories
from tfmq_fx.data.sampling import sample_trajectories
from tfmq_fx.data.timestep_samplers import NormalTimesteps, TimestepSampler, UniformTimesteps

__all__ = [
    "NormalTimesteps",
    "TimestepSampler",
    "UniformTimesteps",
    "record_trajectories",
    "sample_trajectories",
]
