"""What a graph was before a pass: enough of it to tell afterwards what the pass touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .canonical import canonical_text, state_digests, value_signature

__all__ = ["GraphSnapshot", "NodeSnapshot"]


@dataclass(frozen=True)
class NodeSnapshot:
    """One node: its operation, its arguments with other nodes by name, and its metadata.

    Attributes:
        op: ``node.op``.
        target: ``node.target``.
        arguments: ``(args, kwargs)`` in which :class:`Reference` stands for a node.
        inputs: Names of the nodes that it reads.
        users: Names of the nodes that read it.
        meta: A copy of its metadata; the value is kept as its signature.
    """

    op: str
    target: Any
    arguments: Any
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    meta: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Reference:
    """A node among arguments, by name."""

    name: str


@dataclass(frozen=True)
class GraphSnapshot:
    """A whole graph.

    Attributes:
        text: Its canonical text.
        code: The Python code that it compiles to.
        nodes: Its nodes by name, in order.
        state: Digest of every parameter, buffer and submodule by name.
    """

    text: str
    code: str
    nodes: dict[str, NodeSnapshot]
    state: dict[str, str]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> GraphSnapshot:
        """Take a snapshot of ``graph_module``."""
        return cls(
            text=canonical_text(graph_module),
            code=graph_module.graph.python_code("self").src,
            nodes={node.name: snapshot_node(node) for node in graph_module.graph.nodes},
            state=state_digests(graph_module),
        )


def snapshot_node(node: fx.Node) -> NodeSnapshot:
    """Take a snapshot of one node."""
    return NodeSnapshot(
        op=node.op,
        target=node.target,
        arguments=_by_name((node.args, node.kwargs)),
        inputs=tuple(n.name for n in node.all_input_nodes),
        users=tuple(n.name for n in node.users),
        meta={key: _copied(key, value) for key, value in node.meta.items()},
    )


def _by_name(arguments: Any) -> Any:
    def refer(node: fx.Node) -> Any:
        return Reference(node.name)

    return fx.node.map_arg(arguments, refer)


def _copied(key: str, value: Any) -> Any:
    if key == "val":
        return value_signature(value)
    # A shallow copy is enough to notice an edit in place of the dictionaries and lists that passes share.
    return value.copy() if isinstance(value, (dict, list, set)) else value
