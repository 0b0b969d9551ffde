"""Published methods as configurations of the same passes; none of them is a fork of the pipeline.

A preset is the fields of a :class:`tfmq_fx.QuantizationConfig`, and what its method needs beside them: how calibration
timesteps are drawn, and what the sampler does with the quantized denoiser. ``limitations`` says where a method goes
beyond what these passes do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfmq_fx.config.checks import check_choice
from tfmq_fx.config.frozen_mapping import FrozenMapping
from tfmq_fx.config.preset import Preset
from tfmq_fx.config.reconstruction import ReconstructionConfig

__all__ = ["PRESETS", "Preset", "find_preset"]


#: The paper's objective for the temporal block.
TFMQ_DM: dict[str, Any] = {"temporal_objective": "features"}
#: More groups than a schedule has timesteps: one each.
EVERY_TIMESTEP = 10_000

#: What published methods do not do unless they say so: ranges by timestep, channels that are scaled, a softmax that is
#: quantized before it is divided, shortcuts of more bits.
PLAIN: dict[str, Any] = {
    "activation_groups": 1, "scale_channels": False, "defer_softmax": False, "shortcut_bits": None,
}  # fmt: skip

#: The released code of TFMQ-DM leaves out modules by parts of their names. These are the same layers by the names that
#: diffusers, guided diffusion and the DDPM repository give them; the code's bare ``op`` also hits unrelated ones.
RELEASED_FLOAT = ("*skip*", "*shortcut*", "*downsample*", "*.op")
RELEASED_FIRST_TIME_LAYER = ("*time_embedding.linear_1", "*time_embed.0", "*temb.dense.0")
RELEASED_SECOND_TIME_LAYER = ("*time_embedding.linear_2", "*time_embed.2", "*temb.dense.1")

#: What the code of BRECQ and its descendants gives the first and the last layer.
EIGHT_BITS = {"weight_bits": 8, "activation_bits": 8}
#: What that code does and these passes do not.
TWO_SWEEPS = (
    "all weights learning under float activations before any step size does (here unit by unit, under quantized ones)"
)
ASYMMETRIC = "asymmetric 8-bit weights (here symmetric, as the integer kernels take them)"

PRESETS: Mapping[str, Preset] = FrozenMapping(
    {
        preset.name: preset
        for preset in (
            Preset(
                "tfmq-dm",
                "TFMQ-DM, CVPR 2024",
                "The temporal block is rounded against its own output (TIAR) and has activation parameters per "
                "timestep (FSC); the rest is reconstructed block by block.",
                {**PLAIN, "temporal": "fsc", "weight_range": "mse", "reconstruction": TFMQ_DM},
            ),
            Preset(
                "tfmq-dm-released",
                "TFMQ-DM, the public code",
                "As tfmq-dm with parameters per timestep for all activations, but attention products, shortcuts, "
                "downsampling convs and the first time layer stay float, and the second has quantized weights only.",
                {
                    **PLAIN,
                    "temporal": "fsc",
                    "weight_range": "mse",
                    "split_concatenations": False,
                    "keep_float": ("input", "output", "attention", *RELEASED_FLOAT, *RELEASED_FIRST_TIME_LAYER),
                    "overrides": {pattern: {"activation_bits": 32} for pattern in RELEASED_SECOND_TIME_LAYER},
                    "activation_groups": EVERY_TIMESTEP,
                    "reconstruction": TFMQ_DM,
                },
                limitations="a float activation at the first residual block's first conv",
            ),
            Preset(
                "brecq",
                "BRECQ, ICLR 2021",
                "Block by block reconstruction that knows nothing of time: embedding layers are trained inside their "
                "residual blocks, one range for all timesteps.",
                {
                    **PLAIN,
                    "temporal": "observed",
                    "weight_range": "mse",
                    "split_concatenations": False,
                    "reconstruction": "brecq",
                },
                limitations="the first and last layer at 8 bits (here float, as where TFMQ-DM compares with it; "
                "overrides of the roles give them bits), Fisher weights and learned activation steps (options of the "
                "reconstruction), weights that learn under float activations",
            ),
            Preset(
                "q-diffusion",
                "Q-Diffusion, ICCV 2023",
                "Calibration over all steps alike, shortcuts of concatenations split, the softmax at 8 bits (or 16), "
                "block reconstruction, then learned activation steps from searched ranges; every layer is quantized, "
                "the first and last too.",
                {
                    **PLAIN,
                    "temporal": "observed",
                    "weight_range": "mse",
                    "activation_range": "mse",
                    "softmax_bits": 8,
                    "keep_float": (),
                    "reconstruction": ReconstructionConfig(temporal="blocks", learned_steps="after"),
                },
                limitations=f"{TWO_SWEEPS}, {ASYMMETRIC}, and running means of activation ranges (its option for "
                "Stable Diffusion)",
            ),
            Preset(
                "ptqd",
                "PTQD, NeurIPS 2023, the public code",
                "The first and last layer and the first time layer at 8 bits; attention products, shortcuts and "
                "downsampling convs float; block reconstruction, then learned activation steps from searched ranges. "
                "The sampler then removes the part of the quantization noise that correlates with the output, its "
                "bias, and its variance from the noise that a stochastic sampler adds.",
                {
                    **PLAIN,
                    "temporal": "observed",
                    "weight_range": "mse",
                    "activation_range": "mse",
                    "split_concatenations": False,
                    "keep_float": ("attention", *RELEASED_FLOAT),
                    "overrides": dict.fromkeys(("input", "output", *RELEASED_FIRST_TIME_LAYER), EIGHT_BITS),
                    # 10,000 iterations in batches of 8, then 5,000 for the steps.
                    "reconstruction": ReconstructionConfig(
                        temporal="blocks", learned_steps="after", step_share=0.5, iterations=10_000, batch_size=8
                    ),
                },
                corrects_noise=True,
                limitations=f"{TWO_SWEEPS}, {ASYMMETRIC}, one scale for a whole weight (here one a channel), 8-bit "
                "layers that stay rounded to nearest, batches of 16 for the steps, and activation widths that change "
                "with the timestep",
            ),
            Preset(
                "ptq4dm",
                "PTQ4DM, CVPR 2023",
                "Symmetric per-channel weights and activations by an L2.4 search, no reconstruction, calibration "
                "timesteps from a normal distribution (NDTC); the model's output and the sampler's state take 8 bits.",
                {
                    **PLAIN,
                    "temporal": "observed",
                    "weight_range": "mse",
                    "activation_range": "mse",
                    "reconstruction": "nearest",
                    "symmetric_weights": True,
                    "symmetric_activations": True,
                    "output_bits": 8,
                    "keep_float": ("attention",),
                    "split_concatenations": False,
                },
                sampler="ndtc",
                quantizes_sample=True,
                limitations="separate ranges for the noise and the variance of a model that predicts both",
            ),
            Preset(
                "tdq",
                "TDQ, NeurIPS 2023",
                "Every activation has a range of its own at every timestep; rounded to nearest.",
                {
                    **PLAIN,
                    "temporal": "fsc",
                    "weight_range": "mse",
                    "activation_groups": EVERY_TIMESTEP,
                    "reconstruction": "nearest",
                },
                limitations="the learned network that gives the intervals: here they are observed",
            ),
            Preset(
                "adp-dm",
                "ADP-DM, arXiv 2305.18723",
                "Every activation has a range for each of eight groups of timesteps; rounded to nearest.",
                {
                    **PLAIN,
                    "temporal": "fsc",
                    "weight_range": "mse",
                    "activation_groups": 8,
                    "reconstruction": "nearest",
                },
                limitations="channel groups with a learned mixture of ranges, and calibration timesteps by entropy",
            ),
            Preset(
                "svdquant",
                "SVDQuant, ICLR 2025",
                "A branch of rank 32 beside each layer takes the largest part of its weight over and reads its input "
                "unquantized; what is left is rounded by GPTQ. Features of time are stored per timestep; products of "
                "attention, shortcuts and resampling convs have 8 bits and no branch.",
                {
                    "temporal": "cache",
                    "activation_range": "mse",
                    "scale_channels": False,
                    "shortcut_bits": None,
                    "low_rank": 32,
                    "overrides": {
                        "attention": {"activation_bits": 8},
                        **{key: {**EIGHT_BITS, "low_rank": None} for key in (*RELEASED_FLOAT, "*upsample*")},
                    },
                    "reconstruction": "gptq",
                },
                limitations="smoothing before the decomposition, scales for groups of 64 input channels that are found "
                "at run time (here ranges per timestep that are searched), and kernels that multiply 4-bit numbers",
            ),
            Preset(
                "dmq",
                "DMQ, ICCV 2025",
                "Channels of activations that do not share a range are scaled, and the weights behind them inversely; "
                "then block reconstruction.",
                {
                    "temporal": "fsc",
                    "weight_range": "mse",
                    "scale_channels": True,
                    "shortcut_bits": None,
                    "reconstruction": "tfmq-dm",
                },
                limitations="scales that are learned, with losses weighted by timestep (here from what "
                "calibration saw of each channel), and one range for all timesteps",
            ),
            Preset(
                "efficientdm",
                "EfficientDM, ICLR 2024",
                "All weights are trained together as Q(W + BA), with adapters of rank 32, and the activations' step "
                "sizes per timestep, against the float model's predictions along its trajectories.",
                {
                    "temporal": "fsc",
                    "weight_range": "mse",
                    "activation_range": "mse",
                    "scale_channels": False,
                    "shortcut_bits": None,
                    "reconstruction": "efficientdm",
                },
                limitations="scales of weights that learn, its 160 epochs (here 1,000 iterations behind GPTQ), and a "
                "trained time path (here rounded by GPTQ)",
            ),
            Preset(
                "shared",
                "this package",
                "The default configuration with one range for all timesteps.",
                {**PLAIN, "temporal": "shared"},
            ),
        )
    }
)


def find_preset(name: str) -> Preset:
    """Return the preset with this name.

    Raises:
        ConfigError: There is no such preset.
    """
    check_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]
