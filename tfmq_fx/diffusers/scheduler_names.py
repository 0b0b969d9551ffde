"""Short names of samplers, and a pipeline's schedule in one of them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

from tfmq_fx.errors import ConfigError

__all__ = ["SCHEDULERS", "make_scheduler"]

#: How classes of flow matching begin in diffusers.
FLOW_MATCHING = "FlowMatch"
#: What makes a solver for noise schedules one for flow matching.
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@dataclass(frozen=True)
class SchedulerName:
    """What a short name stands for.

    Attributes:
        noise: diffusers' class for models that predict noise, ``v`` or the sample.
        flow: Its class for models of flow matching; None where there is none.
        changes: Fields of the configuration that it sets.
    """

    noise: str
    flow: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


SCHEDULERS = {
    "ddim": SchedulerName("DDIMScheduler"),
    "ddpm": SchedulerName("DDPMScheduler"),
    "deis": SchedulerName("DEISMultistepScheduler", "DEISMultistepScheduler"),
    "dpm++": SchedulerName("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "dpm++-karras": SchedulerName("DPMSolverMultistepScheduler", changes={"use_karras_sigmas": True}),
    "euler": SchedulerName("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler-a": SchedulerName("EulerAncestralDiscreteScheduler"),
    "euler-karras": SchedulerName(
        "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}
    ),
    "heun": SchedulerName("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "lcm": SchedulerName("LCMScheduler", "FlowMatchLCMScheduler"),
    "lms": SchedulerName("LMSDiscreteScheduler"),
    "pndm": SchedulerName("PNDMScheduler"),
    "unipc": SchedulerName("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
}


def make_scheduler(pipeline: Any, name: str) -> Any:
    """A scheduler of another class with the noise schedule of a pipeline's own.

    Args:
        pipeline: A diffusers pipeline; it is not changed.
        name: One of :data:`SCHEDULERS`.

    Raises:
        ConfigError: There is no such name, or not for the kind of schedule or pipeline.
    """
    import diffusers

    current = pipeline.scheduler
    if name not in SCHEDULERS:
        msg = f"scheduler {name!r} is none of {', '.join(SCHEDULERS)}"
        raise ConfigError(msg)
    entry = SCHEDULERS[name]
    flows = type(current).__name__.startswith(FLOW_MATCHING) or bool(current.config.get("use_flow_sigmas"))
    chosen = entry.flow if flows else entry.noise
    if chosen is None:
        able = ", ".join(other for other, entry in SCHEDULERS.items() if entry.flow is not None)
        msg = f"scheduler {name!r} cannot sample a model of flow matching; choose one of {able}"
        raise ConfigError(msg)
    changes = dict(entry.changes)
    if flows and not chosen.startswith(FLOW_MATCHING):
        changes |= FLOW | {"flow_shift": current.config.get("flow_shift", current.config.get("shift", 1.0))}
    scheduler = getattr(diffusers, chosen).from_config(current.config, **changes)
    if not _scales_noise(pipeline) and _starts_scaled(scheduler):
        msg = (
            f"{type(pipeline).__name__} does not scale its noise, which scheduler {name!r} expects; choose ddim, ddpm "
            "or dpm++"
        )
        raise ConfigError(msg)
    return scheduler


def _scales_noise(pipeline: Any) -> bool:
    """Whether a pipeline starts from the noise that its scheduler asks for; some of the oldest draw it plainly."""
    sources = [getattr(type(pipeline), name, None) for name in ("__call__", "prepare_latents")]
    return any("init_noise_sigma" in inspect.getsource(source) for source in sources if source is not None)


def _starts_scaled(scheduler: Any) -> bool:
    trial = copy.deepcopy(scheduler)
    if not hasattr(trial, "init_noise_sigma"):
        return False
    trial.set_timesteps(10)
    return float(trial.init_noise_sigma) != 1.0
