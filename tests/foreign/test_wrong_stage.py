"""Each stage says in one sentence what it was given instead of what it takes, and which call is missing."""

import copy
import functools
import warnings

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig, ReconstructionConfig, TfmqError
from tfmq_fx.config.reconstruction import RECONSTRUCTIONS


class Pipeline:
    unet = small_denoiser()


@functools.cache
def given(what):
    if what == "model":
        return small_denoiser()
    if what == "pipeline":
        return Pipeline()
    if what == "captured":
        return tfmq_fx.capture(small_denoiser(), batch())
    prepared = tfmq_fx.prepare(given("captured"), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [batch()], progress=False)
    return prepared if what == "prepared" else tfmq_fx.convert(prepared)


def converted_graph():
    return given("program").graph_module


STAGES = {
    "prepare": lambda value: tfmq_fx.prepare(value, timesteps=TIMESTEPS),
    "calibrate": lambda value: tfmq_fx.calibrate(value, [batch()], progress=False),
    "reconstruct": lambda value: tfmq_fx.reconstruct(value, [batch()], progress=False),
    "convert": tfmq_fx.convert,
    "lower": lambda value: tfmq_fx.lower(value, "reference"),
    "capture": lambda value: tfmq_fx.capture(value, batch()),
}
WRONG = [
    ("prepare", "model", "tfmq_fx.capture"),
    ("prepare", "pipeline", "pass pipe.unet"),
    ("prepare", "prepared", "prepared, with observers"),
    ("prepare", "program", "converted already"),
    ("calibrate", "model", "tfmq_fx.capture"),
    ("calibrate", "captured", "call tfmq_fx.prepare"),
    ("calibrate", "program", "converted already"),
    ("reconstruct", "captured", "call tfmq_fx.prepare"),
    ("reconstruct", "program", "converted already"),
    ("convert", "model", "tfmq_fx.capture"),
    ("convert", "captured", "tfmq_fx.prepare"),
    ("convert", "program", "converted already"),
    ("lower", "model", "tfmq_fx.quantize"),
    ("lower", "captured", "tfmq_fx.prepare"),
    ("lower", "prepared", "call tfmq_fx.convert"),
    ("lower", "pipeline", "pass pipe.unet"),
    ("capture", "pipeline", "pass pipe.unet"),
]


def one_sentence(call, part):
    with pytest.raises(TfmqError) as caught:
        call()
    message = str(caught.value)
    assert part in message and "\n" not in message


@pytest.mark.parametrize("stage, what, part", WRONG, ids=[f"{stage}-{what}" for stage, what, _ in WRONG])
def test_the_wrong_stage(stage, what, part):
    one_sentence(lambda: STAGES[stage](given(what)), part)


@pytest.mark.parametrize("stage", ["prepare", "calibrate", "reconstruct", "convert"])
def test_a_converted_graph(stage):
    one_sentence(lambda: STAGES[stage](converted_graph()), "converted already")


def test_torchaos_prepare_twice():
    quantizer = tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS)
    prepared = prepare_pt2e(torch.export.export(small_denoiser(), batch()).module(check_guards=False), quantizer)
    one_sentence(lambda: prepare_pt2e(prepared, tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS)), "once")


def test_a_dictionary_as_configuration():
    for call in (
        lambda: tfmq_fx.TFMQQuantizer({"weight_bits": 8}),
        lambda: tfmq_fx.prepare(given("captured"), {"weight_bits": 8}, timesteps=TIMESTEPS),
    ):
        one_sentence(call, "QuantizationConfig(**values)")


def test_a_bare_string_keeps_one_entry():
    assert QuantizationConfig(keep_float="input").keep_float == ("input",)


def test_a_pattern_that_matches_nothing_is_named():
    config = QuantizationConfig(keep_float=("input", "dwon.*", "leave"))
    with pytest.warns(UserWarning, match=r"'dwon\.\*'.*matches no layer"):
        tfmq_fx.prepare(given("captured"), config, timesteps=TIMESTEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tfmq_fx.prepare(given("captured"), QuantizationConfig(keep_float=("down.*",)), timesteps=TIMESTEPS)


def test_an_uncalibrated_graph_is_not_converted():
    prepared = tfmq_fx.prepare(given("captured"), timesteps=TIMESTEPS)
    with pytest.raises((ConfigError, tfmq_fx.CalibrationError), match="calibrat"):
        tfmq_fx.convert(prepared)


def test_a_constant_that_export_loses_is_named():
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 4, "patch_size": 2}
    widths = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8}
    model = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, **widths, **sizes)
    other = (torch.randn(1, 3, 4, 12, 12), torch.randn(1, 4, 8), torch.tensor([100]))
    one_sentence(lambda: tfmq_fx.capture(model, other), "lifted_tensor_0")
    stored = (torch.randn(1, 2, 4, 8, 8), torch.randn(1, 4, 8), torch.tensor([100]))
    tfmq_fx.prepare(tfmq_fx.capture(model, stored), timesteps=[100, 200])


# -- arguments of another kind --------------------------------------------------------------------------------------


SHORT = {"iterations": 2, "temporal_iterations": 2}
ARGUMENTS = {
    "quantize": (lambda: tfmq_fx.quantize(small_denoiser(), None, None, timesteps=TIMESTEPS), "batches= is a NoneType"),
    "quantize, a batch": (
        lambda: tfmq_fx.quantize(small_denoiser(), None, batch()[0], timesteps=TIMESTEPS),
        "batches= is a single batch",
    ),
    "quantize, no config": (
        lambda: tfmq_fx.quantize(small_denoiser(), {}, [batch()], timesteps=TIMESTEPS),
        "the configuration is a dict",
    ),
    "calibrate": (lambda: tfmq_fx.calibrate(given("prepared"), 5), "batches= is a int"),
    "recorded_timesteps": (lambda: tfmq_fx.recorded_timesteps(None), "batches= is a NoneType"),
    "reconstruct": (lambda: tfmq_fx.reconstruct(given("prepared"), None), "batches= is a NoneType"),
    "reconstruct, a name": (
        lambda: tfmq_fx.reconstruct(given("prepared"), [batch()], "tira"),
        "reconstruction='tira' is not supported: use one of",
    ),
    "reconstruct, none": (lambda: tfmq_fx.reconstruct(given("prepared"), [batch()], "none"), "asks for none"),
    "reconstruct, a kind": (lambda: tfmq_fx.reconstruct(given("prepared"), [batch()], 3), "reconstruction=3 must be"),
    "reconstruct, directory": (
        lambda: tfmq_fx.reconstruct(given("prepared"), [batch()], SHORT, directory=3),
        "directory= is a int",
    ),
    "record, a pipeline": (lambda: tfmq_fx.record_trajectories(None, None), "NoneType has no module 'unet'"),
    "record, a function": (lambda: tfmq_fx.record_trajectories(Pipeline(), None), "run=None must be a function"),
    "program_from_graph": (lambda: tfmq_fx.program_from_graph(None), "this is a NoneType"),
    "NormalTimesteps": (lambda: tfmq_fx.NormalTimesteps("a"), "the NDTC mean is 'a'"),
}


@pytest.mark.parametrize("call, part", ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_of_another_kind(call, part):
    one_sentence(call, part)


@pytest.mark.parametrize("config", [SHORT, "tiar"], ids=str)
def test_a_reconstruction_by_name_or_fields(config, monkeypatch):
    monkeypatch.setitem(RECONSTRUCTIONS, "tiar", ReconstructionConfig(granularity="none", **SHORT))
    graph = copy.deepcopy(given("prepared"))
    report = tfmq_fx.reconstruct(graph, [batch()], config, progress=False)
    assert report.units and tfmq_fx.convert(graph).config.reconstruction == ReconstructionConfig.of(config)
