"""Find the inputs that are additive masks of attention: minus infinity is a normal value of theirs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis.dependence import data_arguments
from tfmq_fx.passes.support.predicates import (
    RELABELLINGS,
    SOFTMAXES,
    is_attention,
    is_call,
    node_value,
    softmax_scores,
)

__all__ = ["mask_inputs"]

aten = torch.ops.aten
#: What passes the values of its first argument on: views, copies, casts and pieces.
VIEWS = (
    *RELABELLINGS,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.alias.default,
    aten.detach.default,
)
#: The position of the mask among the arguments of fused attention.
MASK_POSITION = 3


def mask_inputs(graph_module: fx.GraphModule) -> set[str]:
    """The names of the floating-point inputs that nothing but attention reads, as what is added to its scores.

    Such an input reaches, through views, casts and copies alone, the mask of a fused attention, or an addition whose
    result only a softmax reads; what ``DecomposeAttention`` writes for the fused op counts as that. An input that is
    read in any other way besides, or not at all, is none.

    Args:
        graph_module: A captured or prepared graph.
    """
    names = set()
    for node in graph_module.graph.nodes:
        value = node_value(node)
        if node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point() and _only_masks(node):
            names.add(str(node.target))
    return names


def _only_masks(node: fx.Node) -> bool:
    """Whether every reader of the values of ``node`` takes them as a mask, and there is one."""
    readers = [user for user in node.users if node in data_arguments(user)]
    return bool(readers) and all(_takes_mask(user, node) for user in readers)


def _takes_mask(user: fx.Node, mask: fx.Node) -> bool:
    if is_call(user, *VIEWS):
        return user.args[0] is mask and mask not in user.args[1:] and _only_masks(user)
    if is_attention(user):
        attn_mask = user.kwargs.get("attn_mask", user.args[MASK_POSITION] if len(user.args) > MASK_POSITION else None)
        return attn_mask is mask and mask not in user.args[:MASK_POSITION]
    if is_call(user, aten.add.Tensor, aten.baddbmm.default):
        return list(user.args).count(mask) == 1 and _is_summand(user, mask) and _only_softmaxes(user)
    return _tests_for_hidden_queries(user) or (_unhides_queries(user, mask) and _only_masks(user))


def _is_summand(user: fx.Node, mask: fx.Node) -> bool:
    """Whether an addition takes the mask as a summand: either one of ``add``, the first argument of ``baddbmm``."""
    return is_call(user, aten.add.Tensor) or user.args[0] is mask


def _only_softmaxes(scores: fx.Node) -> bool:
    """Whether softmaxes alone read these scores, behind views and casts or not."""
    return bool(scores.users) and all(
        _only_softmaxes(user) if is_call(user, *RELABELLINGS) else _is_of_softmax(user, scores) for user in scores.users
    )


def _is_of_softmax(user: fx.Node, scores: fx.Node) -> bool:
    """Whether ``user`` is a softmax of ``scores``, or a part of its numerators: ``exp(scores - amax(scores))``."""
    parts = user.users if is_call(user, aten.amax.default) else {user: None}
    numerators = [reader for part in parts for reader in part.users]
    deferred = bool(numerators) and all(softmax_scores(reader) is scores for reader in numerators)
    return is_call(user, *SOFTMAXES) or deferred


def _tests_for_hidden_queries(node: fx.Node) -> bool:
    """Whether ``node`` tests which keys a mask hides, as ``DecomposeAttention`` does: ``eq(mask, -inf)``."""
    return is_call(node, aten.eq.Scalar) and bool(node.args[1] == -math.inf)


def _unhides_queries(node: fx.Node, mask: fx.Node) -> bool:
    """Whether ``node`` is the mask without the queries that it hides everything from: ``where(hidden, 0, mask)``."""
    return is_call(node, aten.where.ScalarSelf) and bool(node.args[1] == 0.0) and node.args[2] is mask
