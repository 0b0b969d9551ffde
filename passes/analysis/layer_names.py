"""Names of weighted ops that hold in a prepared graph too; they are labels, nothing is decided by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from tfmq_fx.passes.support.predicates import fqn, module_path, weight_node

__all__ = ["common_path", "layer_name", "seen_through_observers", "weight_source"]


def seen_through_observers(node: fx.Node) -> fx.Node:
    """The node that ``node`` passes on when it is an observer, else ``node`` itself."""
    while node.op == "call_module" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def weight_source(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` that the weight of a weighted op is read by; observers in between are seen through."""
    if (read := weight_node(node)) is not None:
        return read
    weight = node.args[1] if len(node.args) > 1 else None
    source = seen_through_observers(weight) if isinstance(weight, fx.Node) else None
    return source if source is not None and source.op == "get_attr" else None


def layer_name(node: fx.Node) -> str:
    """The name of a weighted op, as ``fqn`` gives it, in a prepared graph too."""
    source = weight_source(node)
    name = str(source.target) if source is not None else ""
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    return module_path(node) or name or fqn(node)


def common_path(nodes: Sequence[fx.Node]) -> str:
    """The dotted path that the names of all these weighted ops begin with; ``""`` when there is none."""
    if not all(weight_source(node) or module_path(node) for node in nodes):
        return ""
    parts = zip(*(layer_name(node).split(".") for node in nodes), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))
