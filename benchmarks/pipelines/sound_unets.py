"""UNets of spectrograms, of which a vocoder makes sound."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from .image_unets import PROMPT, WIDTH, autoencoder, dpm_solver, unet
from .row import Row, noise

__all__ = ["ROWS"]

#: Widths of the two sequences that the UNet of AudioLDM 2 attends to.
LANGUAGE_WIDTH, T5_WIDTH = 24, WIDTH


def spectrogram_vae() -> d.AutoencoderKL:
    """Of one channel."""
    return autoencoder(in_channels=1, out_channels=1)


def vocoder() -> Any:
    """Four samples of sound a column of a spectrogram of sixteen rows."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        normalize_before=False, initializer_range=0.3,
    )  # fmt: skip
    return SpeechT5HifiGan(config)


def audio_ldm_2() -> Any:
    """Attention to itself, to a language model's sequence and to T5's in every block."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

    t5 = T5Config(vocab_size=8, d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=4)
    gpt = GPT2Config(
        vocab_size=8, n_embd=LANGUAGE_WIDTH, n_layer=1, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    attention = (None, LANGUAGE_WIDTH, T5_WIDTH)
    model = d.AudioLDM2UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=(attention, attention),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    absent = ("text_encoder", "projection_model", "tokenizer", "tokenizer_2", "feature_extractor")
    return d.AudioLDM2Pipeline(
        vae=spectrogram_vae(), text_encoder_2=T5EncoderModel(t5), language_model=GPT2LMHeadModel(gpt), unet=model,
        scheduler=d.DDIMScheduler(clip_sample=False), vocoder=vocoder(), **dict.fromkeys(absent),
    )  # fmt: skip


def music_ldm() -> Any:
    """The prompt is an embedding beside that of the timestep; attention only to itself."""
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    config = ClapTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, vocab_size=8,
        projection_dim=WIDTH, max_position_embeddings=16,
    )  # fmt: skip
    model = unet(
        cross_attention_dim=(16, 32), class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=WIDTH,
    )  # fmt: skip
    return d.MusicLDMPipeline(
        vae=spectrogram_vae(), text_encoder=ClapTextModelWithProjection(config), tokenizer=None,
        feature_extractor=None, unet=model, scheduler=d.DDIMScheduler(clip_sample=False), vocoder=vocoder(),
    )  # fmt: skip


#: The last token is padding.
TOKEN_MASK = torch.tensor([[1, 1, 1, 1, 0]])
MASKS = {"attention_mask": TOKEN_MASK, "negative_attention_mask": TOKEN_MASK}
SOUND = {"audio_length_in_s": 0.004, "guidance_scale": 3.5, "output_type": "pt"}
GENERATED = {
    "generated_prompt_embeds": noise(1, 3, LANGUAGE_WIDTH, seed=14),
    "negative_generated_prompt_embeds": noise(1, 3, LANGUAGE_WIDTH, seed=15),
}
MUSIC = {"prompt_embeds": noise(1, WIDTH, seed=9), "negative_prompt_embeds": noise(1, WIDTH, seed=10)}
WAVEFORMS = {"num_waveforms_per_prompt": 3}

ROWS = (
    Row(
        "AudioLDM 2",
        audio_ldm_2,
        {**PROMPT, **MASKS, **GENERATED, **SOUND},
        WAVEFORMS,
        other_scheduler=dpm_solver,
    ),
    Row("MusicLDM", music_ldm, {**MUSIC, **SOUND}, WAVEFORMS, other_scheduler=dpm_solver),
)
