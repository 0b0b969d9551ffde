"""What later stages need to know of a graph, kept where other tools leave it: on its placeholders.

``GraphModule.meta`` and the calling convention belong to the module and to the graph; whoever builds another one of the
same nodes (torch's ``CSEPass``, nncf) loses both. The metadata of nodes is copied with them.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from tfmq_fx._torch.graphs import code_generator, has_calling_convention, plain_calling_convention

__all__ = ["ensure_calling_convention", "keep_notes", "noted", "restore_notes", "update_notes"]

#: Key of the notes in the metadata of placeholders, and prefix of what is kept of the module's own metadata.
NOTES, PREFIX = "tfmq_fx.notes", "tfmq_fx."
CONVENTION = "calling_convention"


def keep_notes(graph_module: fx.GraphModule) -> None:
    """Write the module's notes and its calling convention on the placeholders, in the place of older ones."""
    graph = graph_module.graph
    notes = {key: value for key, value in graph_module.meta.items() if str(key).startswith(PREFIX)}
    convention = code_generator(graph) if has_calling_convention(graph) else _notes(graph).get(CONVENTION)
    notes[CONVENTION] = convention
    for node in graph.find_nodes(op="placeholder"):
        node.meta[NOTES] = notes


def update_notes(graph_module: fx.GraphModule) -> None:
    """Add what the module knows by now to the notes that :func:`keep_notes` wrote, in place.

    nncf puts the metadata of every node back to what it was before ``annotate``; a dictionary it leaves as it is.
    """
    _notes(graph_module.graph).update({k: v for k, v in graph_module.meta.items() if str(k).startswith(PREFIX)})


def restore_notes(graph_module: fx.GraphModule) -> None:
    """Give the module back what another tool dropped and its placeholders still have."""
    graph = graph_module.graph
    notes = _notes(graph)
    for key, value in notes.items():
        if key != CONVENTION:
            graph_module.meta.setdefault(key, value)
    convention = notes.get(CONVENTION)
    if convention is None or has_calling_convention(graph) or not _fits(convention, graph):
        return
    graph.set_codegen(copy.deepcopy(convention))
    graph_module.recompile()


def noted(graph_module: fx.GraphModule, key: str) -> Any:
    """What the module knows under ``key``, or what its placeholders do; None when neither does."""
    return graph_module.meta.get(key, _notes(graph_module.graph).get(key))


def ensure_calling_convention(graph_module: fx.GraphModule) -> None:
    """Restore the notes; a graph that is called with bare tensors gets that as its calling convention."""
    restore_notes(graph_module)
    if not has_calling_convention(graph_module.graph):
        plain_calling_convention(graph_module.graph)
        graph_module.recompile()


def _notes(graph: fx.Graph) -> dict[str, Any]:
    for node in graph.find_nodes(op="placeholder"):
        if NOTES in node.meta:
            notes: dict[str, Any] = node.meta[NOTES]
            return notes
    return {}


def _fits(convention: Any, graph: fx.Graph) -> bool:
    """Whether a graph has the inputs and results that a convention was made for."""
    results: Any = graph.output_node().args[0]
    info = convention.pytree_info
    inputs = len(graph.find_nodes(op="placeholder"))
    flat = isinstance(results, (tuple, list)) and not any(isinstance(r, (tuple, list, dict)) for r in results)
    return flat and inputs == info.in_spec.num_leaves and len(results) == info.out_spec.num_leaves
