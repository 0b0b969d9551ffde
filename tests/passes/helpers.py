"""Short ways to look at a graph."""

from collections import Counter

import torch

aten = torch.ops.aten


def operators(graph_module):
    """How often each operator is called."""
    return Counter(node.target for node in graph_module.graph.nodes if node.op == "call_function")


def calls(graph_module, target):
    """The nodes that call ``target``, in order."""
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and node.target is target]


def unchanged(rewrite, graph_module):
    """Whether the pass says that it did nothing, and did nothing."""
    before = str(graph_module.graph), sorted(graph_module.state_dict())
    result = rewrite(graph_module)
    return not result.modified and (str(graph_module.graph), sorted(graph_module.state_dict())) == before
