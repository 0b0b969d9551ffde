import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

import tfmq_fx
from tests.cli.test_cli import artefact, model, refused, save_pipeline, tfmq  # noqa: F401  (fixtures)
from tfmq_fx.data.bundled_model import load_model


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):  # noqa: F811
    """Another folder of the same architecture, with other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "tiny"
    module, _ = load_model(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.1
    module.save_pretrained(folder)
    return folder


def saved(artefact, out):  # noqa: F811
    """The tensors of two artefacts, and the names of those that differ."""
    ours, theirs = (tfmq_fx.load(folder).graph_module.state_dict() for folder in (artefact, out))
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_the_same_model_gives_the_same_artefact(model, artefact, tmp_path):  # noqa: F811
    result = tfmq("quantize", model, "--ranges-from", artefact, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert saved(artefact, tmp_path / "again") == []
    assert "activations keep their ranges, checked on noise, at 2 timesteps; 0 widened" in result.stdout
    assert "compared with float, on noise: relative error" in result.stdout


def test_a_fine_tune_and_a_lora(tuned, artefact, tmp_path):  # noqa: F811
    layer = "down_blocks.0.resnets.0.time_emb_proj"
    weight = load_model(tuned)[0].get_parameter(f"{layer}.weight")
    lora = {
        f"unet.{layer}.lora_A.weight": torch.ones(1, weight.shape[1]),
        f"unet.{layer}.lora_B.weight": torch.ones(8, 1),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    for out, further in ((plain, ()), (fused, ("--lora", tmp_path / "lora.safetensors", "--lora-scale", 0.01))):
        result = tfmq("quantize", tuned, "--ranges-from", artefact, "--out", out, *further)
        assert result.exit_code == 0, result.output
    assert all("weight" in name or "bias" in name or "observer" in name for name in saved(artefact, plain))
    assert any("time_emb_proj_weight_int8" in name for name in saved(plain, fused))
    # It is an artefact like any other.
    result = tfmq("sample", "--artefact", fused, "--samples", 1, "--steps", 4, "--backend", "reference", "--out",
                  tmp_path / "samples.png")  # fmt: skip
    assert result.exit_code == 0, result.output


def test_a_model_with_prompts(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    batches = [
        {"sample": torch.randn(1, 4, 8, 8), "timestep": t[None], "encoder_hidden_states": torch.randn(1, 3, 8)}
        for t in scheduler.timesteps
    ]
    tfmq_fx.save(tfmq_fx.quantize(unet, None, batches, timesteps=scheduler.timesteps), tmp_path / "artefact")
    out = tmp_path / "again"
    result = tfmq("quantize", tmp_path / "unet", "--ranges-from", tmp_path / "artefact", "--out", out)
    assert result.exit_code == 0, result.output
    assert saved(tmp_path / "artefact", out) == []


def test_the_bundled_model_end_to_end(tmp_path):
    first = tfmq("quantize", "--out", tmp_path / "first", "--steps", 2, "--calibration-samples", 2, "--batch-size", 2)
    assert first.exit_code == 0, first.output
    result = tfmq("quantize", "--ranges-from", tmp_path / "first", "--out", tmp_path / "second")
    assert result.exit_code == 0, result.output
    assert saved(tmp_path / "first", tmp_path / "second") == []
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8")) for name in ("first", "second")
    ]
    assert manifests[0]["scheduler"] == manifests[1]["scheduler"] and "fidelity" not in manifests[1]


def test_what_cannot_be_is_refused_in_a_sentence(model, artefact, tmp_path):  # noqa: F811
    out = ("--out", tmp_path / "out")
    other = save_pipeline(tmp_path / "other", block_out_channels=(8, 24))
    refused(tfmq("quantize", other, "--ranges-from", artefact, *out), "the model's architecture is not that of the")
    refused(tfmq("quantize", model, "--ranges-from", model, *out), "is not an artefact of tfmq_fx")
    refused(tfmq("quantize", artefact, "--ranges-from", artefact, *out), "MODEL is a float model")
    refused(
        tfmq("quantize", model, "--ranges-from", artefact, "--lora", tmp_path / "none", *out), "there is no LoRA file"
    )
    refused(tfmq("quantize", model, "--ranges-from", artefact, "--max-error", 1e-5, *out), "more than max_error=1e-05")
    assert not (tmp_path / "out").exists()
    for wrong in (("--steps", 4), ("--weight-bits", 4), ("--temporal", "cache")):
        result = tfmq("quantize", model, "--ranges-from", artefact, *wrong, *out)
        assert result.exit_code == 2 and "no effect beside --ranges-from" in result.output.replace("\n", " ")
    assert tfmq("quantize", model, "--lora-scale", 2, *out).exit_code == 2
