"""Read the arguments of a call as what the operator takes: fx types them as anything that a graph may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

__all__ = ["argument_list", "argument_node", "called_operator"]


def argument_node(node: fx.Node, position: int) -> fx.Node:
    """The node at ``position`` of the arguments of ``node``.

    Raises:
        TypeError: The argument is no node.
    """
    argument = node.args[position]
    if not isinstance(argument, fx.Node):
        raise TypeError(_unexpected(node, position, "a node"))
    return argument


def argument_list(node: fx.Node, position: int) -> Sequence[Any]:
    """The list or tuple at ``position`` of the arguments of ``node``.

    Raises:
        TypeError: The argument is neither.
    """
    argument = node.args[position]
    if not isinstance(argument, (list, tuple)):
        raise TypeError(_unexpected(node, position, "a list"))
    return argument


def called_operator(node: fx.Node) -> Callable[..., Any]:
    """The function that ``node`` calls.

    Raises:
        TypeError: The node calls a module, or nothing.
    """
    if not callable(node.target):
        msg = f"node {node.name!r} ({node.op}) calls no function"
        raise TypeError(msg)
    return node.target


def _unexpected(node: fx.Node, position: int, expected: str) -> str:
    return f"argument {position} of node {node.name!r} should be {expected}, not {node.args[position]!r}"
