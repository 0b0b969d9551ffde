"""What users pass by mistake where a number, a path, a pattern or a batch is meant: one sentence each."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import QuantizationConfig, ReconstructionConfig, TfmqError


def program():
    return tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS, progress=False)


CONFIGURATIONS = [
    {"keep_float": None}, {"keep_float": (1,)}, {"overrides": [("a", 1)]}, {"overrides": {1: {"weight_bits": 4}}},
    {"overrides": {"down.*": None}}, {"reconstruction": {"beta": 5}}, {"reconstruction": {"beta": ("a", "b")}},
    {"reconstruction": {"seed": 2**70}}, {"reconstruction": 7}, {"weight_bits": "8"}, {"activation_groups": 2.5},
]  # fmt: skip


@pytest.mark.parametrize("values", CONFIGURATIONS, ids=str)
def test_a_configuration_says_which_field_is_wrong(values):
    field = next(iter(values))
    inner = next(iter(values[field])) if isinstance(values[field], dict) and field == "reconstruction" else field
    with pytest.raises(tfmq_fx.ConfigError, match=str(inner)) as caught:
        QuantizationConfig(**values)
    assert "\n" not in str(caught.value)


def test_a_bare_role_is_one_entry():
    assert QuantizationConfig(keep_float="input").keep_float == ("input",)
    assert ReconstructionConfig(beta=[10, 2]).beta == (10, 2)


@pytest.mark.parametrize(
    "timesteps", [[10**400], [3 + 4j], TIMESTEPS.to("meta"), TIMESTEPS.to(torch.complex64), ["x"], [None], [], "abc"]
)
def test_timesteps_that_are_none(timesteps):
    captured = tfmq_fx.capture(small_denoiser(), batch())
    for call in (
        lambda: tfmq_fx.prepare(captured, timesteps=timesteps),
        lambda: tfmq_fx.add_timesteps(program(), timesteps) if len(timesteps) else tfmq_fx.prepare(captured),
    ):
        with pytest.raises(TfmqError, match="timesteps") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_one_timestep_may_be_added_as_a_number():
    assert tfmq_fx.add_timesteps(program(), 77).timesteps[-1] == 77


@pytest.mark.parametrize("path", [None, 3, b"bytes", "nul\0byte"])
def test_paths_that_are_none(path):
    for call in (
        lambda: tfmq_fx.save(program(), path),
        lambda: tfmq_fx.load(path),
        lambda: tfmq_fx.load_denoiser(path),
    ):
        with pytest.raises(tfmq_fx.ArtefactError, match="path of") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_link_that_leads_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for call in (lambda: tfmq_fx.save(program(), tmp_path / "loop"), lambda: tfmq_fx.load(tmp_path / "loop")):
        with pytest.raises(tfmq_fx.ArtefactError, match="cannot be used"):
            call()


@pytest.mark.parametrize("batches", [[None], [3], ["ab"], [batch(), None]])
def test_batches_that_are_none(batches):
    with pytest.raises(TfmqError) as caught:
        tfmq_fx.quantize(small_denoiser(), None, batches, timesteps=TIMESTEPS, progress=False)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_quantized_already_is_not_captured_again():
    with pytest.raises(tfmq_fx.CaptureError, match="converted already"):
        tfmq_fx.capture(program().graph_module, batch())


def test_tensors_without_memory_are_refused():
    denoiser, (x, t) = tfmq_fx.lower(program(), "reference"), batch()
    with pytest.raises(tfmq_fx.InputError, match=r"'sample' has no values of its own"):
        torch.func.grad(lambda sample: denoiser(sample, t).sum())(x)
    assert denoiser(x, t).shape == x.shape


@pytest.mark.parametrize("field", ["keep_float", "overrides"])
def test_a_pattern_that_matches_no_layer_is_said(field):
    values = {"keep_float": ("output", "nothing.*"), "overrides": {"nothing.*": {"weight_bits": 4}}}
    config = QuantizationConfig(**{field: values[field]})
    captured = tfmq_fx.capture(small_denoiser(), batch())
    with pytest.warns(UserWarning, match=rf"{field} has 'nothing\.\*', which matches no layer"):
        tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
