"""What a user can do about a timestep outside the table: it depends on what the program has, and how it was lowered."""

from __future__ import annotations

__all__ = ["in_graph", "in_program"]

QUANTIZE_AGAIN = "quantize again with all timesteps or with temporal='fsc'"
NEAREST = "lower with unknown_timestep='nearest'"


def in_program(*, has_block: bool) -> str:
    """The ways out of a program, the end of a sentence.

    Args:
        has_block: Whether it has its temporal block; with ``temporal="cache"`` and ``"auto"`` it has stored rows alone.
    """
    if has_block:
        return "add it with add_timesteps, or lower with unknown_timestep='extend' or 'nearest'"
    return f"the program has no temporal block to compute others: {QUANTIZE_AGAIN}, or {NEAREST}"


def in_graph(*, has_block: bool) -> str:
    """As :func:`in_program`, for a denoiser whose table was compiled with the rest (``tabulate=False``)."""
    if has_block:
        return f"add it with add_timesteps, lower with tabulate=True and unknown_timestep='extend', or {NEAREST}"
    return in_program(has_block=False)
