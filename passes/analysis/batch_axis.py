"""Where the items of the batch lie in each node's value: along which axis, one behind the other.

``[N, L, C]`` flattened to ``[N * L, C]`` keeps every item together; ``[L, N, C]`` flattened alike does not, although
the sizes say nothing about it. So the axis is followed from the inputs through the graph, operator by operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.analysis.dependence import data_dependence, reads_as_parameter
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.predicates import is_getitem, node_value
from tfmq_fx.passes.support.sizes import entries_per_item

__all__ = ["batch_axes", "size_ratio"]

#: Operators that only cut the same elements in the same order into another shape.
RESHAPES = frozenset(
    f"aten::{name}" for name in ("reshape", "view", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten",
                                 "unsqueeze", "squeeze")
)  # fmt: skip
#: Operators that may carry an item to another place along an axis whose size they keep.
MOVES_ITEMS = frozenset(
    f"aten::{name}" for name in ("flip", "roll", "rot90", "index", "index_select", "gather", "scatter", "scatter_add",
                                 "sort", "argsort", "topk", "as_strided", "take_along_dim", "index_put")
)  # fmt: skip


def _expression(size: int | SymInt) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def size_ratio(size: int | SymInt, batch: int | SymInt) -> Any:
    """``size / batch`` when ``size`` is a multiple of ``batch``: a number, or an expression of other sizes; else None.

    Args:
        size: The size of an axis.
        batch: The batch, a number above 1 or a symbol.
    """
    if isinstance(size, SymInt) != isinstance(batch, SymInt):
        return None
    if not isinstance(size, SymInt):
        return size // int(batch) if size and size % int(batch) == 0 else None
    ratio = _expression(size) / _expression(batch)
    if ratio.is_integer and ratio.is_positive:
        return int(ratio) if ratio.is_Integer else ratio
    # What the shape environment has not simplified, such as (64 * N) // 4.
    return entries_per_item(size) if _expression(size).free_symbols == _expression(batch).free_symbols else None


def batch_axes(graph_module: fx.GraphModule, batch: int | SymInt) -> dict[fx.Node, int]:
    """Map nodes to the axis of their value along which the items of the batch lie in order, each item in one piece.

    Args:
        graph_module: A graph with ``meta["val"]``; it is not changed.
        batch: The size of the batch: a symbol, or a number above 1.

    Returns:
        The axis per node. A node without an entry has no batch, or an operator before it is not known to keep the
        items in place: it is never guessed.
    """
    dependence = data_dependence(graph_module)
    axes: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        value = node_value(node)
        if node.op == "placeholder":
            has_batch = isinstance(value, Tensor) and value.ndim > 0 and size_ratio(value.shape[0], batch) == 1
            axes[node] = 0 if has_batch else None
        elif is_getitem(node):
            output_axes = axes.get(argument_node(node, 0))
            index: Any = node.args[1]
            axes[node] = output_axes[index] if isinstance(output_axes, list) else None
        elif node.op in ("call_function", "call_module"):
            # The timesteps that a quantizer's parameters are looked up by lie along no axis of what it returns.
            sources = [s for s in node.all_input_nodes if dependence[s] and not reads_as_parameter(node, s)]
            operands = [(node_value(s), axes.get(s)) for s in sources if isinstance(node_value(s), Tensor)]
            axes[node] = _axes_of(node, value, operands, batch)
    return {node: axis for node, axis in axes.items() if isinstance(axis, int)}


def _axes_of(node: fx.Node, value: Any, operands: Sequence[tuple[Tensor, Any]], batch: int | SymInt) -> Any:
    """The axis of a node's value; a list of them for an operator with several outputs."""
    name = schema_of(node.target).name if isinstance(node.target, OpOverload) else ""
    if not any(isinstance(axis, int) for _, axis in operands) or name in MOVES_ITEMS:
        return None
    if isinstance(value, Tensor):
        return _axis_of(node, name, value, operands, batch)
    outputs = pytree.tree_leaves(value)
    return [_axis_of(node, name, out, operands, batch) if isinstance(out, Tensor) else None for out in outputs]


def _axis_of(
    node: fx.Node, name: str, out: Tensor, operands: Sequence[tuple[Tensor, Any]], batch: int | SymInt
) -> int | None:
    source, axis = operands[0]
    if name in RESHAPES:
        return _through_reshape(source, axis, out, batch) if isinstance(axis, int) else None
    if name == "aten::embedding":
        return axis if isinstance(axis, int) else None  # the axes of the indices, and one of features behind them
    if name == "aten::permute" and isinstance(axis, int):
        order: Any = node.args[1]
        places: list[int] = [dim % source.ndim for dim in order]
        return places.index(axis)
    if name in ("aten::transpose", "aten::t") and isinstance(axis, int):
        swapped: Any = node.args[1:3] if name == "aten::transpose" else (0, 1)
        first, second = (dim % source.ndim for dim in swapped)
        return second if axis == first else first if axis == second else axis
    if name == "aten::repeat_interleave" and isinstance(axis, int):
        # Copies stand behind their original, so an item stays in one piece; without an axis the input is flattened.
        return axis if len(node.args) > 2 and node.args[2] == axis and isinstance(node.args[1], int) else None
    return _through_operator(out, operands)


def _through_reshape(source: Tensor, axis: int, out: Tensor, batch: int | SymInt) -> int | None:
    """The axis behind the same number of leading elements whose size is a multiple of the batch."""
    before = math.prod(_expression(size) for size in source.shape[:axis])
    passed: Any = 1
    for candidate, size in enumerate(out.shape):
        if passed == before and size_ratio(size, batch) is not None:
            return candidate
        passed = passed * _expression(size)
    return None


def _through_operator(out: Tensor, operands: Sequence[tuple[Tensor, Any]]) -> int | None:
    """The axis of a result that lines up with that of every operand, as broadcasting lines axes up."""
    aligned_axes = {_aligned(value, axis, out) for value, axis in operands if isinstance(axis, int)}
    axis = aligned_axes.pop()
    if aligned_axes or axis is None:
        return None
    for value, own in operands:
        place = axis - (out.ndim - value.ndim)
        # An operand that is as large there, and whose items are not known to lie in order, may mix them.
        if not isinstance(own, int) and 0 <= place < value.ndim and _expression(value.shape[place]) != 1:
            return None
    return axis


def _aligned(value: Tensor, axis: int, out: Tensor) -> int | None:
    size = _expression(value.shape[axis])
    place = out.ndim - value.ndim + axis
    if 0 <= place < out.ndim and _expression(out.shape[place]) == size:
        return place
    # Axes behind it may come and go. A number could agree by chance, a symbol does not.
    unchanged = isinstance(value.shape[axis], SymInt) and axis < out.ndim and _expression(out.shape[axis]) == size
    return axis if unchanged else None
