import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import tfmq_fx
from tests.models import small_denoiser

RANK = 2


def factors(layer, names=("lora_A.weight", "lora_B.weight"), seed=0):
    """The factors of a layer's weight by name, in front of them the layer's."""
    weight = small_denoiser().get_parameter(f"{layer}.weight")
    generator = torch.Generator().manual_seed(seed)
    spatial = weight.shape[2:]
    down = torch.randn(RANK, weight.shape[1], *spatial, generator=generator)
    up = torch.randn(weight.shape[0], RANK, *[1] * len(spatial), generator=generator)
    return dict(zip(names, (down, up), strict=True))


def product(parts):
    down, up = parts.values()
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def change(model, layer):
    return model.get_parameter(f"{layer}.weight").detach() - small_denoiser().get_parameter(f"{layer}.weight").detach()


NAMES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "adapter": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("layer", ["qkv", "down.conv1", "up.shortcut"])
def test_the_product_is_added_whatever_the_names(form, layer, tmp_path):
    written = layer.replace(".", "_") if form == "kohya" else layer
    parts = factors(layer, [name.format(written) for name in NAMES[form]])
    others = {"text_encoder.q.lora_A.weight": torch.ones(2, 2), "lora_te1_q.alpha": torch.tensor(1.0)}
    save_file({**parts, **others}, tmp_path / "lora.safetensors")
    model = small_denoiser()
    assert tfmq_fx.fuse_lora(model, tmp_path / "lora.safetensors", 0.5) == (layer,)
    torch.testing.assert_close(change(model, layer), 0.5 * product(parts), atol=1e-6, rtol=1e-4)
    names = [
        name for name, value in model.named_parameters() if not torch.equal(value, small_denoiser().get_parameter(name))
    ]
    assert names == [f"{layer}.weight"]


def test_alpha_and_metadata_scale_the_product(tmp_path):
    parts = factors("qkv", ["qkv.lora_A.weight", "qkv.lora_B.weight"])
    model = small_denoiser()
    tfmq_fx.fuse_lora(model, {**parts, "qkv.alpha": torch.tensor(1.0)})
    torch.testing.assert_close(change(model, "qkv"), product(parts) / RANK, atol=1e-6, rtol=1e-4)
    metadata = {
        "lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 6, "text_encoder.use_dora": True})
    }
    save_file(parts, tmp_path / "lora.safetensors", metadata)
    model = small_denoiser()
    tfmq_fx.fuse_lora(model, tmp_path / "lora.safetensors")
    torch.testing.assert_close(change(model, "qkv"), 3 * product(parts), atol=1e-6, rtol=1e-4)
    tfmq_fx.fuse_lora(model, tmp_path / "lora.safetensors", -1.0)
    assert change(model, "qkv").abs().max() < 1e-5


def test_old_attention_processors_and_half_precision():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    ).half()  # fmt: skip
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = {}
    for end in ("to_q", "to_out"):
        lora[f"unet.{path}.processor.{end}_lora.down.weight"] = torch.ones(1, 8)
        lora[f"unet.{path}.processor.{end}_lora.up.weight"] = torch.ones(8, 1)
    assert tfmq_fx.fuse_lora(model, lora) == (f"{path}.to_q", f"{path}.to_out.0")
    after = model.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert sorted(changed) == [f"{path}.to_out.0.weight", f"{path}.to_q.weight"]
    expected = before[f"{path}.to_q.weight"].float() + 1
    assert after[f"{path}.to_q.weight"].dtype is torch.float16
    assert torch.allclose(after[f"{path}.to_q.weight"].float(), expected, atol=1e-3)


QKV = factors("qkv", ["qkv.lora_A.weight", "qkv.lora_B.weight"])


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({**QKV, "elsewhere.lora_A.weight": torch.ones(2, 2)}, "'elsewhere.lora_A.weight', and the model has no such"),
        ({"qkv.lora_A.weight": QKV["qkv.lora_A.weight"]}, "layer 'qkv' has one factor instead of two"),
        ({**QKV, "qkv.lora_B.weight": torch.ones(3, RANK)}, r"factors of \[2, 8\] and \[3, 2\] do not make up"),
        ({**QKV, "qkv.lora_magnitude_vector": torch.ones(24)}, "'qkv.lora_magnitude_vector' is neither a factor nor"),
        ({**QKV, "qkv.lora_A.weight": torch.full((RANK, 8), torch.nan)}, "layer 'qkv' has NaN or infinite values"),
        ({"text_encoder.q.lora_A.weight": torch.ones(2, 2)}, "it holds nothing for the denoiser"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(lora, words):
    model = small_denoiser()
    with pytest.raises(tfmq_fx.ConfigError, match=f"the LoRA cannot be fused: .*{words}"):
        tfmq_fx.fuse_lora(model, lora)
    assert all(torch.equal(value, small_denoiser().state_dict()[name]) for name, value in model.state_dict().items())


def test_only_safetensors_are_read(tmp_path):
    file = tmp_path / "lora.bin"
    torch.save(QKV, file)
    with pytest.raises(tfmq_fx.ConfigError, match="is no safetensors file"):
        tfmq_fx.fuse_lora(small_denoiser(), file)
    with pytest.raises(tfmq_fx.ConfigError, match="there is no LoRA file"):
        tfmq_fx.fuse_lora(small_denoiser(), tmp_path / "nowhere.safetensors")
    with pytest.raises(tfmq_fx.ConfigError, match="scale='strong' must be a number"):
        tfmq_fx.fuse_lora(small_denoiser(), QKV, "strong")


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "alpha_pattern"])
def test_other_trainings_are_refused_by_what_the_file_says(field, tmp_path):
    values = {
        "unet.r": RANK,
        "unet.lora_alpha": RANK,
        f"unet.{field}": {"qkv": 4} if field == "alpha_pattern" else True,
    }
    save_file(QKV, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(values)})
    with pytest.raises(tfmq_fx.ConfigError, match=f"it was trained with {field}"):
        tfmq_fx.fuse_lora(small_denoiser(), tmp_path / "lora.safetensors")
