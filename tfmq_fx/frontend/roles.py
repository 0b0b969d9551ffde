"""Roles of layers, read off the graph: which ones touch the model's sample, and which its result or a residual stream.

A role is a matter of data flow, not of a position in a list of modules.
"""

from __future__ import annotations

from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.analysis import data_arguments, find_shortcuts
from tfmq_fx.passes.support.predicates import is_matmul, is_weighted, node_value

__all__ = ["find_roles", "output_nodes", "sample_inputs"]

#: Where a sequence has its channels, and a video: before the frames or behind them.
CHANNELS = {3: (2,), 5: (1, 2)}


def find_roles(graph_module: fx.GraphModule, timestep: str = "timestep") -> dict[fx.Node, frozenset[str]]:
    """Map nodes to their roles; nodes without a role are absent.

    Args:
        graph_module: A captured graph.
        timestep: Name of the timestep input, which is no sample.

    Returns:
        ``"input"`` for weighted nodes that the sample reaches without passing another weighted node,
        ``"output"`` for weighted nodes that reach the result without passing another, ``"attention"``
        for products of two computed tensors, ``"shortcut"`` for pointwise convolutions beside a residual
        branch (:func:`~tfmq_fx.passes.analysis.find_shortcuts`). The sample is the input whose shape agrees with the
        result's everywhere but in the channels; when none does, every input but the timestep is.
    """
    roles: dict[fx.Node, set[str]] = {}
    for node in _first_weighted(graph_module.graph, sample_inputs(graph_module.graph, timestep)):
        roles.setdefault(node, set()).add("input")
    for node in _last_weighted(graph_module.graph):
        roles.setdefault(node, set()).add("output")
    for node in graph_module.graph.nodes:
        if is_matmul(node):
            roles.setdefault(node, set()).add("attention")
    for node in find_shortcuts(graph_module.graph):
        roles.setdefault(node, set()).add("shortcut")
    return {node: frozenset(names) for node, names in roles.items()}


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    output = next(node for node in graph.nodes if node.op == "output")
    return [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]


def _has_sample_shape(sample: Tensor, result: Tensor) -> bool:
    """Same rank and sizes but for the channels, wherever models of that rank have them."""
    if sample.ndim != result.ndim or not sample.is_floating_point():
        return False
    different = [axis for axis, (a, b) in enumerate(zip(sample.shape, result.shape, strict=True)) if a != b]
    return not different or (len(different) == 1 and different[0] in CHANNELS.get(result.ndim, (1,)))


def sample_inputs(graph: fx.Graph, timestep: str) -> set[fx.Node]:
    """The inputs that are denoised: those shaped like a result but for the channels, else all but the timestep."""
    inputs = {
        node
        for node in graph.nodes
        if node.op == "placeholder" and node.target != timestep and isinstance(node_value(node), Tensor)
    }
    results = [node_value(node) for node in output_nodes(graph) if isinstance(node_value(node), Tensor)]
    samples = {node for node in inputs if any(_has_sample_shape(node_value(node), result) for result in results)}
    return samples or inputs


def _first_weighted(graph: fx.Graph, samples: set[fx.Node]) -> list[fx.Node]:
    """Weighted nodes that a sample reaches directly."""
    direct, first = set(samples), []
    for node in graph.nodes:
        if node in samples or not any(argument in direct for argument in data_arguments(node)):
            continue
        if is_weighted(node):
            first.append(node)
        else:
            direct.add(node)
    return first


def _last_weighted(graph: fx.Graph) -> list[fx.Node]:
    """Weighted nodes that reach an output directly."""
    last, visited, queue = [], set(), output_nodes(graph)
    while queue:
        node = queue.pop()
        if node in visited:
            continue
        visited.add(node)
        if is_weighted(node):
            last.append(node)
        else:
            queue.extend(data_arguments(node))
    return last
