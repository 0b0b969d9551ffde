"""Where quantized activations are read: names that a prepared and a converted graph of one architecture share.

Nodes and observers are numbered by whoever inserts them, and an exported graph numbers its nodes anew. A layer's place
in its module is the same in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.layout.add_low_rank_branches import is_branch
from tfmq_fx.passes.support.predicates import is_weighted, module_path

__all__ = ["Operation", "Site", "numbered_operations", "read_at"]


@dataclass(frozen=True)
class Operation:
    """A node by its place in the model.

    Attributes:
        module: Dotted path of its module; ``""`` for the model itself.
        operator: What it calls.
        number: Which of the like it is in this module, in the order of the graph.
    """

    module: str
    operator: str
    number: int

    def __str__(self) -> str:
        """``down.conv1 (aten.conv2d.default)``, with the number of all but the first."""
        name = f"{self.module} ({self.operator})" if self.module else self.operator
        return f"{name} number {self.number + 1}" if self.number else name


@dataclass(frozen=True)
class Site:
    """One argument of an operation.

    Attributes:
        reader: The operation.
        position: The argument's number among all that it is given.
    """

    reader: Operation
    position: int


def numbered_operations(graph_module: fx.GraphModule) -> dict[fx.Node, Operation]:
    """The operations of a graph by node; layers of a branch of low rank, which some stages have not yet, are left out.

    Args:
        graph_module: A prepared or converted graph.
    """
    seen: Counter[tuple[str, str]] = Counter()
    operations = {}
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "output") or (is_weighted(node) and is_branch(node)):
            continue
        key = (module_path(node) if node.op == "call_function" else "", str(node.target))
        operations[node] = Operation(*key, seen[key])
        seen[key] += 1
    return operations


def read_at(sources: Iterable[fx.Node], operations: dict[fx.Node, Operation]) -> list[Site]:
    """The sites that read any of ``sources``, which themselves are none.

    Args:
        sources: An observer, or the nodes that give floats behind one quantizer.
        operations: Those of their graph.
    """
    wanted = set(sources)
    users = (user for source in wanted for user in source.users)
    readers = dict.fromkeys(user for user in users if user in operations and user not in wanted)
    return [
        Site(operations[reader], position)
        for reader in readers
        for position, argument in enumerate(pytree.tree_leaves((reader.args, reader.kwargs)))
        if argument in wanted
    ]
