"""What holds behind every pass, whatever it rewrites: checked on the graph alone, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx._torch import pytree
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.recomputed_values import recompute_values

__all__ = ["GraphOutline", "verify_pass"]


@dataclass(frozen=True)
class GraphOutline:
    """What a pass must leave as it is.

    Attributes:
        inputs: Targets of the placeholders, in order.
        text: The graph as text, for passes that report no change.
        without_value: Names of the computing nodes that have no recorded value.
    """

    inputs: tuple[str, ...]
    text: str
    without_value: frozenset[str]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> GraphOutline:
        """The outline of ``graph_module``."""
        nodes = list(graph_module.graph.nodes)
        return cls(
            tuple(str(node.target) for node in nodes if node.op == "placeholder"),
            str(graph_module.graph),
            frozenset(node.name for node in nodes if node.op.startswith("call_") and "val" not in node.meta),
        )


def verify_pass(pass_id: str, result: PassResult, before: GraphOutline) -> None:
    """Check the graph that a pass left: lint, inputs, the flag, and the value of every node.

    Args:
        pass_id: The pass, for the message.
        result: What it returned.
        before: The graph before it.

    Raises:
        PassError: Something is wrong; the message names the pass and the node.
    """
    graph_module = result.graph_module
    try:
        graph_module.graph.lint()
    except Exception as error:  # lint raises whatever its assertions are made of
        msg = f"{pass_id}: the graph does not lint: {error}"
        raise PassError(msg) from error
    after = GraphOutline.of(graph_module)
    if after.inputs != before.inputs:
        msg = f"{pass_id}: the inputs are {', '.join(after.inputs)}, they were {', '.join(before.inputs)}"
        raise PassError(msg)
    if not result.modified and after.text != before.text:
        msg = f"{pass_id}: it reports no change, but the graph is another"
        raise PassError(msg)
    if missing := sorted(after.without_value - before.without_value):
        msg = f"{pass_id}: new node {missing[0]!r} has no meta['val']"
        raise PassError(msg)
    if after.without_value:
        # What another tool inserted has no values yet; there is nothing to compute the others from.
        return
    try:
        values = recompute_values(graph_module)
    except PassError as error:
        msg = f"{pass_id}: {error}"
        raise PassError(msg) from error
    for node, value in values.items():
        if node.op == "output" or "val" not in node.meta:
            continue
        recorded, computed = _types(node.meta["val"]), _types(value)
        if recorded != computed:
            msg = f"{pass_id}: meta['val'] of node {node.name!r} says {recorded}, the node computes {computed}"
            raise PassError(msg)


def _types(value: Any) -> list[str]:
    """Dtype and shape of every tensor, the expression of every symbolic size."""
    return [_type(leaf) for leaf in pytree.tree_leaves(value)]


def _type(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        sizes = ", ".join(str(size.node.expr) if isinstance(size, SymInt) else str(size) for size in leaf.shape)
        return f"{leaf.dtype}[{sizes}]"
    return str(leaf.node.expr) if isinstance(leaf, SymInt) else type(leaf).__name__
