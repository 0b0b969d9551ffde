"""The parity check compares with the quantized program itself, all over the table, and refuses what is wrong."""

import dataclasses
import json

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, ClassDenoiser, batch, small_denoiser
from tfmq_fx import LoweringError, QuantizationConfig
from tfmq_fx.lowering import time_path
from tfmq_fx.lowering.backends.onnxruntime import OnnxRuntimeBackend
from tfmq_fx.lowering.report.parity import CEILING, check_parity, relative_error
from tfmq_fx.lowering.report.parity_examples import parity_examples
from tfmq_fx.passes import FoldWeightZeroPoints
from tfmq_fx.temporal.program import TemporalProgram

aten = torch.ops.aten
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
CALLS = [((X,), {}), ((X.flip(0),), {})]


# --- the check alone ----------------------------------------------------------------------------------


def test_equal_programs_pass():
    assert check_parity(torch.relu, torch.relu, CALLS) == (0.0, pytest.approx(1e-5, rel=0.5))


@pytest.mark.parametrize(
    ("factor", "narrow", "passes"), [(1.03, False, False), (1.03, True, True), (1.05, True, False)]
)
def test_an_error_that_rounding_does_not_explain_is_refused(factor, narrow, passes):
    def lowered(x):
        return torch.relu(x) * factor

    if passes:
        assert check_parity(lowered, torch.relu, CALLS, narrow=narrow)[0] == pytest.approx(factor - 1, rel=1e-3)
        return
    with pytest.raises(LoweringError, match="parts from its reference"):
        check_parity(lowered, torch.relu, CALLS, narrow=narrow)


def test_a_fault_in_the_last_call_is_refused():
    lowered = iter([torch.relu(X), torch.relu(X.flip(0)) * 1.1])
    with pytest.raises(LoweringError, match=r"parts from its reference: relative error 1\.00e-01"):
        check_parity(lambda x: next(lowered), torch.relu, CALLS)


def noisy(x):
    """A float rounding of the input moves the result by its own size."""
    return torch.sin(x * 1e6)


@pytest.mark.parametrize(
    "wrong", [torch.zeros_like, torch.rand_like, lambda x: noisy(x) / 2, lambda x: -noisy(x), lambda x: 1.5 * noisy(x)]
)
def test_no_noise_excuses_a_wrong_result(wrong):
    assert check_parity(noisy, noisy, CALLS)[1] > 0.88
    with pytest.raises(LoweringError, match="no result can be told from a wrong one") as caught:
        check_parity(wrong, noisy, CALLS)
    assert "\n" not in str(caught.value)


def test_a_noisy_program_passes_within_its_noise_and_below_the_ceiling():
    def mixed(x):
        return x + 0.1 * noisy(x)

    def other(x):
        return x + 0.1 * noisy(x * (1 + 1e-6))

    error, floor = check_parity(other, mixed, CALLS)
    assert 0.03 < error < 4 * floor < CEILING


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_on_either_side(value):
    def broken(x):
        return torch.where(torch.arange(8) == 3, value, x)

    with pytest.raises(LoweringError, match="parts from its reference: relative error inf"):
        check_parity(broken, torch.relu, CALLS)
    for lowered in (broken, torch.relu):
        with pytest.raises(LoweringError, match="the quantized program gives NaN or infinite values"):
            check_parity(lowered, broken, CALLS)


def test_results_of_another_shape_are_refused():
    for wrong in (lambda x: x[:1], lambda x: (x, x), lambda x: x[None]):
        with pytest.raises(LoweringError, match="parts from its reference: relative error inf"):
            check_parity(wrong, lambda x: x, CALLS)


def test_results_of_another_type_are_refused():
    for lowered, made in ((torch.Tensor.double, "float64"), (torch.Tensor.bfloat16, "bfloat16")):
        with pytest.raises(
            LoweringError, match=f"returns {made} where the quantized program returns float32"
        ) as caught:
            check_parity(lowered, lambda x: x + 0, CALLS, narrow=True)
        assert "\n" not in str(caught.value)
    assert check_parity(torch.Tensor.double, torch.Tensor.double, CALLS)[0] == 0.0
    with pytest.raises(LoweringError, match="where the quantized program returns float32"):
        check_parity(lambda x: [x, {"y": x.double()}], lambda x: [x, {"y": x}], CALLS)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e30])
def test_errors_are_relative_whatever_the_size(size):
    assert relative_error(X * size * 1.01, X * size) == pytest.approx(0.01, rel=1e-2)
    assert relative_error(X * 0, X * size) == 1.0


def test_in_the_place_of_zeros_only_zeros_are_right():
    assert relative_error(X * 0, X * 0) == 0.0 and relative_error(X * 1e-30, X * 0) == float("inf")


# --- the calls that are made --------------------------------------------------------------------------


def program_of(model, *inputs, dynamic=True, **config):
    captured = tfmq_fx.capture(model, inputs, dynamic_batch=dynamic)
    graph = tfmq_fx.prepare(captured, QuantizationConfig(**{"activation_groups": 1, **config}), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, [inputs], progress=False)
    return tfmq_fx.convert(graph)


@pytest.fixture(scope="module")
def program():
    return program_of(small_denoiser(), *batch())


def timesteps_of(program, *, one_timestep=False):
    examples = parity_examples(program.graph_module, program.indexed, program.timestep, one_timestep=one_timestep)
    assert len({float(args[0].sum()) for args, _ in examples}) == len(examples)
    return [args[1].tolist() for args, _ in examples]


def test_all_timesteps_of_a_small_program_are_looked_at(program):
    calls = timesteps_of(program)
    assert all(len(call) == 2 for call in calls) and {t for call in calls for t in call} == set(TIMESTEPS.tolist())


def test_a_large_program_is_looked_at_from_end_to_end(program, monkeypatch):
    monkeypatch.setattr("tfmq_fx.lowering.report.parity_examples.NUMBERS", 1)
    assert timesteps_of(program) == [[0, 600], [300, 900]]
    assert timesteps_of(program, one_timestep=True) == [[0, 0], [400, 400], [900, 900]]
    fixed = program_of(small_denoiser(), *batch(1), dynamic=False)
    assert timesteps_of(fixed) == [[0], [400], [900]]


def test_further_finite_inputs_vary_too():
    x, t = batch()
    model, labels = ClassDenoiser().eval(), torch.tensor([0, 3, 1, 2])
    program = tfmq_fx.quantize(model, None, [(x, t, labels)], timesteps=TIMESTEPS, finite={"class_labels": range(4)},
                               progress=False)  # fmt: skip
    examples = parity_examples(program.graph_module, program.indexed, "timestep", one_timestep=False)
    assert {label for args, _ in examples for label in args[2].tolist()} == {0, 1, 2, 3}


# --- faults planted in the lowering -------------------------------------------------------------------


def lower(program, monkeypatch, wrong=lambda result: result):
    """Lower to a stand-in for an engine: the graph itself, as the passes left it, and ``wrong`` of its result."""

    def translate(self, graph_module, batch, precision):
        return lambda *args, **kwargs: wrong(graph_module(*args, **kwargs)), set()

    monkeypatch.setattr(OnnxRuntimeBackend, "translate", translate)
    return tfmq_fx.lower(program, "onnxruntime")


def plant(monkeypatch, rewrite, fault):
    """Let a pass do something wrong besides what it does."""
    right = rewrite.rewrite

    def wrong(self, graph_module):
        modified = right(self, graph_module)
        fault(graph_module)
        return modified

    monkeypatch.setattr(rewrite, "rewrite", wrong)


def minus_for_silu(graph_module):
    for node in graph_module.graph.nodes:
        if node.target is aten.silu.default:
            node.target = aten.neg.default
    graph_module.recompile()


def wrong_scales(graph_module):
    for name, value in graph_module.named_buffers():
        if name.endswith("_scale"):
            value.mul_(1.2)


def plant_in_features(monkeypatch, fault):
    """Let the temporal program give features out that ``fault`` has changed: ``(timestep, features, program)``."""
    right = TemporalProgram.__call__

    def wrong(self, timestep, *finite):
        return tuple(fault(timestep.reshape(-1), value, self) for value in right(self, timestep, *finite))

    monkeypatch.setattr(TemporalProgram, "__call__", wrong)


def wrong_features(timestep, value, program):
    return -value


def one_wrong_timestep(timestep, value, program):
    return torch.where((timestep == program.timesteps[5])[:, None], -value, value)


def last_timestep_lost(timestep, value, program):
    return torch.where((timestep == program.timesteps[-1])[:, None], 0 * value, value)


def test_the_program_without_faults_passes(program, monkeypatch):
    report = lower(program, monkeypatch).report
    assert report.parity_error < 1e-3 and report.parity_floor < 0.01


def test_a_fault_in_a_rewrite_of_the_lowering_is_refused(program, monkeypatch):
    plant(monkeypatch, FoldWeightZeroPoints, wrong_scales)
    with pytest.raises(LoweringError, match="parts from its reference"):
        lower(program, monkeypatch)


def test_a_fault_in_the_cut_of_the_time_path_is_refused(program, monkeypatch):
    right = time_path.split_temporal

    def wrong(*args):
        split = right(*args)
        minus_for_silu(split.time)
        return split

    monkeypatch.setattr(time_path, "split_temporal", wrong)
    with pytest.raises(LoweringError, match="parts from its reference"):
        lower(program, monkeypatch)


@pytest.mark.parametrize("fault", [wrong_features, one_wrong_timestep, last_timestep_lost])
def test_a_fault_in_the_temporal_program_is_refused(fault, program, monkeypatch):
    plant_in_features(monkeypatch, fault)
    with pytest.raises(LoweringError, match="parts from its reference"):
        lower(program, monkeypatch)


def test_zeros_are_refused(program, monkeypatch):
    with pytest.raises(LoweringError, match=r"parts from its reference: relative error 1\.00e\+00"):
        lower(program, monkeypatch, torch.zeros_like)


def test_a_dead_program_is_refused(program, monkeypatch):
    dead = program_of(small_denoiser(), *batch())
    with torch.no_grad():
        dead.graph_module.get_parameter("leave.bias").fill_(torch.nan)
    with pytest.raises(LoweringError, match="the quantized program gives NaN or infinite values"):
        lower(dead, monkeypatch)


def test_the_report_says_what_was_lost_against_float_too():
    quantized = tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS)
    report = tfmq_fx.lower(quantized, "reference").report
    lines = str(report).splitlines()
    assert report.fidelity == quantized.fidelity
    assert lines[1].startswith("  compared with the reference: relative error ")
    assert lines[2] == f"  compared with float: {quantized.fidelity}"
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report
    unknown = dataclasses.replace(report, fidelity=None)
    assert "fidelity" not in unknown.to_dict() and type(report).from_dict(unknown.to_dict()) == unknown
    assert "compared with float: not measured" in str(unknown)
