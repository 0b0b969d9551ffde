"""PTQD: statistics of a known error, and what a corrected sampler makes of it."""

import copy
import inspect

import diffusers
import pytest
import torch

from tests.models import small_denoiser
from tfmq_fx import CalibrationError, ConfigError, TimestepError, sample_trajectories
from tfmq_fx.schedulers import NoiseStatistics, PTQDScheduler, collect_noise_statistics

STEPS = 5
SLOPE, BIAS, SPREAD = 0.25, (0.5, -0.3), 0.2


def schedule(scheduler, steps=STEPS):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler


def statistics(scheduler, *, slope=0.0, bias=(0.0,), variance=0.0, eta=0.0, steps=STEPS):
    times = torch.tensor(list(dict.fromkeys(schedule(scheduler, steps).timesteps.double().tolist())))
    ones = torch.ones(len(times), dtype=torch.float64)
    return NoiseStatistics(
        scheduler=type(scheduler).__name__,
        prediction=scheduler.config.get("prediction_type", ""),
        steps=steps,
        eta=1.0 if isinstance(scheduler, diffusers.DDPMScheduler) else eta,
        timesteps=times.double(),
        slope=slope * ones,
        bias=ones[:, None] * torch.tensor(bias, dtype=torch.float64),
        variance=variance * ones,
    )


def clean(sample, timestep):
    """A float denoiser: what it predicts is correlated between channels, and not centred."""
    return sample * 0.9 + 0.1 * sample.flip(1) + 0.4


def spoilt(seed=0, slope=SLOPE):
    generator = torch.Generator().manual_seed(seed)

    def denoise(sample, timestep):
        eps = clean(sample, timestep)
        noise = SPREAD * torch.randn(eps.shape, generator=generator)
        return (1 + slope) * eps + torch.tensor(BIAS).reshape(1, -1, 1, 1) + noise

    return denoise


def recorded(scheduler, steps=STEPS, mixed=False):
    times = schedule(scheduler, steps).timesteps
    generator = torch.Generator().manual_seed(3)
    batches = [
        {"sample": torch.randn(64, 2, 16, 16, generator=generator), "timestep": t.expand(64).clone()} for t in times
    ]
    if mixed:  # one batch with all timesteps
        keys = ("sample", "timestep")
        batches = [{key: torch.cat([b[key] for b in batches]) for key in keys}]
    return batches


@pytest.mark.parametrize("mixed", [False, True])
def test_a_known_error_is_recovered(mixed):
    found = collect_noise_statistics(
        clean, spoilt(), diffusers.DDPMScheduler(), recorded(diffusers.DDPMScheduler(), mixed=mixed), steps=STEPS
    )
    assert found.eta == 1.0 and found.timesteps.tolist() == [800, 600, 400, 200, 0]
    assert torch.allclose(found.slope, torch.full((STEPS,), SLOPE, dtype=torch.float64), atol=0.01)
    assert torch.allclose(found.bias, torch.tensor(BIAS, dtype=torch.float64).expand(STEPS, 2), atol=0.02)
    assert torch.allclose(found.variance, torch.full((STEPS,), SPREAD**2, dtype=torch.float64), rtol=0.05)


def test_a_negative_slope_is_clipped():
    scheduler = diffusers.DDIMScheduler()
    found = collect_noise_statistics(clean, spoilt(slope=-0.2), scheduler, recorded(scheduler), steps=STEPS)
    assert found.slope.tolist() == [0.0] * STEPS
    assert float(found.variance.min()) > SPREAD**2  # what the slope would have explained is left in the rest


def test_a_timestep_without_data_is_named():
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(CalibrationError, match="2 of 5 timesteps of the schedule are in no batch, the first is 200"):
        collect_noise_statistics(clean, spoilt(), scheduler, recorded(scheduler)[:3], steps=STEPS)
    with pytest.raises(CalibrationError, match="by name"):
        collect_noise_statistics(clean, spoilt(), scheduler, [(torch.randn(1, 2, 4, 4),)], steps=STEPS)


def test_statistics_come_from_the_calibration_run_of_a_real_model():
    model, scheduler = small_denoiser(), diffusers.DDIMScheduler()
    batches = sample_trajectories(model, scheduler, steps=STEPS, samples=4, keep=2, shape=(1, 8, 8), progress=False)
    found = collect_noise_statistics(model, model, scheduler, batches, steps=STEPS)
    assert not found.slope.any() and not found.bias.any() and not found.variance.any()


def test_json_round_trip(tmp_path):
    found = statistics(diffusers.DDIMScheduler(), slope=0.1, bias=(0.1, 0.2), variance=0.3, eta=0.5)
    again = NoiseStatistics.load(found.save(tmp_path / "noise.json"))
    assert again.to_dict() == found.to_dict() and again.bias.shape == (STEPS, 2)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json does not hold noise statistics: it has no 'scheduler'"):
        NoiseStatistics.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("no")
    with pytest.raises(ConfigError, match="no JSON"):
        NoiseStatistics.load(tmp_path / "bad.json")


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("make", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_slope_and_bias_are_undone_exactly(make, prediction):
    inner = schedule(make(prediction_type=prediction, clip_sample=False))
    corrected = PTQDScheduler(copy.deepcopy(inner), statistics(inner, slope=SLOPE, bias=BIAS))
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for timestep in inner.timesteps:
        output = clean(x, timestep)
        wrong = (1 + SLOPE) * output + torch.tensor(BIAS, dtype=torch.float64).reshape(1, 2, 1, 1)
        right, ours = (
            s.step(o, timestep, x, generator=torch.Generator().manual_seed(5)).prev_sample
            for s, o in ((inner, output), (corrected, wrong))
        )
        assert torch.allclose(right, ours, atol=1e-12)
        x = right


#: With the ways that each has of choosing the variance of its noise.
STOCHASTIC = {
    "DDPM, small": (diffusers.DDPMScheduler, {"variance_type": "fixed_small"}, {}),
    "DDPM, small, by its logarithm": (diffusers.DDPMScheduler, {"variance_type": "fixed_small_log"}, {}),
    "DDPM, large": (diffusers.DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "DDIM, eta 1": (diffusers.DDIMScheduler, {}, {"eta": 1.0}),
    "DDIM, eta 0.6": (diffusers.DDIMScheduler, {}, {"eta": 0.6}),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", STOCHASTIC)
def test_the_variance_of_a_step_is_the_float_samplers(case, prediction):
    make, options, call = STOCHASTIC[case]
    inner = schedule(make(clip_sample=False, prediction_type=prediction, **options), 50)
    timestep = inner.timesteps[20]
    eta = call.get("eta", 0.0)
    # One state and one output, many draws: what varies is the quantization noise and the sampler's.
    n = 200_000
    x, output = torch.full((n, 2, 1, 1), 0.7, dtype=torch.float64), torch.full((n, 2, 1, 1), -0.4, dtype=torch.float64)

    def step(scheduler, prediction):
        generator = torch.Generator().manual_seed(1)
        return scheduler.step(prediction, timestep, x, generator=generator, **call).prev_sample

    right = step(inner, output)
    # How the next state follows the output, measured; the error shall add a tenth to the sampler's variance.
    response = float((step(inner, output + 1) - right).mean())
    variance = 0.1 * float(right.var()) * ((1 + SLOPE) / response) ** 2
    noise = variance**0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = (1 + SLOPE) * output + torch.tensor(BIAS, dtype=torch.float64).reshape(1, 2, 1, 1) + noise
    known = {"slope": SLOPE, "bias": BIAS, "eta": eta, "steps": 50}
    without, ours = (
        step(PTQDScheduler(copy.deepcopy(inner), statistics(inner, **known, variance=added)), wrong)
        for added in (0.0, variance)
    )
    assert float(ours.mean() - right.mean()) == pytest.approx(0.0, abs=0.005 * float(right.std()))
    assert float(without.var() / right.var()) == pytest.approx(1.1, abs=0.01)
    assert float(ours.var() / right.var()) == pytest.approx(1.0, abs=0.01)


def sampled(scheduler, x, **call):
    takes = set(inspect.signature(scheduler.step).parameters)
    options = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(clean(seen, timestep), timestep, x, **options, **call).prev_sample
    return x


@pytest.mark.parametrize(
    ("scheduler", "call"),
    [
        (diffusers.DDPMScheduler(), {}),
        (diffusers.DDIMScheduler(), {"eta": 1.0}),
        (diffusers.DDIMScheduler(), {"eta": 0.0}),
        (diffusers.PNDMScheduler(), {}),
        (diffusers.EulerDiscreteScheduler(), {}),
        (diffusers.HeunDiscreteScheduler(), {}),
        (diffusers.DPMSolverMultistepScheduler(), {}),
        (diffusers.UniPCMultistepScheduler(), {}),
    ],
)
def test_without_noise_the_samples_are_the_same_to_the_bit(scheduler, call):
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    wrapper = PTQDScheduler(copy.deepcopy(scheduler), statistics(scheduler, bias=(0.0, 0.0), **call))
    wrapper.set_timesteps(STEPS)
    assert torch.equal(sampled(schedule(scheduler), x, **call), sampled(wrapper, x, **call))


@pytest.mark.parametrize("make", [diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_deterministic_solvers_are_corrected_for_slope_and_bias(make):
    scheduler = make()
    wrapper = PTQDScheduler(schedule(scheduler), statistics(scheduler, slope=SLOPE, bias=BIAS))
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    right, ours = x, x
    inner = schedule(scheduler)
    for timestep in inner.timesteps:
        right = inner.step(clean(inner.scale_model_input(right, timestep), timestep), timestep, right).prev_sample
        output = clean(wrapper.scale_model_input(ours, timestep), timestep)
        wrong = (1 + SLOPE) * output + torch.tensor(BIAS).reshape(1, 2, 1, 1)
        ours = wrapper.step(wrong, timestep, ours).prev_sample
    assert torch.allclose(right, ours, rtol=1e-4, atol=1e-4)


def test_everything_but_the_step_is_the_inner_schedulers():
    inner = diffusers.DDIMScheduler()
    wrapper = PTQDScheduler(inner, statistics(inner, eta=1.0))
    wrapper.set_timesteps(STEPS)
    assert wrapper.timesteps is inner.timesteps and wrapper.config is inner.config and len(wrapper) == 1000
    assert wrapper.order == 1 and wrapper.init_noise_sigma == 1.0
    assert list(inspect.signature(wrapper.step).parameters) == list(inspect.signature(inner.step).parameters)
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(wrapper.add_noise(x, x, torch.tensor([5])), inner.add_noise(x, x, torch.tensor([5])))
    as_tuple = wrapper.step(x, 800, x, return_dict=False, generator=torch.Generator().manual_seed(0))
    as_object = wrapper.step(x, 800, x, generator=torch.Generator().manual_seed(0))
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_object.prev_sample)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing


def test_a_copy_steps_its_own_scheduler():
    inner = schedule(diffusers.PNDMScheduler())
    wrapper = PTQDScheduler(inner, statistics(inner))
    other = copy.deepcopy(wrapper)
    other.step(torch.zeros(1, 1, 2, 2), other.timesteps[0], torch.zeros(1, 1, 2, 2))
    assert other.scheduler is not inner and other.scheduler.counter == 1 and inner.counter == 0


def test_it_stands_in_a_pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": STEPS, "eta": 1.0, "output_type": "np"}
    before = pipe(generator=torch.Generator().manual_seed(0), **run).images
    pipe.scheduler = PTQDScheduler(pipe.scheduler, statistics(pipe.scheduler, eta=1.0))
    assert (pipe(generator=torch.Generator().manual_seed(0), **run).images == before).all()
    pipe.scheduler.statistics = statistics(pipe.scheduler.scheduler, eta=1.0, variance=0.1)
    assert (pipe(generator=torch.Generator().manual_seed(0), **run).images != before).any()


def test_what_the_statistics_do_not_cover_is_refused():
    inner = diffusers.DDIMScheduler()
    wrapper = PTQDScheduler(inner, statistics(inner, eta=1.0))
    with pytest.raises(TimestepError, match="timestep 900 is not in the noise statistics"):
        wrapper.set_timesteps(10)
    wrapper.set_timesteps(STEPS)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(TimestepError, match="timestep 7 is not in the noise statistics"):
        wrapper.step(x, 7, x)
    with pytest.raises(ConfigError, match="eta=0, but the noise statistics are for eta=1"):
        wrapper.step(x, 800, x, eta=0.0)
    with pytest.raises(ConfigError, match="1 channels"):
        wrapper.step(x.expand(1, 3, 2, 2), 800, x)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            diffusers.EulerAncestralDiscreteScheduler(),
            "a EulerAncestralDiscreteScheduler: use one of DDPMScheduler, DD",
        ),
        (diffusers.LCMScheduler(), "cannot correct a LCMScheduler"),
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "deterministic"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "'fixed_small'"),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), "not of DDIMScheduler .prediction_type 'v_pred"),
        (diffusers.DDPMScheduler(), "are of DDIMScheduler"),
    ],
)
def test_other_schedulers_are_refused(scheduler, words):
    with pytest.raises(ConfigError, match=words):
        PTQDScheduler(scheduler, statistics(diffusers.DDIMScheduler()))
