"""Whole pipelines on the command line: their prompts in, their images out."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.cli.test_cli import refused, tfmq
from tests.diffusers.pipelines import CASES, WIDTH, dit, unet, vae
from tfmq_fx.cli.pipeline_call import CALL_FILE, PipelineCall, read_prompts
from tfmq_fx.diffusers.scheduler_names import SCHEDULERS, make_scheduler
from tfmq_fx.errors import ArtefactError, ConfigError

REFERENCE = ("--backend", "reference")


def tokenizer():
    """Letters are its tokens."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion that can read prompts."""
    torch.manual_seed(0)
    words = tokenizer()
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=16, num_attention_heads=4, num_hidden_layers=1, vocab_size=len(words),
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(config), tokenizer=words, unet=unet(),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(folder):
    path = folder.parent / "prompts.txt"
    path.write_text("a cat\n\n  a red house\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(folder):
    """The configuration that takes least time."""
    path = folder.parent / "config.json"
    path.write_text(json.dumps({"activation_groups": 1, "scale_channels": False}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(folder, prompts, plain):
    out = folder.parent / "sd-int8"
    options = ("--steps", 2, "--guidance", 3, "--size", "16x16", "--config", plain)
    result = tfmq("quantize", folder, "--prompts", prompts, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert "unet: " in result.stdout and "compared with float" in result.stdout
    assert not list(folder.parent.glob(".*"))  # nothing half-written
    return out


def test_the_folder_is_a_pipeline_with_a_quantized_model(quantized):
    index = json.loads((quantized / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert (quantized / "unet" / "manifest.json").is_file() and (quantized / "tokenizer").is_dir()
    assert PipelineCall.read(quantized) == PipelineCall(2, 3.0, 16, 16)


def test_another_sampler_and_other_steps(quantized, tmp_path):
    out = tmp_path / "samples.png"
    options = ("--prompt", "a dog", "--prompt", "a cat", "--samples", 2, "--scheduler", "euler", "--steps", 3)
    result = tfmq("sample", "--artefact", quantized, *options, *REFERENCE, "--out", out)
    assert result.exit_code == 0, result.output
    assert "4 images" in result.stdout and "reference: 0 of" in result.stdout
    assert Image.open(out).size[0] > 16


def test_compared_with_the_float_pipeline(folder, quantized, prompts, tmp_path):
    out = tmp_path / "comparison.png"
    result = tfmq("compare", folder, "--artefact", quantized, "--prompts", prompts, *REFERENCE, "--out", out)
    assert result.exit_code == 0, result.output
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["prompts"] == ["a cat", "a red house"] and content["call"]["steps"] == 2
    assert len(content["psnr"]) == 2 and min(content["psnr"]) > 25
    page = out.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "down_blocks.0" in page and "PSNR by image" in page


def test_class_labels_instead_of_prompts(tmp_path, plain):
    torch.manual_seed(0)
    dit().save_pretrained(tmp_path / "dit")
    labels, out = ("--class-labels", "3,7", "--steps", 2), tmp_path / "dit-int8"
    result = tfmq("quantize", tmp_path / "dit", *labels, "--config", plain, "--out", out)
    assert result.exit_code == 0, result.output
    result = tfmq("sample", "--artefact", out, *labels, *REFERENCE, "--out", tmp_path / "samples.png")
    assert result.exit_code == 0, result.output
    assert "2 images" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompts", "missing.txt"), "the prompts in missing.txt cannot be read"),
        (("--component", "transformer"), "has no component 'transformer'; it has scheduler, text_encoder"),
        (("--component", "unet", "--class-labels", "1", "--prompts", "prompts"), "are for different pipelines"),
        (("--component", "vae"), "cannot be saved: leave --component vae out"),
        (("--component", "unet", "--preset", "ptq4dm"), "a pipeline visits its own"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(options, words, folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    given = [prompts if option == "prompts" else option for option in options]
    refused(tfmq("quantize", folder, *given, "--out", tmp_path / "out"), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "512"), "'512' is no size"),
        (("--class-labels", "a,b"), "are no class labels"),
        (("--guidance", "-1"), "is no guidance scale"),
        (("--sampler", "ndtc"), "no effect on a pipeline"),
    ],
)
def test_wrong_usage(options, words, folder, prompts, tmp_path):
    result = tfmq("quantize", folder, "--prompts", prompts, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_options_that_only_a_pipeline_takes(tmp_path):
    result = tfmq("quantize", "--size", "16x16", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "without --prompts, --class-labels or --component" in " ".join(
        result.stderr.replace("│", " ").split()
    )
    result = tfmq("sample", "--artefact", tmp_path, "--prompt", "a cat")
    assert result.exit_code == 2 and "without a quantized pipeline" in " ".join(result.stderr.split())
    result = tfmq("sample", "--artefact", tmp_path, "--scheduler", "eulr")
    assert result.exit_code == 2 and "'eulr' is not one of 'ddim'" in " ".join(result.stderr.split())


def test_folders_that_do_not_fit(folder, quantized, prompts, tmp_path):
    refused(tfmq("quantize", folder / "unet", "--prompts", prompts, "--out", tmp_path / "out"), "is no pipeline")
    refused(tfmq("quantize", folder, "--prompts", prompts, "--out", folder), "choose another path")
    refused(tfmq("sample", "--artefact", folder, "--prompt", "a cat", "--out", tmp_path / "x.png"), "is quantized")
    damaged = tmp_path / "damaged"
    shutil.copytree(quantized, damaged)
    for content in ("[1]", "{", '{"steps": -1}', '{"steps": true}', '{"other": 1}', "[" * 9000):
        (damaged / CALL_FILE).write_text(content)
        with pytest.raises(ArtefactError, match="is damaged: delete it"):
            PipelineCall.read(damaged)
    refused(tfmq("sample", "--artefact", damaged, "--prompt", "a cat", "--out", tmp_path / "x.png"), "is damaged")


def test_a_pipeline_is_written_over_and_no_quantized_one_is_taken_for_a_float_one(
    folder, quantized, prompts, plain, tmp_path
):
    out = tmp_path / "again"
    shutil.copytree(quantized, out)
    options = ("--prompts", prompts, "--steps", 1, "--config", plain)
    result = tfmq("quantize", folder, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert PipelineCall.read(out).steps == 1
    refused(tfmq("quantize", out, *options, "--out", tmp_path / "out"), "is quantized already")
    refused(tfmq("compare", out, "--artefact", out, "--prompts", prompts, "--out", tmp_path / "x.png"), "already")
    refused(tfmq("sample", "--artefact", out, "--out", tmp_path / "x.png"), "takes prompts: add --prompt")
    both = ("--prompt", "a cat", "--class-labels", "3")
    refused(tfmq("sample", "--artefact", out, *both, "--out", tmp_path / "x.png"), "for different pipelines")
    refused(tfmq("quantize", folder, *options, "--size", "15x16", "--out", tmp_path / "out"), "divisible by 8")


def test_prompts_of_a_windows_editor(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\na\u2028house\r\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a\u2028house"]


def test_every_name_is_a_scheduler():
    noise, flow = CASES["sd"].pipeline(), CASES["flux"].pipeline()
    for name, entry in SCHEDULERS.items():
        made = make_scheduler(noise, name)
        made.set_timesteps(5)
        assert type(made).__name__ == entry.noise and len(made.timesteps) >= 5
        if entry.flow is None:
            with pytest.raises(ConfigError, match="flow matching; choose one of deis, dpm"):
                make_scheduler(flow, name)
            continue
        made = make_scheduler(flow, name)
        made.set_timesteps(5)
        assert type(made).__name__ == entry.flow and float(made.timesteps[0]) > 900
    with pytest.raises(ConfigError, match="'eulr' is none of ddim"):
        make_scheduler(noise, "eulr")
    plain = CASES["ddpm"].pipeline()
    assert type(make_scheduler(plain, "dpm++")).__name__ == "DPMSolverMultistepScheduler"
    with pytest.raises(ConfigError, match="DDPMPipeline does not scale its noise, which scheduler 'euler' expects"):
        make_scheduler(plain, "euler")
