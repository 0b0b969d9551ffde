import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from typer.testing import CliRunner

import tfmq_fx
from tests.house.sources import ROOT
from tfmq_fx.cli.app import app, main
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend
from tfmq_fx.lowering.backends.registry import backend_names, register_backend, unregister_backend
from tfmq_fx.lowering.report.matching import NoKernels

COMMANDS = ("inspect", "presets", "backends", "quantize", "search", "sample", "compare", "diagnose", "bisect")
REFERENCE = ("--backend", "reference")


def tfmq(*arguments):
    return CliRunner(env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def refused(result, words, code=1):
    """One sentence on stderr, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, result.stderr
    assert words in sentences[0]
    assert "Traceback" not in result.output


def save_pipeline(folder, **changes):
    torch.manual_seed(0)
    unet = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "add_attention": False,
            **changes,
        }
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def artefact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("artefact") / "tiny-w8a8"
    result = tfmq("quantize", model, "--out", out, "--steps", 4, "--calibration-samples", 4, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    return out


# --- help and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = tfmq(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert "--help" in result.stdout


def test_the_version_is_the_package_s():
    result = tfmq("--version")
    assert result.exit_code == 0
    assert result.stdout == f"tfmq-fx {tfmq_fx.__version__}\n"


def test_the_help_names_every_command():
    result = tfmq("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["quantize"], ["sample"], ["quantize", "--out", "x", "--temporal", "x"], ["inspect", "--nonsense"]],
)
def test_wrong_usage_exits_with_2(arguments):
    assert tfmq(*arguments).exit_code == 2


def test_interrupting_exits_with_130(monkeypatch, model):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tfmq_fx.data.bundled_model.load_model", interrupt)
    assert tfmq("inspect", model).exit_code == 130


def test_a_bug_keeps_its_traceback(monkeypatch, model):
    def bug(_):
        raise AssertionError

    monkeypatch.setattr("tfmq_fx.data.bundled_model.load_model", bug)
    assert isinstance(tfmq("inspect", model).exception, AssertionError)


def test_main_prints_the_sentence_in_one_line_and_exits_with_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tfmq-fx", "inspect", str(tmp_path / ("long-name-" * 20))])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: there is no model folder")


# --- inspect ----------------------------------------------------------------------------------------


def test_inspect_draws_the_temporal_block(model):
    result = tfmq("inspect", model)
    assert result.exit_code == 0, result.output
    for line in (
        "10 linears",
        "h: 2 linears in the time embed",
        "time_embedding.linear_1 (32 × 8)",
        "g: 8 embedding layers",
        "mid_block.resnets.0.time_emb_proj (16 × 32) → mid_block.resnets.0",
        "features: 8 read outside the block",
        "3 of shape (batch × 8 × 1 × 1)",
    ):
        assert line in result.stdout


def test_inspect_a_model_that_takes_more_than_a_timestep(tmp_path):
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).save_pretrained(tmp_path / "text")
    assert "h: 2 linears" in tfmq("inspect", tmp_path / "text").stdout
    refused(tfmq("quantize", tmp_path / "text", "--out", tmp_path / "out"), "encoder_hidden_states")
    assert not (tmp_path / "out").exists()


def test_inspect_says_why_there_is_no_block(monkeypatch, model):
    from tfmq_fx.passes.analysis import TemporalBlock

    empty = TemporalBlock(reason="nothing reads it")
    monkeypatch.setattr("tfmq_fx.passes.analysis.find_temporal_block", lambda _: empty)
    result = tfmq("inspect", model)
    assert result.exit_code == 0
    assert "no temporal block: nothing reads it" in result.stdout


def test_inspect_an_artefact(artefact):
    result = tfmq("inspect", "--artefact", artefact)
    assert result.exit_code == 0, result.output
    for words in (
        "UNet2DModel",
        "4: 750 … 0",
        "fsc",
        "linear betas",
        "kept float: 2",
        "conv_out: keep_float has 'output'",
    ):
        assert words in result.stdout
    assert "temporal block of" not in result.stdout  # no model was named, so none is loaded
    fidelity = tfmq_fx.load(artefact).fidelity
    assert str(fidelity) in result.stdout and "timestep 750 " in result.stdout


@pytest.mark.parametrize("command", ["inspect", "quantize", "compare", "diagnose", "bisect"])
def test_an_artefact_in_the_place_of_a_model_is_named(command, artefact, tmp_path):
    needed = {
        "quantize": ("--out", tmp_path / "q"),
        "compare": ("--artefact", artefact, "--out", tmp_path / "c.png"),
        "diagnose": ("--artefact", artefact, "--out", tmp_path / "d"),
    }
    result = tfmq(command, artefact, *needed.get(command, ()))
    refused(result, f"{artefact} is a quantized artefact, and MODEL is a float model")
    assert (f"tfmq-fx inspect --artefact {artefact}" in result.stderr) == (command == "inspect")


@pytest.mark.parametrize("module", ["tfmq_fx", "tfmq_fx.cli"])
def test_the_command_line_is_a_module_too(module):
    call = [sys.executable, "-m", module, "presets"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and "tfmq-dm" in done.stdout, done.stderr


def test_a_loaded_program_is_shown_in_a_line(artefact):
    shown = repr(tfmq_fx.load(artefact))
    assert (
        shown.startswith("<QuantizedProgram of UNet2DModel: W8A8, temporal='fsc', 4 timesteps, ") and len(shown) < 150
    )


def test_an_artefact_opens_in_a_fresh_process(artefact):
    """Nothing but the artefact: the model's class was never imported there."""
    code = "import sys; from tfmq_fx.cli import main; sys.argv = ['tfmq-fx', *sys.argv[1:]]; main()"
    arguments = [sys.executable, "-c", code, "inspect", "--artefact", str(artefact)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "UNet2DModel" in done.stdout


# --- quantize ---------------------------------------------------------------------------------------


def test_quantize_writes_an_artefact_that_knows_its_schedule(artefact):
    program = tfmq_fx.load(artefact)
    assert program.timesteps.tolist() == [750, 500, 250, 0]
    assert program.scheduler["beta_schedule"] == "linear"
    assert program.config == tfmq_fx.QuantizationConfig()


def test_quantize_passes_its_options_on_and_replaces_its_own_artefact(model, artefact, tmp_path):
    out = shutil.copytree(artefact, tmp_path / "q")
    common = ("quantize", model, "--out", out, "--steps", 2, "--calibration-samples", 2)
    result = tfmq(*common, "--weight-bits", 4, "--temporal", "shared", "--activation-range", "mse", "--sampler", "ndtc",
                  "--ndtc-mean", 0.3, "--unknown-timestep", "nearest", "--keep-float", "output", "--keep-float",
                  "mid_block.*")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "× the fp32 weights" in result.stdout
    assert "2 timesteps" in result.stdout
    assert "  compared with float: relative error " in result.stdout.splitlines()[-1]
    assert tfmq_fx.load(out).config == tfmq_fx.QuantizationConfig(
        weight_bits=4,
        temporal="shared",
        activation_range="mse",
        unknown_timestep="nearest",
        keep_float=("output", "mid_block.*"),
        reconstruction="gptq",
    )


def test_quantize_refuses_bad_input_before_the_work_and_leaves_nothing(model, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("tfmq_fx.data.sampling.sample_trajectories", never)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused(tfmq("quantize", model, "--out", mine), "is not an artefact")
    assert (mine / "thesis.txt").read_text() == "years of work"
    out = tmp_path / "out"
    refused(tfmq("quantize", model, "--out", out, "--weight-bits", 9), "weight_bits=9")
    refused(tfmq("quantize", model, "--out", out, "--sampler", "ndtc", "--ndtc-mean", 0.9), "0 to 0.5")
    refused(tfmq("quantize", model, "--out", out, "--steps", 1001), "use 1 to 1000")
    refused(tfmq("quantize", tmp_path / "nowhere", "--out", out), "no model folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_quantize_writes_nothing_beyond_max_error(model, artefact, tmp_path):
    out = shutil.copytree(artefact, tmp_path / "q")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    common = ("quantize", model, "--out", out, "--steps", 2, "--calibration-samples", 2, "--weight-bits", 2)
    refused(tfmq(*common, "--max-error", 0.001), "more than max_error=0.001")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    refused(tfmq(*common, "--max-error", "inf"), "max_error=inf")
    assert tfmq(*common, "--max-error", 100).exit_code == 0


def test_what_the_package_warns_of_is_printed_once_and_libraries_are_quiet(model, tmp_path, monkeypatch):
    import warnings

    from tfmq_fx.data import bundled_model

    load_model = bundled_model.load_model

    def noisy(name):
        warnings.warn("of a library", stacklevel=2)  # credited to the command, which did not raise it
        return load_model(name)

    monkeypatch.setattr(bundled_model, "load_model", noisy)
    common = ("quantize", model, "--out", tmp_path / "q", "--steps", 2, "--calibration-samples", 2)
    result = tfmq(*common, "--keep-float", "no.such.layer")
    assert result.exit_code == 0, result.output
    shown = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert shown == ["warning: keep_float has 'no.such.layer', which matches no layer of this model"]


# --- sample -----------------------------------------------------------------------------------------


def test_sample_draws_images_from_the_artefact_alone(artefact, tmp_path):
    from PIL import Image

    out = tmp_path / "new" / "samples.png"
    result = tfmq("sample", "--artefact", artefact, "--out", out, "--samples", 3, *REFERENCE)
    assert result.exit_code == 0, result.output
    assert "3 samples, 4 steps" in result.stdout
    assert Image.open(out).size[0] == 2 * 64
    fewer = tfmq("sample", "--artefact", artefact, "--out", out, "--samples", 1, "--steps", 2, *REFERENCE)
    assert fewer.exit_code == 0, fewer.output  # every second timestep of four


def test_sample_takes_the_nearest_timestep_where_it_is_asked_to(artefact, tmp_path, monkeypatch):
    common = ("sample", "--artefact", artefact, "--out", tmp_path / "samples.png", "--samples", 1, "--steps", 3)
    nearest = tfmq(*common, *REFERENCE, "--unknown-timestep", "nearest")
    assert nearest.exit_code == 0, nearest.output
    assert "1 samples, 3 steps" in nearest.stdout
    assert tfmq_fx.load(artefact).config.unknown_timestep == "extend"

    def never(*_, **__):
        raise AssertionError

    # Refused before anything is compiled.
    monkeypatch.setattr("tfmq_fx.cli.denoising.lower_program", never)
    refused(tfmq(*common, *REFERENCE, "--unknown-timestep", "error"), "timestep 666 is not in the table")


def test_a_compiled_package_is_loaded_with_the_policy_that_was_asked_for(artefact, tmp_path, monkeypatch):
    asked, package = [], tmp_path / "tiny.pt2"
    package.touch()

    def load_denoiser(path, *, unknown_timestep=None):
        asked.append((path, unknown_timestep))
        return tfmq_fx.lower(tfmq_fx.load(artefact), "reference", unknown_timestep=unknown_timestep)

    monkeypatch.setattr("tfmq_fx.lowering.lower.load_denoiser", load_denoiser)
    common = ("sample", "--artefact", artefact, "--out", tmp_path / "a.png", "--samples", 1, "--backend", "aot")
    for options in (("--steps", 3, "--unknown-timestep", "nearest"), ()):
        result = tfmq(*common, "--package", package, *options)
        assert result.exit_code == 0, result.output
    assert asked == [(package, "nearest"), (package, "extend")]


def test_sample_refuses_bad_input(artefact, tmp_path):
    out = tmp_path / "samples.png"
    refused(tfmq("sample", "--artefact", tmp_path, *REFERENCE), "is not an artefact")
    refuses = ("--unknown-timestep", "error")
    common = ("sample", "--artefact", artefact, "--out", out, "--steps", 3)
    refused(tfmq(*common, *REFERENCE, *refuses), "not in the table")
    refused(tfmq("sample", "--artefact", artefact, "--out", out, "--steps", 2000, *REFERENCE), "use 1 to 1000")
    refused(tfmq("sample", "--artefact", artefact, "--out", tmp_path / "samples.xyz", *REFERENCE), ".png")
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "samples.png"
    refused(tfmq("sample", "--artefact", artefact, "--out", inside, "--samples", 1, *REFERENCE), str(tmp_path / "file"))
    assert not out.exists()


def test_an_artefact_without_a_schedule_says_so(artefact, tmp_path):
    program = tfmq_fx.load(artefact)
    program.scheduler = {}
    tfmq_fx.save(program, tmp_path / "bare")
    refused(tfmq("sample", "--artefact", tmp_path / "bare", *REFERENCE), "does not name its noise schedule")


def test_an_aot_package_is_compiled_once_and_used_again(monkeypatch, artefact, tmp_path):
    """Compiling itself is tested with the lowering; here it is about which of the two happens."""
    from tfmq_fx.cli.denoising import lower_program

    done = []
    monkeypatch.setattr("tfmq_fx.lowering.lower.lower", lambda _, backend, path: done.append(("compile", path)))
    monkeypatch.setattr("tfmq_fx.lowering.lower.load_denoiser", lambda path, **_: done.append(("load", path)))
    program, package = tfmq_fx.load(artefact), tmp_path / "one.pt2"
    lower_program(program, "aot", artefact, package)
    package.touch()
    lower_program(program, "aot", artefact, package)
    lower_program(program, "aot", artefact)
    default = artefact.parent / f"{artefact.name}.pt2"
    assert done == [("compile", package), ("load", package), ("compile", default)]


# --- backends ---------------------------------------------------------------------------------------


class Toy(CompilerBackend):
    """The graph as it is."""

    name, title, summary = "toy", "Toy", "runs the graph as it is"

    def compile_graphs(self, graphs, plan):
        return CompiledGraphs(tuple(graph.graph_module for graph in graphs), NoKernels("toys have none"))


def test_the_backend_option_takes_what_is_registered(artefact, tmp_path):
    common = ("sample", "--artefact", artefact, "--out", tmp_path / "a.png", "--samples", 1, "--backend")
    unknown = tfmq(*common, "toy")
    assert unknown.exit_code == 2 and "'reference'" in unknown.stderr and not (tmp_path / "a.png").exists()
    register_backend(Toy())
    try:
        result = tfmq(*common, "toy")
        assert result.exit_code == 0 and "toy: 0 of" in result.stdout, result.output
        listed = tfmq("backends").stdout
    finally:
        unregister_backend("toy")
    assert all(name in listed for name in (*backend_names(), "toy", "runs the graph as it is"))


def test_a_package_is_refused_where_none_is_written(artefact, tmp_path):
    call = ("sample", "--artefact", artefact, "--out", tmp_path / "a.png", "--package", tmp_path / "a.pt2", *REFERENCE)
    refused(tfmq(*call), "backend='reference' writes no package")


# --- compare ----------------------------------------------------------------------------------------


def test_compare_writes_a_picture_and_numbers(model, artefact, tmp_path):
    from PIL import Image

    out = tmp_path / "side-by-side.png"
    options = ("--samples", 4, "--rounds", 0, *REFERENCE)
    result = tfmq("compare", model, "--artefact", artefact, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.stdout
    assert Image.open(out).size[0] == 2 * 128 + 8
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert len(numbers["psnr"]["each"]) == 4
    assert numbers["psnr"]["min"] <= numbers["psnr"]["mean"]
    assert numbers["bytes"]["float32_weights"] > numbers["bytes"]["artefact"] > 0
    assert numbers["lowering"]["eligible"] == 0, "the reference runs no kernels that take a range per timestep"
    assert numbers["lowering"]["temporal_layers"] == 0
    assert numbers["speed"] == []
    assert (numbers["steps"], numbers["samples"], numbers["backend"]) == (4, 4, "reference")
    elsewhere = tmp_path / "elsewhere" / "numbers.json"
    assert tfmq("compare", model, "--artefact", artefact, "--out", out, "--json", elsewhere, *options).exit_code == 0
    assert json.loads(elsewhere.read_text())["psnr"] == numbers["psnr"]


def test_compare_takes_the_nearest_timestep_where_it_is_asked_to(model, artefact, tmp_path):
    out = tmp_path / "side-by-side.png"
    common = ("compare", model, "--artefact", artefact, "--out", out, "--samples", 1, "--rounds", 0, "--steps", 3)
    assert tfmq(*common, *REFERENCE, "--unknown-timestep", "nearest").exit_code == 0
    refused(tfmq(*common, *REFERENCE, "--unknown-timestep", "error"), "timestep 666 is not in the table")


def test_compare_times_both_in_turns(monkeypatch, model, artefact, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda module: module)  # Inductor takes a minute, and is not ours to test
    out = tmp_path / "c.png"
    result = tfmq("compare", model, "--artefact", artefact, "--out", out, "--samples", 1, "--rounds", 2, *REFERENCE)
    assert result.exit_code == 0, result.output
    assert "one step, batch 4" in result.stdout
    speed = json.loads(out.with_suffix(".json").read_text())["speed"]
    assert [entry["batch"] for entry in speed] == [1, 4]
    for entry in speed:
        assert len(entry["seconds"]["float"]) == len(entry["seconds"]["quantized"]) == 2
        assert entry["ratio"] == pytest.approx(entry["float"]["median"] / entry["quantized"]["median"])


def test_compare_refuses_another_model(artefact, tmp_path):
    other = save_pipeline(tmp_path / "other", block_out_channels=(8, 24))
    result = tfmq("compare", other, "--artefact", artefact, "--out", tmp_path / "c.png", *REFERENCE)
    refused(result, "its block_out_channels is [8, 16], this model's [8, 24]")
    assert not (tmp_path / "c.png").exists()
