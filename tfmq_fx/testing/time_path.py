"""What a generated diffusion model looks like: :class:`TimePath`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["CHANNELS", "EMBEDDING", "PROMPT", "SIDE", "TimePath"]

#: Sizes of the model: channels of the feature maps, their side, width of the time embedding.
CHANNELS, SIDE, EMBEDDING = 4, 4, 8
#: Width of a prompt's embedding before its linear.
PROMPT = 6


@dataclass(frozen=True)
class TimePath:
    """What a generated diffusion model looks like; the defaults are those of a plain ``UNet2DModel``.

    Attributes:
        seed: Seed of the weights.
        batch: The batch size, or its example.
        dynamic_batch: Whether the batch is symbolic; then ``sym_size(sample, 0)`` stands on the time path.
        scalar_timestep: Whether the timestep is 0-dim instead of ``[N]``.
        float_timestep: Whether the timestep is float32, as Euler's and flow matching's are, instead of int64.
        timestep_name: Name of the timestep placeholder.
        position: Where the timestep stands among the placeholders.
        broadcast: How the timestep meets the batch: times ones, expanded, or not at all.
        width: Number of sinusoid features; an odd width is padded.
        flip: Whether cosine comes first.
        shift: ``downscale_freq_shift`` of the frequencies.
        scale: Factor on the sinusoid's argument.
        computed_frequencies: Whether the frequencies are computed in the graph or read from a buffer.
        casts: Whether no-op casts stand on the path.
        asserts: Whether metadata assertions stand on the path.
        blocks: Number of residual blocks.
        scale_shift: Whether a block scales and shifts (a chunk of twice the features) instead of adding.
        activation: The SiLU before the ``g_i``: one per block, one for all, or none.
        class_embedding: Whether a class embedding is added to the time embedding: not at all, a table
            look-up, or a table look-up and a linear.
        prompt: Whether the embedding of a prompt, the input ``pooled``, is added before the ``g_i``: not at all, as it
            is, or behind a linear. Not together with ``class_embedding="linear"``: of two layers that end side by side,
            nothing tells which one is a ``g_i``.
        return_embedding: Whether the time embedding is a second output.
        read_features: Whether the sinusoid is read outside the block too.
        read_batch: Whether the symbolic batch size is read outside the block too.
        shape_decoy: Whether something outside reads the dtype of the time embedding, which is no data.
        linear_decoy: Whether a SiLU -> Linear fed by the sample stands in the model.
        sinusoid_decoy: Whether sine and cosine of the sample and of constant positions stand in the model.
        shared_weight_decoy: Whether a linear outside the block reads the weight of the first linear of ``h``.
        dead_branch: Whether something unread is computed from the timestep.
    """

    seed: int = 0
    batch: int = 2
    dynamic_batch: bool = False
    scalar_timestep: bool = False
    float_timestep: bool = False
    timestep_name: str = "timestep"
    position: Literal["first", "middle", "last"] = "last"
    broadcast: Literal["ones", "expand", "none"] = "ones"
    width: int = 8
    flip: bool = False
    shift: float = 0.0
    scale: float = 1.0
    computed_frequencies: bool = True
    casts: bool = False
    asserts: bool = False
    blocks: int = 1
    scale_shift: bool = False
    activation: Literal["separate", "shared", "none"] = "separate"
    class_embedding: Literal["none", "table", "linear"] = "none"
    prompt: Literal["none", "plain", "linear"] = "none"
    return_embedding: bool = False
    read_features: bool = False
    read_batch: bool = False
    shape_decoy: bool = False
    linear_decoy: bool = False
    sinusoid_decoy: bool = False
    shared_weight_decoy: bool = False
    dead_branch: bool = False

    @property
    def timestep_dtype(self) -> torch.dtype:
        """The dtype of the timestep."""
        return torch.float32 if self.float_timestep else torch.int64

    @property
    def prompt_width(self) -> int:
        """Width of a prompt's embedding as it enters."""
        return PROMPT if self.prompt == "linear" else EMBEDDING
