"""How a graph is called: argument names and structures, which torch keeps in the graph's code generator."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from tfmq_fx._torch import pytree

__all__ = ["calling_convention", "code_generator", "has_calling_convention", "output_structure",
           "plain_calling_convention"]  # fmt: skip


def code_generator(graph: fx.Graph) -> fx.graph.CodeGen:
    """The object of a graph that holds its calling convention; ``Graph.set_codegen`` gives it to another graph."""
    return graph._codegen


def calling_convention(graph: fx.Graph) -> tuple[list[str], Any]:
    """Argument names and the input structure ``((args), {kwargs})`` of a graph.

    One that torch.export did not make, or whose structure another tool dropped, is called with its inputs by position.
    """
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None:
        return list(info.orig_args), info.in_spec
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    return names, pytree.tree_structure((tuple(names), {}))


def has_calling_convention(graph: fx.Graph) -> bool:
    """Whether ``graph`` says how its inputs and results are structured, as exported graphs do."""
    return getattr(graph._codegen, "pytree_info", None) is not None


def plain_calling_convention(graph: fx.Graph) -> None:
    """Write down the convention of a graph without one: its placeholders by position, its results as they stand."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    _, inputs = pytree.tree_flatten((tuple(names), {}))
    output = graph.output_node()
    leaves, results = pytree.tree_flatten(output.args[0])
    output.args = (tuple(leaves),)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, inputs, results)))


def output_structure(graph: fx.Graph) -> Any:
    """The structure that a graph gives its results; a graph without one of its own returns them as they stand."""
    info = getattr(graph._codegen, "pytree_info", None)
    return pytree.tree_structure(graph.output_node().args[0]) if info is None else info.out_spec
