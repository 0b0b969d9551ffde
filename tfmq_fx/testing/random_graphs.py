"""Random ATen graphs that are valid by construction: they grow forward over a pool of typed values."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from .favoured_kinds import check_favoured
from .generated_graph import GeneratedGraph
from .random_operators import OPERATORS
from .special_operators import SPECIAL_OPERATORS, SpecialGrowth

__all__ = ["aten_graphs"]


@st.composite
def aten_graphs(
    draw: st.DrawFn,
    *,
    max_ops: int = 12,
    half: bool = True,
    dynamic_batch: bool | None = None,
    favour: Sequence[str] = (),
) -> GeneratedGraph:
    """Random ATen graphs with everything that rewrites trip over.

    Among it: nodes with several users, dead nodes, aliases, no-op casts, arithmetic by one, idle
    dropouts, assertions, constants, shared weights, values whose channels lie last in memory, readers that take only
    some strides, nodes among keyword arguments, convolutions of
    concatenations, fused attention, unread state, several outputs in any structure, an input that is an
    output, and the timestep as first, middle or last placeholder.

    Args:
        draw: Given by Hypothesis.
        max_ops: How many operators to draw at most; some become two or three nodes.
        half: Whether bfloat16 values occur. They round so coarsely that a pass which changes the order
            of sums cannot be compared within a tight tolerance.
        dynamic_batch: Whether the batch is symbolic; either by default.
        favour: Kinds of operators, out of ``OPERATORS`` and ``SPECIAL_OPERATORS``, that half of the draws are
            taken from: what the pass under test looks for.

    Raises:
        ConfigError: ``favour`` has something else.
    """
    check_favoured(favour, (*OPERATORS, *SPECIAL_OPERATORS))
    dynamic = draw(st.booleans()) if dynamic_batch is None else dynamic_batch
    growth = SpecialGrowth(draw, half, dynamic)
    kinds = st.sampled_from(OPERATORS)
    if favour:
        kinds = st.sampled_from(favour) | kinds
    for _ in range(draw(st.integers(1, max_ops))):
        getattr(growth, draw(kinds))()
    return growth.finish()
