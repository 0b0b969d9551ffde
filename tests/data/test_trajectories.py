import copy

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

import tfmq_fx
from tests.models import small_denoiser, tiny_unet
from tfmq_fx import CalibrationError, ConfigError
from tfmq_fx.data import NormalTimesteps, UniformTimesteps, record_trajectories, sample_trajectories
from tfmq_fx.data.timestep_samplers import place_samples

STEPS = torch.arange(980, -1, -20)
OPTIONS = {"steps": 5, "samples": 6, "batch_size": 4, "keep": 2, "shape": (1, 8, 8), "progress": False}


def sampled(model=None, scheduler=None, **options):
    return sample_trajectories(model or small_denoiser(), scheduler or DDIMScheduler(), **{**OPTIONS, **options})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Watcher(nn.Module):
    """Remembers what it was called with, and predicts something simple."""

    def __init__(self, channels=1):
        super().__init__()
        self.calls, self.channels, self.dropout = [], channels, nn.Dropout()

    def forward(self, sample, timestep, extra=None):
        self.calls.append((sample.clone(), timestep.clone(), extra))
        assert not self.training
        assert not self.dropout.training
        return 0.1 * sample.repeat(1, self.channels, 1, 1)


# --- timestep samplers ------------------------------------------------------------------------------


def test_uniform_gives_every_step_the_same_number_of_rows():
    rows = place_samples(UniformTimesteps(), STEPS, 8 * 50, torch.full((50,), 64), 1000, generator())
    assert rows.tolist() == [8] * 50


def test_a_normal_draw_has_the_moments_of_the_truncated_normal_and_the_true_time_direction():
    """Numerically integrated, independent of torch.distributions: mean below T/2, so clean steps lead."""
    drawn = STEPS[NormalTimesteps(0.4).draw(STEPS, 40_000, 1000, generator())].double()
    t = torch.linspace(0, 999, 100_000, dtype=torch.float64)
    density = torch.exp(-0.5 * ((t - 400) / 500) ** 2)
    density /= density.sum()
    mean = (t * density).sum()
    deviation = ((t - mean).square() * density).sum().sqrt()
    assert abs(drawn.mean() - mean) < 12  # half a schedule step of 20 is lost to rounding at the noisy end
    assert abs(drawn.std() - deviation) < 8
    assert (drawn < 500).double().mean() > 0.52


def test_normal_draws_are_truncated_by_redrawing_not_by_clamping():
    """Clamping would pile 21 % of the draws on the first step of the schedule; its share is about 1 %."""
    drawn = STEPS[NormalTimesteps(0.4).draw(STEPS, 20_000, 1000, generator())]
    assert (drawn == 0).double().mean() < 0.02
    assert (drawn == 980).double().mean() < 0.03


@pytest.mark.parametrize("sampler", [UniformTimesteps(), NormalTimesteps(0.0)])
def test_full_steps_pass_their_rows_on(sampler):
    capacity = torch.tensor([0, 3, 1, 50, 2])
    for count in (0, 1, 30, 56):
        rows = place_samples(sampler, torch.tensor([900, 500, 300, 100, 0]), count, capacity, 1000, generator())
        assert rows.sum() == count
        assert bool((rows <= capacity).all())


def test_a_sampler_of_ones_own():
    class OnlyTheCleanest:
        def draw(self, timesteps, count, horizon, generator):
            assert timesteps.dtype == torch.float64
            assert horizon == 1000
            return torch.full((count,), int(timesteps.argmin()))

    batches = sampled(sampler=OnlyTheCleanest(), samples=6, keep=1)
    assert [int(t) for b in batches for t in b["timestep"]] == [0] * 5


def test_bad_samplers_are_one_clear_sentence():
    class OutOfRange:
        def draw(self, timesteps, count, horizon, generator):
            return torch.full((count,), len(timesteps))

    for sampler, words in [("nope", "'uniform', 'ndtc'"), (3, "no draw method"), (OutOfRange(), "from 0 to 4")]:
        with pytest.raises(ConfigError, match=words):
            sampled(sampler=sampler)
    with pytest.raises(ConfigError, match=r"0 to 0\.5"):
        NormalTimesteps(0.6)


# --- sample_trajectories ----------------------------------------------------------------------------


def test_batches_are_what_the_denoiser_saw_and_every_trajectory_is_walked_once():
    model = Watcher()
    batches = sampled(model, samples=6, steps=5, batch_size=4, keep=6)
    assert len(model.calls) == 2 * 5  # two groups of trajectories, each step once: nothing restarts
    seen = {(int(t[0]), row.sum().item()) for x, t, _ in model.calls for row in x}
    kept = {(int(t), row.sum().item()) for b in batches for t, row in zip(b["timestep"], b["sample"], strict=True)}
    assert kept == seen
    assert all(len(b["sample"]) <= 4 and len(set(b["timestep"].tolist())) == 1 for b in batches)


def test_the_trajectory_is_the_schedulers_own():
    """The last kept inputs agree with a plain DDIM loop from the same noise."""
    model, scheduler = small_denoiser(), DDIMScheduler()
    batches = sampled(model, scheduler, samples=3, keep=3)
    scheduler.set_timesteps(5)
    x = torch.randn(3, 1, 8, 8, generator=generator(0))
    expected = {}
    for t in scheduler.timesteps:
        expected[int(t)] = x
        with torch.no_grad():
            x = scheduler.step(model(x, t.expand(3)), t, x).prev_sample
    for b in batches:
        torch.testing.assert_close(b["sample"], expected[int(b["timestep"][0])])


def test_kept_rows_are_spread_over_steps_and_trajectories():
    batches = sampled(steps=10, samples=5, keep=2, batch_size=2)
    steps = torch.cat([b["timestep"] for b in batches])
    assert torch.bincount(steps // 100).tolist() == [2] * 10
    # Steps come in random order, so that smoothed ranges do not favour the end of the schedule.
    assert steps.tolist() != sorted(steps.tolist())
    assert steps.tolist() != sorted(steps.tolist(), reverse=True)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    one, two, three = (sampled(scheduler=DDPMScheduler(), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a["sample"], b["sample"]) for a, b in zip(one, three, strict=True))


def test_a_stochastic_scheduler_does_not_touch_the_global_generator():
    model = small_denoiser()  # which sets the generator
    before = torch.get_rng_state()
    sampled(model, scheduler=EulerAncestralDiscreteScheduler())
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_model_and_scheduler_are_as_before():
    model, scheduler = Watcher(), DDIMScheduler()
    model.train()
    model.dropout.eval()
    before = copy.deepcopy(dict(scheduler.__dict__))
    sampled(model, scheduler)
    assert model.training
    assert not model.dropout.training
    assert scheduler.timesteps.tolist() == before["timesteps"].tolist()
    assert scheduler.num_inference_steps == before["num_inference_steps"]


def test_the_model_input_is_scaled_as_the_scheduler_says():
    model = Watcher()
    sampled(model, EulerDiscreteScheduler(), steps=5)
    first = model.calls[0][0]
    assert 0.5 < first.std() < 2  # unscaled, the noise of this scheduler has a deviation of about 160


def test_solvers_with_two_evaluations_a_step():
    batches = sampled(scheduler=HeunDiscreteScheduler(), steps=5, keep=2)
    assert sum(len(b["sample"]) for b in batches) == 2 * 9


def test_a_0_dim_timestep_and_extra_inputs():
    rows = torch.arange(6)[:, None]
    model = Watcher()
    batches = sampled(model, timestep_as_batch=False, extra={"extra": rows})
    assert all(b["timestep"].ndim == 0 for b in batches)
    assert all(len(b["extra"]) == len(b["sample"]) for b in batches)
    for x, _, extra in model.calls[:1] + model.calls[5:6]:
        assert len(extra) == len(x)
    shared = sampled(extra={"extra": torch.ones(1, 3)}, model=Watcher())
    assert shared[0]["extra"].shape == (len(shared[0]["sample"]), 3)
    assert all("extra" not in b for b in sampled(extra={"extra": None}))


def test_a_learned_variance_is_for_schedulers_that_read_it():
    sampled(Watcher(channels=2), DDIMScheduler())
    sampled(Watcher(channels=2), DDPMScheduler(variance_type="learned_range"))


def test_batches_calibrate_a_prepared_model():
    model = small_denoiser()
    batches = sampled(model)
    program = tfmq_fx.capture(model, example_kwargs=batches[0])
    prepared = tfmq_fx.prepare(program, timesteps=[0, 200, 400, 600, 800])
    assert tfmq_fx.calibrate(prepared, batches, progress=False) == len(batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "keep=0"),
        ({"samples": 0}, "samples=0"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"keep": 7, "samples": 6}, "keep=7"),
        ({"keep": None, "samples": 0}, "samples=0"),
        ({"timestep": "t"}, "not a sample and a t; name the timestep that it takes with timestep="),
        ({"steps": 2000}, "DDIMScheduler cannot make 2000 steps"),
        ({"shape": None}, "pass shape="),
        ({"model": nn.Linear(2, 2)}, "not a sample and a timestep"),
        ({"scheduler": object()}, "no scheduler"),
        ({"extra": {"extra": torch.ones(5, 1)}}, "axis 0 must be 1 or samples=6"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        sampled(**options)
    assert "\n" not in str(caught.value)


def test_nan_and_misfits_are_one_clear_sentence():
    class Broken(Watcher):
        def forward(self, sample, timestep):
            return sample * float("nan") if timestep[0] < 500 else sample

    with pytest.raises(CalibrationError, match="NaN or infinite at timestep 400"):
        sampled(Broken())
    with pytest.raises(CalibrationError, match=r"cannot be called with \(sample, timestep\)"):
        sampled(shape=(3, 8, 8))
    with pytest.raises(CalibrationError, match=r"cannot be called with \(sample, timestep, nonsense\)"):
        sampled(extra={"nonsense": 1})


@pytest.mark.parametrize(("samples", "kept"), [(4, 4), (20, 8)])
def test_by_default_eight_rows_a_step_are_kept_or_all_that_there_are(samples, kept):
    batches = sampled(Watcher(), samples=samples, keep=None, steps=3)
    assert sum(len(b["sample"]) for b in batches) == kept * 3
    del (options := {**OPTIONS, "samples": samples, "steps": 3})["keep"]
    assert sum(len(b["sample"]) for b in sample_trajectories(Watcher(), DDIMScheduler(), **options)) == kept * 3


class OddlyNamed(Watcher):
    """Its timestep has another name."""

    def forward(self, x, timestep_ratio, extra=None):
        return super().forward(x, timestep_ratio, extra)


def test_a_timestep_of_any_name():
    batches = sampled(OddlyNamed(), timestep="timestep_ratio")
    assert set(batches[0]) == {"x", "timestep_ratio"}
    assert tfmq_fx.recorded_timesteps(batches, "timestep_ratio").tolist() == [800, 600, 400, 200, 0]


# --- record_trajectories ----------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **options):
    return pipe(**{"batch_size": 3, "num_inference_steps": 4, "output_type": "np", **options})


def test_every_call_of_the_denoiser_is_recorded(pipeline):
    batches = record_trajectories(pipeline, run, keep=3)
    assert sorted(int(b["timestep"]) for b in batches) == [0, 250, 500, 750]
    assert all(set(b) == {"sample", "timestep"} and b["sample"].shape == (3, 1, 8, 8) for b in batches)
    assert not pipeline.unet._forward_pre_hooks


def test_some_rows_are_kept_of_several_runs(pipeline):
    batches = record_trajectories(pipeline, lambda p: [run(p) for _ in range(3)], keep=4)
    assert sum(len(b["sample"]) for b in batches) == 4 * 4
    leaning = record_trajectories(pipeline, lambda p: [run(p) for _ in range(3)], keep=4, sampler=NormalTimesteps(0.0))
    rows = {t: sum(len(b["sample"]) for b in leaning if int(b["timestep"]) == t) for t in (0, 250, 500, 750)}
    assert rows[0] + rows[250] > rows[500] + rows[750]


def test_recorded_inputs_are_bound_to_names_and_nones_are_dropped():
    class Conditional(nn.Module):
        def forward(self, sample, timestep, prompt, mask=None, return_dict=True, **more):
            return (sample,)

    class Pipe:
        def __init__(self):
            self.transformer = Conditional()

        def __call__(self):
            x = torch.ones(2, 1)
            self.transformer(x, 5, prompt={"text": torch.ones(2, 3)}, mask=None, return_dict=False, late=torch.ones(4))
            x.zero_()

    batch = record_trajectories(Pipe(), lambda p: p(), component="transformer")[0]
    assert set(batch) == {"sample", "timestep", "prompt", "late"}
    assert bool(batch["sample"].all())  # a clone: the pipeline's own changes do not reach it
    assert torch.equal(batch["timestep"], torch.tensor(5))
    assert batch["prompt"]["text"].shape == (2, 3)
    assert batch["late"].shape == (4,)


def test_a_recorded_timestep_of_any_name():
    class Named(OddlyNamed):
        def forward(self, x, timestep_ratio, extra=None):
            return super().forward(x, torch.as_tensor(timestep_ratio), extra)

    class Pipe:
        unet = Named()

        def __call__(self):
            for t in (0.9, 0.4):
                self.unet(torch.ones(2, 1, 4, 4), t)
                self.unet(x=torch.ones(3, 1, 4, 4), timestep_ratio=torch.full((3,), t))

    batches = record_trajectories(Pipe(), lambda p: p(), timestep="timestep_ratio", keep=4)
    assert sum(len(b["x"]) for b in batches) == 8
    assert all(isinstance(b["timestep_ratio"], torch.Tensor) for b in batches)
    torch.testing.assert_close(
        tfmq_fx.recorded_timesteps(batches, "timestep_ratio"), torch.tensor([0.9, 0.4], dtype=torch.float64)
    )
    with pytest.raises(CalibrationError, match="had no timestep; its inputs were x, timestep_ratio: name its timestep"):
        record_trajectories(Pipe(), lambda p: p())


def test_the_hook_goes_even_when_the_run_fails(pipeline):
    pipeline.unet.train()
    with pytest.raises(ZeroDivisionError):
        record_trajectories(pipeline, lambda p: 1 // 0)
    assert not pipeline.unet._forward_pre_hooks
    assert pipeline.unet.training


def test_bad_recordings_are_one_clear_sentence(pipeline):
    with pytest.raises(ConfigError, match=r"no module 'transformer'; it has 'unet'"):
        record_trajectories(pipeline, run, component="transformer")
    with pytest.raises(ConfigError, match="keep=0"):
        record_trajectories(pipeline, run, keep=0)
    with pytest.raises(CalibrationError, match="never called"):
        record_trajectories(pipeline, lambda p: None)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN or infinite values in 'sample'"):
        record_trajectories(pipeline, run)


def test_a_recorded_pipeline_calibrates_its_denoiser(pipeline):
    batches = record_trajectories(pipeline, run)
    timesteps = pipeline.scheduler.timesteps
    quantized = tfmq_fx.quantize(pipeline.unet, None, batches, timesteps=timesteps, progress=False)
    assert quantized.timesteps.tolist() == timesteps.tolist()
