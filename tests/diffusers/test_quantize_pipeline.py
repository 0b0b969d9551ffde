"""One call for a pipeline: recorded as its users run it, quantized, and put in its place."""

import pytest
import torch

import tfmq_fx
from tests.diffusers.pipelines import CASES
from tests.models import relative
from tfmq_fx import CalibrationError, ConfigError, QuantizationConfig, UnsupportedError
from tfmq_fx.diffusers import quantize_pipeline
from tfmq_fx.diffusers.pipeline_quantization import _shares

#: The way that takes least time.
FAST = QuantizationConfig(activation_groups=1, scale_channels=False)
QUIET = {"progress": False, "lower": "reference", "steps": 3, "calls": 2}


def quantized(case, pipeline, **arguments):
    given = {**QUIET, "components": [case.component], "finite": case.finite, **case.arguments, **arguments}
    return quantize_pipeline(pipeline, config=FAST, **given)


@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl", "flux", "dit"])
def test_a_pipeline_is_quantized_in_one_call(name):
    case = CASES[name]
    pipeline = case.pipeline()
    wanted, original = case.sample(pipeline), getattr(pipeline, case.component)
    assert quantized(case, pipeline) is pipeline
    model = getattr(pipeline, case.component)
    assert type(model) is type(original) and model is not original
    assert 0 < relative(case.sample(pipeline).double(), wanted.double()) < 0.1


def test_the_table_holds_the_timesteps_that_the_model_saw():
    case = CASES["flux"]
    pipeline = case.pipeline()
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    case.sample(pipeline)
    hook.remove()
    table = quantized(case, pipeline).transformer.served.denoiser.timesteps
    assert sorted(table.tolist()) == sorted(set(seen)) and max(seen) <= 1.0


def test_the_decoder_of_the_autoencoder_is_quantized_too(tmp_path):
    case = CASES["sd"]
    pipeline = case.pipeline()
    wanted = case.sample(pipeline)
    quantized(case, pipeline, components=["unet", "vae"])
    assert isinstance(pipeline.vae.decoder, tfmq_fx.Denoiser)
    assert relative(case.sample(pipeline).double(), wanted.double()) < 0.1
    with pytest.raises(UnsupportedError, match="decoder of this AutoencoderKL is quantized and cannot be saved"):
        pipeline.save_pretrained(tmp_path)


def test_the_same_call_gives_the_same_program():
    case = CASES["ddpm"]
    one, two, three = case.pipeline(), case.pipeline(), case.pipeline()
    for pipeline, seed in ((one, 0), (two, 0), (three, 1)):
        quantized(case, pipeline, seed=seed)
    images = [case.sample(pipeline) for pipeline in (one, two, three)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_both_experts_of_a_pipeline_are_quantized_over_the_timesteps_that_each_saw():
    case = CASES["wan"]
    first, second = case.pipeline(), case.pipeline()
    with torch.no_grad():
        second.transformer.patch_embedding.weight *= 1.1
    pipeline = type(first)(
        None, None, first.vae, first.scheduler,
        transformer=first.transformer, transformer_2=second.transformer, boundary_ratio=0.9,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    wanted = case.sample(pipeline, num_inference_steps=4)
    quantize_pipeline(pipeline, config=FAST, **{**QUIET, "steps": 4, "calls": 1}, **case.arguments)
    tables = [module.served.denoiser.timesteps for module in (pipeline.transformer, pipeline.transformer_2)]
    assert len(tables[0]) + len(tables[1]) == 4 and min(tables[0]) > 900 > max(tables[1])
    assert relative(case.sample(pipeline, num_inference_steps=4).double(), wanted.double()) < 0.1


class Prompted:
    """A pipeline whose prompts are counted, on the UNet of another one."""

    def __init__(self, case):
        self.inner, self.case, self.calls = case.pipeline(), case, []
        self.components, self.scheduler = {"unet": self.inner.unet}, self.inner.scheduler

    def register_modules(self, **modules):
        self.inner.unet = modules["unet"]

    def __call__(self, prompt=None, num_inference_steps=50, generator=None, image_size=8):
        self.calls.append((prompt, num_inference_steps, generator.initial_seed()))
        self.inner(num_inference_steps=num_inference_steps, generator=generator)


def test_prompts_take_turns_and_each_call_has_its_own_seed():
    pipeline = Prompted(CASES["ddpm"])
    quantize_pipeline(pipeline, ["a cat", "a dog"], FAST, steps=2, calls=3, seed=5, progress=False, lower="reference")
    assert pipeline.calls == [("a cat", 2, 5), ("a dog", 2, 6), ("a cat", 2, 7)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("keep", [1, 2, 8])
def test_every_timestep_gets_its_samples_and_every_run_gives_some(count, keep):
    per_timestep, per_run = [0] * 30, [0] * count
    for index in range(count):
        for share, calls in _shares(list(range(30)), index, count, keep).items():
            for call in calls:
                per_timestep[call] += share
                per_run[index] += share
    assert per_timestep == [keep] * 30 and min(per_run) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"components": ["unett"]}, "has no module 'unett'; it has 'unet'"),
        ({"components": ["unet", "unet"]}, "names a component twice"),
        ({"image_sise": 8}, "takes no 'image_sise'; did you mean 'image_size'"),
        ({"generator": torch.Generator()}, "generator= is given by seed= here"),
        ({"timestep": "sigma"}, "takes no 'sigma'"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"calls": True}, "calls=True must be a whole number of at least 1"),
        ({"keep": 0}, "keep=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"prompts": [1]}, "must be strings, at least one"),
        ({"config": {"vae": FAST}}, "config= has 'vae', which is none of the components"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, sentence):
    pipeline = Prompted(CASES["ddpm"])
    with pytest.raises(ConfigError, match=sentence):
        quantize_pipeline(pipeline, **{"progress": False, **arguments})
    assert pipeline.calls == []


def test_what_is_no_pipeline_or_has_no_denoiser_is_refused():
    with pytest.raises(ConfigError, match="needs a diffusers pipeline, it was given a Linear"):
        quantize_pipeline(torch.nn.Linear(2, 2))
    pipeline = Prompted(CASES["ddpm"])
    pipeline.components = {"text_encoder": torch.nn.Linear(2, 2)}
    with pytest.raises(ConfigError, match=r"no denoiser under a usual name.*'text_encoder'"):
        quantize_pipeline(pipeline)
    with pytest.raises(ConfigError, match="neither a denoiser nor an autoencoder"):
        quantize_pipeline(pipeline, components="text_encoder")


def test_a_component_that_is_never_called_is_named_and_nothing_is_replaced():
    case = CASES["ddpm"]
    pipeline = Prompted(case)
    pipeline.components["prior"] = case.pipeline().unet
    before = pipeline.inner.unet
    with pytest.raises(CalibrationError, match="never called its 'prior'"):
        quantize_pipeline(pipeline, config=FAST, steps=2, calls=1, progress=False)
    assert pipeline.inner.unet is before
