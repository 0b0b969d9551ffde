"""Small questions about one node of an ATen graph; none of them changes anything."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.base import PassError

__all__ = [
    "SHAPE_ONLY_ARGUMENTS",
    "constant_weight",
    "fqn",
    "is_attention",
    "is_call",
    "is_conv",
    "is_idle_dropout",
    "is_linear",
    "is_matmul",
    "is_softmax_output",
    "is_weighted",
    "module_path",
    "node_value",
    "repeats_rows",
    "softmax_scores",
    "weight_node",
    "writes_in_place",
]

aten = torch.ops.aten

CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
TRANSPOSED_CONVS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
MATMULS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
#: Operators whose result holds the values of their first argument and no others.
RELABELLINGS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
)

#: For these operators only the listed argument positions are data; the others give a shape, a dtype
#: or a device. ``()`` means that no tensor argument is data.
SHAPE_ONLY_ARGUMENTS: dict[str, tuple[int, ...]] = {
    "aten::sym_size": (),
    "aten::sym_stride": (),
    "aten::sym_numel": (),
    "aten::sym_storage_offset": (),
    "aten::zeros_like": (),
    "aten::ones_like": (),
    "aten::empty_like": (),
    "aten::full_like": (1,),
    "aten::new_zeros": (),
    "aten::new_ones": (),
    "aten::new_empty": (),
    "aten::new_full": (2,),
    "aten::expand_as": (0,),
    "aten::view_as": (0,),
    "aten::reshape_as": (0,),
    "aten::type_as": (0,),
    "aten::_assert_tensor_metadata": (),
}


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes a value that it is given."""
    return isinstance(node.target, OpOverload) and bool(schema_of(node.target).is_mutable)


def is_call(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` calls one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_conv(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a (not transposed) 1-d, 2-d or 3-d convolution."""
    if is_call(node, aten.convolution.default):
        return not node.args[6]
    return is_call(node, *CONVS)


def is_linear(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a linear layer: ``aten.linear``, or ``addmm`` with a constant matrix."""
    if is_call(node, aten.addmm.default):
        return _constant_source(node.args[2]) is not None
    return is_call(node, aten.linear.default)


def is_weighted(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` multiplies by a weight: a linear or any convolution, transposed ones too."""
    return is_conv(node) or is_linear(node) or is_call(node, *TRANSPOSED_CONVS, aten.convolution.default)


def is_matmul(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` multiplies two computed tensors (the two products of attention)."""
    return is_call(node, *MATMULS)


def is_softmax_output(node: Any) -> bool:
    """Whether ``node`` is a softmax or its numerators, or one that was only reshaped, cast or copied since."""
    while is_call(node, *RELABELLINGS):
        node = node.args[0]
    return is_call(node, *SOFTMAXES) or softmax_scores(node) is not None


def softmax_scores(node: Any) -> fx.Node | None:
    """The scores that ``node`` has the numerators of a softmax over the last axis of: ``exp(s - max s)``; or None."""
    below = node.args[0] if is_call(node, aten.exp.default) else None
    if not is_call(below, aten.sub.Tensor) or below.kwargs:
        return None
    scores, top = below.args
    last = is_call(top, aten.amax.default) and tuple(top.args) == (scores, [-1], True)
    return scores if last and isinstance(scores, fx.Node) else None


def is_attention(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a fused scaled dot product attention."""
    return is_call(node, aten.scaled_dot_product_attention.default)


def repeats_rows(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` does nothing but repeat the rows (axis 0) of its first argument a fixed number of times."""
    if not is_call(node, aten.repeat_interleave.self_int, aten.repeat.default) or len(node.args) < 2:
        return False
    value, times = node_value(node), node.args[1]
    source = node_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if not (isinstance(value, Tensor) and isinstance(source, Tensor) and value.ndim == source.ndim > 0):
        return False
    if isinstance(times, (list, tuple)):
        return isinstance(times[0], int) and all(count == 1 for count in times[1:])
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return isinstance(times, int) and axis in (0, -source.ndim)


def is_idle_dropout(node: Any) -> bool:
    """Whether ``node`` is a dropout that drops nothing: ``p == 0``, or captured in ``eval()``."""
    if not is_call(node, aten.dropout.default, aten.feature_dropout.default):
        return False
    p, train = (node.args[i] if i < len(node.args) else node.kwargs[name] for i, name in ((1, "p"), (2, "train")))
    return bool(p == 0 or not train)


def _constant_source(node: Any) -> fx.Node | None:
    """The ``get_attr`` that ``node`` is, or is a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target not in (aten.t.default, aten.permute.default, aten.transpose.int):
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "get_attr" else None


def weight_node(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` node that holds the weight of a weighted op, or None when it is computed."""
    position = 2 if node.target is aten.addmm.default else 1
    return _constant_source(node.args[position]) if position < len(node.args) else None


def constant_weight(node: fx.Node, pass_id: str) -> fx.Node:
    """The ``get_attr`` node that holds the weight of ``node``.

    Raises:
        PassError: The weight is computed; the message names the node.
    """
    weight = weight_node(node)
    if weight is None:
        msg = f"{pass_id}: the weight of node {node.name!r} is computed, not stored; leave that layer to others"
        raise PassError(msg)
    return weight


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that ``node`` came from (``""`` when unknown)."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def fqn(node: fx.Node) -> str:
    """A stable name for a weighted op: its weight's path, else its module's path, else its own name."""
    weight = weight_node(node) if is_weighted(node) else None
    if weight is not None:
        name = str(weight.target)
        if name.endswith(".weight"):
            return name.removesuffix(".weight")
        return module_path(node) or name
    return module_path(node) or node.name


def node_value(node: fx.Node) -> Any:
    """``meta["val"]`` of the node, or None."""
    return node.meta.get("val")


def is_float_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` yields one floating-point tensor."""
    value = node_value(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def is_getitem(node: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` picks one output of an operator with several."""
    return is_call(node, operator.getitem)
