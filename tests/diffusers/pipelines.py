"""Tiny pipelines of diffusers' real classes, with random weights, and how each is called: no tokenizer, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx import QuantizationConfig, QuantizedProgram

#: Of prompt embeddings.
TOKENS, WIDTH = 5, 32


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A pipeline and a call of it.

    Attributes:
        make: Builds it.
        arguments: Of a call, but for the generator and the number of steps.
        component: What is quantized.
        finite: What else comes from a finite set.
    """

    make: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    component: str = "unet"
    finite: tuple[str, ...] = ()

    def pipeline(self) -> Any:
        torch.manual_seed(0)
        pipeline = self.make()
        pipeline.set_progress_bar_config(disable=True)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.eval()
        return pipeline

    def quantize(self, config: QuantizationConfig | None = None) -> QuantizedProgram:
        """The component, quantized over a trajectory; by default in the way that takes least time."""
        pipeline = self.pipeline()
        batches = tfmq_fx.record_trajectories(
            pipeline, lambda pipe: self.sample(pipe, seed=1), component=self.component
        )
        return tfmq_fx.quantize(
            getattr(pipeline, self.component),
            config or QuantizationConfig(activation_groups=1, scale_channels=False),
            batches,
            timesteps=tfmq_fx.recorded_timesteps(batches),
            finite=self.finite,
            progress=False,
        )

    def absent(self, pipeline: Any) -> dict[str, None]:
        """The components that a pipeline was made without: ``from_pretrained`` has to be told of them."""
        return {name: None for name, module in pipeline.components.items() if module is None}

    def sample(self, pipeline: Any, seed: int = 0, **arguments: Any) -> Any:
        """Images, latents or frames, as a tensor."""
        generator = torch.Generator().manual_seed(seed)
        given = {"num_inference_steps": 3, "generator": generator, **self.arguments, **arguments}
        result = pipeline(**given)[0]
        return torch.as_tensor(result) if not isinstance(result, list) else torch.as_tensor(result[0])


def vae(channels: int = 4, **values: Any) -> d.AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **values}
    return d.AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, **blocks, **given)


def unet(**values: Any) -> d.UNet2DConditionModel:
    given = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16,),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        **values,
    }
    return d.UNet2DConditionModel(**given)


def ddpm() -> Any:
    model = d.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return d.DDPMPipeline(model, d.DDPMScheduler())


def stable_diffusion() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=16, num_attention_heads=4, num_hidden_layers=1, vocab_size=100
    )
    return d.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=None,
        unet=unet(),
        scheduler=d.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=4,
        num_hidden_layers=1,
        vocab_size=100,
        projection_dim=WIDTH,
    )
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        use_linear_projection=True,
    )
    return d.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=None,
        tokenizer_2=None,
        unet=model,
        scheduler=d.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    model = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=64,
        out_channels=4,
    )
    autoencoder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)
    texts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return d.StableDiffusion3Pipeline(model, d.FlowMatchEulerDiscreteScheduler(), autoencoder, **texts)


def flux() -> Any:
    model = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    autoencoder = vae(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return d.FluxPipeline(d.FlowMatchEulerDiscreteScheduler(), autoencoder, transformer=model, **texts)


def pixart() -> Any:
    model = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return d.PixArtAlphaPipeline(None, None, vae(), model, d.DDIMScheduler())


def dit() -> Any:
    model = d.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return d.DiTPipeline(model, vae(), d.DDIMScheduler())


def stable_video_diffusion() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        cross_attention_dim=WIDTH,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    scheduler = d.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_type="continuous",
        timestep_spacing="leading", use_karras_sigmas=True, interpolation_type="linear", sigma_min=0.002,
        sigma_max=700.0, steps_offset=1,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    config = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=4, image_size=32,
        intermediate_size=37, patch_size=8,
    )  # fmt: skip
    from transformers import CLIPImageProcessor

    return d.StableVideoDiffusionPipeline(
        vae=autoencoder,
        image_encoder=CLIPVisionModelWithProjection(config),
        unet=model,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )


def wan() -> Any:
    model = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    autoencoder = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return d.WanPipeline(None, None, autoencoder, scheduler, transformer=model)


PROMPT = {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8)}
IMAGE = {"output_type": "pt", "height": 16, "width": 16}
POOLED = {
    "pooled_prompt_embeds": noise(1, 32, seed=9),
    "negative_pooled_prompt_embeds": noise(1, 32, seed=10),
}
MASKS = {
    "prompt_attention_mask": torch.ones(1, TOKENS),
    "negative_prompt_attention_mask": torch.ones(1, TOKENS),
}
CASES = {
    "ddpm": Case(ddpm, {"output_type": "np"}),
    "sd": Case(stable_diffusion, {**PROMPT, **IMAGE, "guidance_scale": 5.0}),
    "sdxl": Case(stable_diffusion_xl, {**PROMPT, **POOLED, **IMAGE, "guidance_scale": 5.0}),
    "sd3": Case(
        stable_diffusion_3,
        {
            **PROMPT,
            "pooled_prompt_embeds": noise(1, 64, seed=9),
            "negative_pooled_prompt_embeds": noise(1, 64, seed=10),
            **IMAGE,
        },
        "transformer",
    ),
    "flux": Case(
        flux,
        {"prompt_embeds": PROMPT["prompt_embeds"], "pooled_prompt_embeds": noise(1, 32, seed=9), **IMAGE},
        "transformer",
    ),
    "pixart": Case(
        pixart,
        {**PROMPT, **MASKS, "negative_prompt": None, **IMAGE, "use_resolution_binning": False},
        "transformer",
    ),
    "dit": Case(dit, {"class_labels": [3], "output_type": "np"}, "transformer", ("class_labels",)),
    "svd": Case(
        stable_video_diffusion,
        {"image": noise(1, 3, 32, 32).sigmoid(), "num_frames": 2, "height": 32, "width": 32, "output_type": "pt"},
    ),
    "wan": Case(wan, {**PROMPT, "height": 16, "width": 16, "num_frames": 5, "output_type": "pt"}, "transformer"),
}
