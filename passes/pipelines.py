"""Ordered lists of passes, and why they stand in that order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .base import GraphPass
from .normalize_arguments import NormalizeArguments
from .remove_dropouts import RemoveDropouts
from .remove_guards import RemoveGuards
from .remove_identity_arithmetic import RemoveIdentityArithmetic
from .remove_noop_casts import RemoveNoopCasts
from .strip_dead_state import StripDeadState

__all__ = ["CANONICALIZE", "run_pipeline"]

#: Bring an exported graph into the form that all later passes expect. Guards go first: they read
#: nodes that the later passes want to see unread. Dead state goes last, when nothing reads it any more.
CANONICALIZE: tuple[type[GraphPass], ...] = (
    RemoveGuards,
    NormalizeArguments,
    RemoveDropouts,
    RemoveIdentityArithmetic,
    RemoveNoopCasts,
    StripDeadState,
)


def run_pipeline(graph_module: fx.GraphModule, pipeline: Sequence[type[GraphPass]]) -> bool:
    """Run each pass once, in order, with its default options; return whether any changed the graph."""
    modified = False
    for make in pipeline:
        result = make()(graph_module)
        modified |= result is not None and result.modified
    return modified
