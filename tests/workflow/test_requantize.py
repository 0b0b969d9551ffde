import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.conditional_cases import BATCHES
from tests.models import TIMESTEPS, ClassDenoiser, PromptDenoiser, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig
from tfmq_fx.observers import MinMaxObserver, register_activation_observer
from tfmq_fx.observers.registry import unregister_activation_observer
from tfmq_fx.quantization.range_check import MARGIN

DATA = [batch(4, seed) for seed in range(6)]
NARROW = {"weight_bits": 4, "keep_float": ()}
CONFIGS = {
    "default": {},
    "groups": {"activation_groups": 3, "output_bits": 8},
    "one range": {"activation_groups": 1},
    "symmetric": {"symmetric_activations": True, "activation_range": "mse"},
    "cache": {"temporal": "cache"},
    "auto": {"temporal": "auto", "activation_range": "minmax"},
    "observed": {"temporal": "observed", "defer_softmax": False, "softmax_bits": 16},
    "float": {"temporal": "float", "overrides": {"up.*": {"weight_bits": 6}}, "reconstruction": "nearest"},
    "low rank": {**NARROW, "low_rank": 2, "reconstruction": "nearest"},
}


@functools.cache
def quantized(name="default"):
    return tfmq_fx.quantize(small_denoiser(), QuantizationConfig(**CONFIGS[name]), DATA, timesteps=TIMESTEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tfmq_fx.save(quantized(), tmp_path_factory.mktemp("artefact") / "small")


def tuned(change=0.05, seed=3):
    """The small denoiser with weights that a little noise was added to."""
    model, generator = small_denoiser(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * change * parameter.std().nan_to_num(1.0)
    return model


def with_one(name, factor):
    """The small denoiser with one weight multiplied."""
    model = small_denoiser()
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)
    return model


def assert_same(program, other):
    ours, theirs = program.graph_module.state_dict(), other.graph_module.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert torch.equal(program(*DATA[0]), other(*DATA[0]))


# --- the same weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_give_the_same_program_to_the_bit(name):
    program = quantized(name)
    before = copy.deepcopy(program.graph_module.state_dict())
    again = tfmq_fx.requantize(program, small_denoiser())
    assert_same(program, again)
    assert again.requantization.widened == () and again.requantization.drawn
    assert again.config == program.config and again.kept_float == program.kept_float
    assert all(torch.equal(value, before[key]) for key, value in program.graph_module.state_dict().items())


@pytest.mark.parametrize("name", ["default", "low rank", "cache"])
def test_so_do_they_from_an_artefact_and_with_batches(name, tmp_path):
    program = quantized(name)
    tfmq_fx.save(program, tmp_path / "artefact")
    again = tfmq_fx.requantize(tmp_path / "artefact", small_denoiser(), DATA)
    assert_same(program, again)
    assert again.requantization.widened == () and not again.requantization.drawn
    # The items of the check are those of the calibration, so the error is the one that was measured there.
    assert math.isclose(again.fidelity.error, program.fidelity.error, rel_tol=1e-4)
    assert again.requantization.fidelity == again.fidelity


def test_rows_that_were_added_later_keep_their_groups():
    program = tfmq_fx.add_timesteps(quantized("groups"), [50, 55, 950])
    again = tfmq_fx.requantize(program, small_denoiser())
    assert_same(program, again)
    assert torch.equal(again.timesteps, program.timesteps)


def test_classes_and_prompts_are_kept_too():
    torch.manual_seed(0)
    model = ClassDenoiser().eval()
    batches = [(*data, torch.tensor([0, 1, 2, 3])) for data in DATA]
    program = tfmq_fx.quantize(model, None, batches, timesteps=TIMESTEPS, finite=("class_labels",))
    again = tfmq_fx.requantize(program, model)
    assert torch.equal(again(*batches[0]), program(*batches[0])) and "class_labels" in again.finite
    torch.manual_seed(0)
    model = PromptDenoiser().eval()
    program = tfmq_fx.quantize(model, None, BATCHES, timesteps=TIMESTEPS)
    again = tfmq_fx.requantize(program, model)
    assert torch.equal(again(*BATCHES[0]), program(*BATCHES[0])) and not again.requantization.widened


def test_an_observer_that_is_not_registered_is_not_needed(tmp_path):
    class Foreign(MinMaxObserver):
        """A minimum and maximum of another package."""

    register_activation_observer("foreign", Foreign)
    try:
        config = QuantizationConfig(activation_range="foreign")
        program = tfmq_fx.quantize(small_denoiser(), config, DATA, timesteps=TIMESTEPS)
    finally:
        unregister_activation_observer("foreign")
    tfmq_fx.save(program, tmp_path / "artefact")
    assert_same(program, tfmq_fx.requantize(tmp_path / "artefact", small_denoiser()))


def test_a_fixed_batch_and_fractional_timesteps_are_captured_alike():
    model, data = small_denoiser(), batch(2)
    fixed = tfmq_fx.quantize(tfmq_fx.capture(model, data, dynamic_batch=False), None, [data], timesteps=TIMESTEPS)
    again = tfmq_fx.requantize(fixed, model)
    assert again.interface.fixed_batch and torch.equal(again(*data), fixed(*data))
    program = tfmq_fx.quantize(model, None, [(data[0], data[1] + 0.5)], timesteps=TIMESTEPS + 0.5)
    assert torch.equal(tfmq_fx.requantize(program, model).timesteps, program.timesteps)


def test_captured_graphs_and_exported_programs_are_taken():
    captured = tfmq_fx.capture(small_denoiser(), DATA[0])
    code = captured.code
    assert_same(quantized(), tfmq_fx.requantize(quantized(), captured))
    assert captured.code == code
    exported = torch.export.export(
        small_denoiser(), DATA[0], dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")})
    )
    assert_same(quantized(), tfmq_fx.requantize(quantized(), exported))


# --- other weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, DATA[:2]])
def test_a_fine_tune_loses_no_more_than_with_a_calibration_of_its_own(given):
    model, held_out = tuned(), batch(8, seed=77)
    fresh = tfmq_fx.quantize(model, None, DATA, timesteps=TIMESTEPS)
    program = tfmq_fx.requantize(quantized(), model, given)
    with torch.no_grad():
        expected = model(*held_out)
        error, usual = (relative(each(*held_out), expected) for each in (program, fresh))
        others = relative(quantized()(*held_out), expected)
    assert error < 1.3 * usual < others  # the old weights are another model


def test_the_temporal_block_follows_its_weights():
    model = with_one("time.one.weight", 3.0)
    fresh, program = (
        tfmq_fx.quantize(model, None, DATA, timesteps=TIMESTEPS).graph_module.state_dict(),
        tfmq_fx.requantize(quantized(), model).graph_module.state_dict(),
    )
    tables = [name for name in program if name.startswith("temporal_observer")]
    assert len(tables) == 6
    assert all(torch.equal(program[name], fresh[name]) for name in tables)
    assert not torch.equal(program["temporal_observer_1_scale"], quantized().graph_module.temporal_observer_1_scale)


@pytest.mark.parametrize("given", [None, DATA])
@pytest.mark.parametrize("name", ["default", "one range"])
def test_a_layer_with_doubled_weights_widens_what_stands_behind_it(name, given):
    model = with_one("down.conv1.weight", 2.0)
    report = tfmq_fx.requantize(quantized(name), model, given).requantization
    assert [entry.subject for entry in report.widened] == ["the input of layer 'down.conv2'"]
    (widened,) = report.widened
    assert 1 + MARGIN < widened.factor < 2.5
    assert widened.rows == (len(TIMESTEPS) if name == "default" else 1) and widened.widened >= widened.rows / 2
    assert "down.conv2" in str(report) and report.kept == 10


def test_widening_is_worth_it():
    model, held_out = with_one("down.conv1.weight", 8.0), batch(8, seed=77)
    fresh = tfmq_fx.quantize(model, None, DATA, timesteps=TIMESTEPS)
    with torch.no_grad():
        expected = model(*held_out)
        usual = relative(fresh(*held_out), expected)
        assert relative(tfmq_fx.requantize(quantized(), model)(*held_out), expected) < 2 * usual
        assert relative(tfmq_fx.requantize(quantized(), model, DATA)(*held_out), expected) < 1.3 * usual


def test_ranges_of_layers_that_saw_nothing_but_zeros_are_learnt_from_what_is_seen():
    program = tfmq_fx.quantize(with_one("down.conv1.weight", 0.0), None, DATA, timesteps=TIMESTEPS)
    with torch.no_grad():
        silent = with_one("down.conv1.weight", 0.0)
        for model in (silent,):
            model.down.conv1.bias.zero_()
            model.down.embed.weight.zero_()
            model.down.embed.bias.zero_()
    program = tfmq_fx.quantize(silent, None, DATA, timesteps=TIMESTEPS)
    again = tfmq_fx.requantize(program, small_denoiser())
    first = again.requantization.widened[0]
    assert first.factor == math.inf and "down.conv2" in first.subject
    with torch.no_grad():
        assert relative(again(*DATA[0]), small_denoiser()(*DATA[0])) < 0.2


def test_rounding_that_looks_at_data_needs_batches():
    config = QuantizationConfig(weight_bits=4)
    program = tfmq_fx.quantize(small_denoiser(), config, DATA, timesteps=TIMESTEPS, progress=False)
    with pytest.raises(tfmq_fx.ConfigError, match=r"reconstruction='gptq', which looks at data: pass a few batches="):
        tfmq_fx.requantize(program, tuned())
    rounded = tfmq_fx.requantize(program, tuned(), DATA, progress=False)
    nearest = tfmq_fx.requantize(program, tuned(), reconstruction="nearest")
    assert rounded.config == program.config and nearest.config.reconstruction.method == "nearest"
    with torch.no_grad():
        errors = [relative(each(*DATA[0]), tuned()(*DATA[0])) for each in (rounded, nearest)]
    assert errors[0] < errors[1]


def test_what_belongs_to_the_program_goes_with_it_and_the_error_on_noise_does_not(folder):
    program = dataclasses.replace(quantized(), scheduler={"_class_name": "DDIMScheduler"})
    again = tfmq_fx.requantize(program, tuned())
    assert again.scheduler == program.scheduler and again.fidelity is None
    report = again.requantization
    assert report.timesteps == (900.0, 400.0) and len(report.fidelity.timesteps) == 2
    assert "checked on noise, at 2 timesteps" in str(report) and report.to_dict()["drawn"]
    assert tfmq_fx.requantize(folder, tuned(), seed=1).requantization.fidelity != report.fidelity
    with pytest.raises(tfmq_fx.FidelityError, match=r"more than max_error=0\.0001"):
        tfmq_fx.requantize(folder, tuned(), max_error=1e-4)


# --- refusals -----------------------------------------------------------------------------------------


def changed(change):
    model = small_denoiser()
    change(model)
    return model.eval()


class AnotherActivation(type(small_denoiser())):
    """The same layers around another function."""

    def forward(self, sample, timestep):
        return super().forward(sample.tanh(), timestep)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: changed(lambda m: setattr(m.down, "conv1", nn.Conv2d(8, 8, 5, padding=2))),
            r"weight of down.conv1 .*5",
        ),
        (lambda: changed(lambda m: setattr(m.up, "shortcut", nn.Identity())) and wide(), r"down.conv1"),
        (lambda: changed(lambda m: setattr(m.down, "norm", nn.GroupNorm(2, 8))), r"group_norm.* in 'down.norm'"),
        (lambda: AnotherActivation().eval(), r"only this model computes aten.tanh"),
        (lambda: PromptDenoiser().eval(), r"PromptDenoiser is not called with the program's inputs"),
    ],
)
def test_another_architecture_is_refused_by_what_differs(make, words):
    with pytest.raises(tfmq_fx.CaptureError, match=rf"architecture is not that of the quantized program: .*{words}"):
        tfmq_fx.requantize(quantized(), make())


def wide():
    """A denoiser whose first block has another layer."""
    model = small_denoiser()
    model.down.conv1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    return model.eval()


def test_other_inputs_of_a_captured_graph_are_refused():
    captured = tfmq_fx.capture(small_denoiser(), (torch.randn(2, 1, 16, 16), torch.tensor([1, 2])))
    with pytest.raises(tfmq_fx.CaptureError, match=r"its input 'sample' is \[batch, 1, 16, 16\] float32 here"):
        tfmq_fx.requantize(quantized(), captured)


def test_weights_that_are_quantized_or_not_finite_are_refused():
    model = small_denoiser()
    model.down.conv1.weight = nn.Parameter(torch.zeros(8, 8, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(tfmq_fx.CaptureError, match=r"'down.conv1.weight' is a Parameter of int8, so it is quantized"):
        tfmq_fx.requantize(quantized(), model)
    with pytest.raises(tfmq_fx.CaptureError, match=r"'down.conv1.weight' holds NaN"):
        tfmq_fx.requantize(quantized(), with_one("down.conv1.weight", math.nan))
    with pytest.raises(tfmq_fx.CaptureError, match="cannot capture a QuantizedProgram"):
        tfmq_fx.requantize(quantized(), quantized())


def test_what_is_no_program_and_batches_that_are_none_are_refused():
    with pytest.raises(tfmq_fx.ConfigError, match="it was given a SmallDenoiser, a float model"):
        tfmq_fx.requantize(small_denoiser(), small_denoiser())
    with pytest.raises(tfmq_fx.ArtefactError, match="is not an artefact"):
        tfmq_fx.requantize("nowhere", small_denoiser())
    with pytest.raises(tfmq_fx.CalibrationError, match="batches= is empty"):
        tfmq_fx.requantize(quantized(), small_denoiser(), [])
    with pytest.raises(tfmq_fx.CalibrationError, match="calibration batch 0 does not fit"):
        tfmq_fx.requantize(quantized(), small_denoiser(), [(torch.randn(2, 1, 9, 9), torch.tensor([0, 100]))])
    with pytest.raises(tfmq_fx.NonFiniteError, match=r"NaN or infinite values in calibration batch 0"):
        tfmq_fx.requantize(quantized(), small_denoiser(), [(torch.full((1, 1, 8, 8), 3e38), torch.tensor([100]))])
