"""Calibration data: what a denoiser really sees along the sampler's trajectories."""

from tfmq_fx.trajectories.recording import record_trajectories
from tfmq_fx.trajectories.sampling import sample_trajectories
from tfmq_fx.trajectories.timestep_samplers import NormalTimesteps, TimestepSampler, UniformTimesteps

__all__ = [
    "NormalTimesteps",
    "TimestepSampler",
    "UniformTimesteps",
    "record_trajectories",
    "sample_trajectories",
]
