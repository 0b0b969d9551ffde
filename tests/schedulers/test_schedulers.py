"""Sampling runs of diffusers' schedulers: every timestep that a solver asks for has its row."""

import diffusers
import pytest
import torch

import tfmq_fx
from tests.models import small_denoiser

#: Beside the plain ones: float timesteps, repeated ones, two calls a step, a schedule between 0 and 1,000 of floats.
SCHEDULERS = {
    "DDPM": diffusers.DDPMScheduler(),
    "DDIM": diffusers.DDIMScheduler(),
    "DDIM, trailing": diffusers.DDIMScheduler(timestep_spacing="trailing"),
    "PNDM": diffusers.PNDMScheduler(),
    "PNDM, without Runge-Kutta": diffusers.PNDMScheduler(skip_prk_steps=True),
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(),
    "DPM-Solver++, Karras": diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "DPM-Solver, single step": diffusers.DPMSolverSinglestepScheduler(),
    "Euler": diffusers.EulerDiscreteScheduler(),
    "Euler, Karras": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "Euler, ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "Heun": diffusers.HeunDiscreteScheduler(),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(),
    "UniPC": diffusers.UniPCMultistepScheduler(),
    "LCM": diffusers.LCMScheduler(),
    "flow matching": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow matching, Heun": diffusers.FlowMatchHeunDiscreteScheduler(),
}
#: Divides neither 1,000 nor anything else.
STEPS = 7


@pytest.fixture(params=list(SCHEDULERS))
def scheduler(request):
    made = SCHEDULERS[request.param]
    made.set_timesteps(STEPS)
    return made


def scaled(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def test_every_call_of_a_sampling_run_finds_its_row(scheduler):
    torch.manual_seed(0)
    times = scheduler.timesteps
    batches = [(torch.randn(4, 1, 8, 8), times[torch.arange(i, i + 4) % len(times)]) for i in (0, 3)]
    program = tfmq_fx.quantize(small_denoiser(), None, batches, timesteps=times, progress=False)
    assert program.timesteps.tolist() == list(dict.fromkeys(times.double().tolist()))
    denoiser = tfmq_fx.lower(program, backend="reference", unknown_timestep="error")
    asked = []

    def predict(x, t):
        asked.append(float(t))
        return denoiser(x, t)

    x = torch.randn(2, 1, 8, 8) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in times:
        x = scheduler.step(predict(scaled(scheduler, x, t), t), t, x).prev_sample
    assert len(asked) == len(times) and bool(torch.isfinite(x).all())
    outside = float(times.max()) + 1.5
    with pytest.raises(tfmq_fx.TimestepError, match=r"is not in the table"):
        denoiser(x, torch.tensor(outside, dtype=times.dtype) if times.is_floating_point() else int(outside))


def test_a_timestep_from_another_precision_is_the_same_timestep():
    """Schedulers compute in float64 and hand out float32; a user's own loop may do it the other way round."""
    made = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    made.set_timesteps(STEPS)
    times = made.timesteps
    batches = [(torch.randn(STEPS, 1, 8, 8), times)]
    denoiser = tfmq_fx.lower(
        tfmq_fx.quantize(small_denoiser(), None, batches, timesteps=times.double(), progress=False), "reference"
    )
    x = torch.randn(STEPS, 1, 8, 8)
    assert torch.equal(denoiser(x, times * (1 + 2e-6)), denoiser(x, times))
