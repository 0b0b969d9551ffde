"""The engines of others as backends, on very small models; each is skipped where it is not installed."""

import dataclasses
import importlib.util
import json
import time

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser, tiny_unet
from tests.processor import multiplies_bytes, on_integer_kernels
from tfmq_fx import LoweringError, QuantizationConfig, TimestepError
from tfmq_fx.lowering.backends import auto
from tfmq_fx.lowering.backends.inductor.native import precisions
from tfmq_fx.lowering.backends.openvino import OpenVINOBackend
from tfmq_fx.lowering.backends.registry import available_backends
from tfmq_fx.lowering.report.matching import read_kernels
from tfmq_fx.lowering.report.reasons import MISSED, NO_EXACT_BYTES, NO_MATMUL, WIDE
from tfmq_fx.lowering.report.report import LoweringReport, ReportEntry

ENGINES = ("openvino", "onnxruntime")
INSTALLED_NAMES = [name for name in ENGINES if name in available_backends()]
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(name not in available_backends(), reason=f"{name} is not installed"))
    for name in ENGINES
]


@pytest.fixture(scope="module")
def program():
    config = QuantizationConfig(unknown_timestep="error", shortcut_bits=None)
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)


@pytest.fixture(scope="module")
def reference(program):
    return tfmq_fx.lower(program, "reference")


@pytest.mark.parametrize("backend", INSTALLED)
def test_every_eligible_layer_is_on_an_integer_kernel(backend, program, reference):
    denoiser = tfmq_fx.lower(program, backend)
    report = denoiser.report
    assert report.backend == backend and report.temporal_layers == 0 and report.table_rows == len(TIMESTEPS)
    assert [e.name for e in report.entries if e.reason == MISSED] == []
    assert on_integer_kernels(report, 7)
    for size in (1, 3, 9):
        x, t = batch(size)
        assert relative(denoiser(x, t), reference(x, t)) < 0.05
    # Mixed timesteps in one batch, each with its row of the table.
    x, _ = batch(2)
    t = TIMESTEPS[[1, 8]]
    assert torch.allclose(denoiser(x, t)[1:], denoiser(x[1:], t[1:]), atol=1e-4)
    with pytest.raises(TimestepError, match="101"):
        denoiser(x, 101)


@pytest.mark.parametrize("backend", INSTALLED)
def test_results_outlive_the_next_call(backend, program):
    denoiser = tfmq_fx.lower(program, backend)
    x, t = batch(2)
    first = denoiser(x, t)
    kept = first.clone()
    denoiser(-x, t)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(weight_bits=4),
        QuantizationConfig(temporal="cache"),
        QuantizationConfig(keep_float=("attention",), symmetric_activations=True),
        QuantizationConfig(unknown_timestep="nearest", table="float16"),
    ],
    ids=["4-bit weights", "int8 table", "float attention", "nearest timestep, float16 table"],
)
def test_configurations(backend, config):
    program = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    denoiser, reference = tfmq_fx.lower(program, backend), tfmq_fx.lower(program, "reference")
    assert denoiser.report.integer_kernels >= denoiser.report.eligible - 2 or not multiplies_bytes(backend)
    x, t = batch(3)
    assert relative(denoiser(x, t), reference(x, t)) < 0.05


@pytest.fixture(scope="module")
def program_by_timestep():
    config = QuantizationConfig(activation_groups=len(TIMESTEPS), unknown_timestep="error", shortcut_bits=None)
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)


@pytest.mark.parametrize("backend", INSTALLED)
def test_ranges_by_timestep_take_mixed_timesteps_on_integer_kernels(backend, program_by_timestep, monkeypatch):
    denoiser = tfmq_fx.lower(program_by_timestep, backend)
    expected = tfmq_fx.lower(program_by_timestep, "reference")
    report = denoiser.report
    assert on_integer_kernels(report, 7)
    reasons = {entry.reason for entry in report.entries if entry.operator == "linear"}
    assert reasons == {""} or not multiplies_bytes(backend)
    calls = []
    run = denoiser._compiled[0]
    monkeypatch.setattr(denoiser, "_compiled", (lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs),))
    x, _ = batch(len(TIMESTEPS))
    t = TIMESTEPS[torch.randperm(len(TIMESTEPS), generator=torch.Generator().manual_seed(0))]
    together, wanted = denoiser(x, t), expected(x, t)
    assert len(calls) == 1  # nothing is split
    for item in range(len(t)):
        one = slice(item, item + 1)
        assert relative(together[one], wanted[one]) < 0.02
        assert relative(denoiser(x[one], t[one]), together[one]) < 0.02
    # The ranges differ, or nothing would be shown.
    assert relative(denoiser(x, t.flip(0)), wanted) > 0.02


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("tabulated", ["cache", "float"])
def test_ranges_by_timestep_with_stored_rows_and_without_a_table(backend, tabulated):
    config = QuantizationConfig(activation_groups=3, temporal=tabulated, shortcut_bits=None)
    program = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program, backend)
    x, t = batch(3)
    assert relative(denoiser(x, t), tfmq_fx.lower(program, "reference")(x, t)) < 0.02
    assert on_integer_kernels(denoiser.report, 7)


@pytest.fixture(scope="module")
def saved_unet(tmp_path_factory):
    """A model, its inputs, and the folder that its program was saved in."""
    model, x, t = tiny_unet().eval(), torch.randn(2, 1, 8, 8), TIMESTEPS[[2, 5]]
    program = tfmq_fx.quantize(model, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
    return model, x, t, tfmq_fx.save(program, tmp_path_factory.mktemp("artefacts") / "unet")


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_diffusers_unet_and_its_saved_artefact(backend, saved_unet):
    model, x, t, folder = saved_unet
    denoiser = tfmq_fx.lower(tfmq_fx.load(folder), backend)
    assert on_integer_kernels(denoiser.report, 1)
    with torch.no_grad():
        assert relative(denoiser(x, t).sample, model(x, t).sample) < 0.15
        assert type(denoiser(x, t)) is type(model(x, t))
    many = torch.randn(70, 1, 8, 8)
    assert denoiser(many, 100).sample.shape == many.shape


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_temporal_block_in_the_graph_has_the_row_of_each_item(backend, program, reference):
    denoiser = tfmq_fx.lower(program, backend, tabulate=False)
    report = denoiser.report
    assert report.temporal_layers == 4 and on_integer_kernels(report, 11)
    x, _ = batch(4)
    t = TIMESTEPS[[7, 1, 1, 4]]
    assert relative(denoiser(x, t), reference(x, t)) < 0.02
    with pytest.raises(TimestepError):
        denoiser(x, 12345)


@pytest.mark.parametrize("backend", INSTALLED)
def test_an_operator_without_a_translation_is_named(backend):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.PixelUnshuffle(2)).eval()
    x = torch.randn(2, 2, 8, 8)
    program = tfmq_fx.quantize(model, QuantizationConfig(temporal="float"), [(x,)], progress=False)
    with pytest.raises(LoweringError, match=r"no translation of aten\.pixel_unshuffle\.default.*backend='inductor'"):
        tfmq_fx.lower(program, backend)


@pytest.mark.parametrize("backend", ENGINES)
def test_a_missing_package_is_one_sentence_with_a_way_out(backend, program, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoweringError, match=rf'pip install "tfmq-fx\[{backend}\]"'):
        tfmq_fx.lower(program, backend)
    assert available_backends() == ("aot", "auto", "inductor", "reference")


@pytest.mark.skipif("openvino" not in available_backends(), reason="openvino is not installed")
def test_openvino_in_bfloat16(program, reference):
    denoiser = tfmq_fx.lower(program, "openvino", precision="bf16")
    x, t = batch(3)
    assert relative(denoiser(x, t), reference(x, t)) < 0.05


@pytest.mark.skipif("openvino" not in available_backends(), reason="openvino is not installed")
def test_openvino_runs_symmetric_attention_in_integers():
    config = QuantizationConfig(symmetric_attention=True)
    program = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    pairs = [node.args[2] for node in program.graph_module.graph.nodes if "quantize_per_tensor" in str(node.target)]
    assert pairs.count(128) == 6  # query, key and value, each quantized and dequantized
    denoiser = tfmq_fx.lower(program, "openvino")
    products = [entry for entry in denoiser.report.entries if entry.operator == "matmul"]
    assert [entry.kernel for entry in products] == ["integer" if multiplies_bytes("openvino") else "float"] * 2
    x, t = batch(3)
    assert relative(denoiser(x, t), tfmq_fx.lower(program, "reference")(x, t)) < 0.05


@pytest.mark.parametrize("backend", INSTALLED)
def test_without_vnni_nothing_saturates(backend, program, reference, monkeypatch):
    for module in ("openvino.backend", "openvino.quantization", "onnxruntime.session"):
        monkeypatch.setattr(f"tfmq_fx.lowering.backends.{module}.sums_bytes_exactly", lambda: False)
    denoiser = tfmq_fx.lower(program, backend)
    in_float = [entry.name for entry in denoiser.report.entries if entry.reason == NO_EXACT_BYTES]
    assert len(in_float) == (denoiser.report.eligible if backend == "openvino" else 0)
    assert denoiser.report.integer_kernels == denoiser.report.eligible - len(in_float)
    x, t = batch(3)
    assert relative(denoiser(x, t), reference(x, t)) < 0.01


def test_precisions_that_a_backend_lacks_are_refused(program):
    for backend, words in (
        ("inductor", "'f32'"),
        ("reference", "it takes none"),
        ("openvino", "'f32', 'bf16'"),
        ("onnxruntime", "'f32'"),
    ):
        with pytest.raises(LoweringError, match=words):
            tfmq_fx.lower(program, backend, precision="f8")


def test_a_wrong_engine_is_caught_by_the_parity_check(program, monkeypatch):
    def wrong(self, graph_module, batch, precision):
        return lambda *args, **kwargs: graph_module(*args, **kwargs) * 1.1, set()

    monkeypatch.setattr(OpenVINOBackend, "translate", wrong)
    with pytest.raises(LoweringError, match="parts from its reference"):
        tfmq_fx.lower(program, "openvino")


def test_what_an_engine_leaves_in_float_is_reported():
    entries = [
        ReportEntry("a", "linear", "integer", eligible=True),
        ReportEntry("b", "linear", "integer", eligible=True),
        ReportEntry("c", "matmul", "float", NO_MATMUL),
        ReportEntry("d", "matmul", "float", NO_MATMUL),
        ReportEntry("e", "matmul", "float", WIDE),
    ]
    read = read_kernels(entries, ["n1", "n2", "n3", "n4", "n5"], {"n1", "n4", "n5"})
    assert [e.kernel for e in read] == ["integer", "float", "float", "integer", "float"]
    assert [e.reason for e in read] == ["", MISSED, NO_MATMUL, "", WIDE]


def test_the_list_of_backends_names_the_engines(program):
    with pytest.raises(LoweringError, match="'onnxruntime', 'openvino'"):
        tfmq_fx.lower(program, "tensorrt")


def slow_and_fast(monkeypatch, program, delays):
    """``lower("auto")`` among stand-ins for the backends that take this long; None refuses."""

    def stand_in(backend, precision):
        if delays[backend] is None:
            msg = "no such operator"
            raise LoweringError(msg)
        denoiser = tfmq_fx.lower(program, "reference")
        denoiser.register_forward_pre_hook(lambda *_: time.sleep(delays[backend]))
        denoiser.report = dataclasses.replace(denoiser.report, backend=backend)
        return denoiser

    monkeypatch.setattr(auto, "candidates", lambda: [(name, None) for name in delays])
    monkeypatch.setattr(auto, "SECONDS", 0.0)
    return auto.lower_fastest(stand_in, batch(2), {})


def test_auto_takes_the_fastest_and_says_what_it_measured(program, monkeypatch):
    denoiser = slow_and_fast(monkeypatch, program, {"slow": 0.1, "fast": 0.0, "broken": None})
    report = denoiser.report
    assert report.backend == "fast" and [m.backend for m in report.measured] == ["fast", "slow", "broken"]
    assert report.measured[1].milliseconds > 100 and report.measured[2].milliseconds is None
    text = str(report)
    assert "fastest of 3" in text and "broken: no such operator" in text
    assert LoweringReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_auto_without_any_backend_says_why(program, monkeypatch):
    with pytest.raises(LoweringError, match="no backend can run this program: broken: no such operator"):
        slow_and_fast(monkeypatch, program, {"broken": None})


@pytest.mark.skipif(not INSTALLED_NAMES, reason="no engine is installed")
def test_auto_among_the_engines(program, reference, monkeypatch):
    without_inductor = [candidate for candidate in auto.candidates() if candidate[0] != "inductor"]
    monkeypatch.setattr(auto, "candidates", lambda: without_inductor)
    monkeypatch.setattr(auto, "SECONDS", 0.5)
    denoiser = tfmq_fx.lower(program, "auto")
    assert len(denoiser.report.measured) == len(without_inductor)
    assert denoiser.report.backend == denoiser.report.measured[0].backend
    x, t = batch(3)
    assert relative(denoiser(x, t), reference(x, t)) < 0.05


def test_auto_tries_inductor_and_what_is_installed():
    assert auto.candidates()[0] == ("inductor", precisions()[0])
    assert {name for name, _ in auto.candidates()} == {"inductor", *INSTALLED_NAMES}
