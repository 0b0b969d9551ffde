"""What the value of every node ought to be, computed afresh under the graph's own fake mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from tfmq_fx._torch.tensors import FakeTensorMode
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, read_attribute

__all__ = ["recompute_values"]


def recompute_values(graph_module: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> dict[fx.Node, Any]:
    """Compute the value of every node from those of the placeholders.

    Args:
        graph_module: The graph; its recorded values are not changed.
        example_inputs: Stand in for placeholders that have no recorded value, in order.

    Returns:
        One value per node: a fake tensor, a number, a symbolic number, or a nesting of them.

    Raises:
        PassError: An operator refuses its arguments; names the node.
    """
    mode = fake_mode_of(graph_module.graph)
    examples = iter(example_inputs)
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        example = next(examples, None) if node.op == "placeholder" else None
        try:
            values[node] = _value(graph_module, node, values, mode, example)
        except Exception as error:
            msg = f"node {node.name!r} ({node.target}) does not run on its arguments' values: {error}"
            raise PassError(msg) from error
    return values


def _value(
    graph_module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], mode: FakeTensorMode, example: Any
) -> Any:
    if node.op == "placeholder":
        recorded = node.meta.get("val")
        return mode.from_tensor(example) if recorded is None and isinstance(example, Tensor) else recorded
    if node.op == "get_attr":
        value = read_attribute(graph_module, str(node.target))
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "output":
        return args[0]
    if node.op == "call_module" and isinstance(read_attribute(graph_module, str(node.target)), fx.GraphModule):
        # A reconstruction unit has a graph of its own, with values of its own.
        return node.meta.get("val")
    if node.op == "call_module":
        # Observers read their input's elements, which a fake tensor has none of; they return it unchanged.
        return args[0]
    target: Any = node.target
    return compute_value(mode, target, args, kwargs)
