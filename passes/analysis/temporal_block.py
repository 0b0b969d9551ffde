"""Find the temporal information block of a diffusion model by data flow.

The block (TFMQ-DM, CVPR 2024, section 4) is the time embed ``h``: sinusoid -> Linear -> SiLU -> Linear,
together with every embedding layer ``g_i``: SiLU -> Linear. It is a function of the timestep alone.
Nothing here looks at module names: a node belongs to the block when the timestep is the only input
that its *data* depends on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from tfmq_fx._torch.exclusion import exclusive
from tfmq_fx.passes.analysis.dependence import data_arguments, data_dependence, reads_as_parameter
from tfmq_fx.passes.analysis.table_row import row_columns
from tfmq_fx.passes.analysis.temporal_structure import (
    impurity,
    linear_ancestry,
    reading_module,
    split_structure,
)
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.predicates import fqn, is_weighted, node_value, repeats_rows

__all__ = ["EmbeddingLayer", "TemporalBlock", "find_temporal_block", "repeated_last"]


@dataclass(frozen=True)
class EmbeddingLayer:
    """One ``g_i``: its linear node, the linear's dotted name, and the block that reads its features."""

    linear: fx.Node
    fqn: str
    feeds: str


@dataclass(frozen=True)
class TemporalBlock:
    """The nodes of a graph that depend on the timestep alone, and the structure read off them.

    Attributes:
        nodes: Every node of the block in topological order, constants that only the block reads included.
        time_embedding: The linears of ``h``, in order.
        embedding_layers: One entry per ``g_i``.
        features: The frontier: nodes of the block that the rest of the graph reads.
        timestep: Name of the timestep placeholder.
        finite: Names of the further inputs that the block may depend on.
        reason: Why the block is empty; ``""`` when it is not.
    """

    nodes: tuple[fx.Node, ...] = ()
    time_embedding: tuple[fx.Node, ...] = ()
    embedding_layers: tuple[EmbeddingLayer, ...] = ()
    features: tuple[fx.Node, ...] = ()
    timestep: str = "timestep"
    finite: tuple[str, ...] = ()
    reason: str = ""
    _members: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    def __bool__(self) -> bool:
        """Whether a block was found."""
        return bool(self.nodes)

    def __contains__(self, node: object) -> bool:
        """Whether ``node`` belongs to the block."""
        return node in self._members

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """All weighted nodes of the block: those of ``h``, then those of the ``g_i``."""
        return (*self.time_embedding, *(layer.linear for layer in self.embedding_layers))

    def __str__(self) -> str:
        """Draw the block as a tree of plain text."""
        if not self:
            return f"no temporal block: {self.reason}"
        inputs = ", ".join((self.timestep, *self.finite))
        lines = [f"temporal block of ({inputs}): {len(self.nodes)} nodes, {len(self.linears)} linears"]
        lines.append(f"├─ h: {len(self.time_embedding)} linears in the time embed")
        lines += [f"│  ├─ {fqn(node)} {_weight_shape(node)}" for node in self.time_embedding]
        lines.append(f"├─ g: {len(self.embedding_layers)} embedding layers")
        for layer in self.embedding_layers:
            lines.append(f"│  ├─ {layer.fqn} {_weight_shape(layer.linear)} → {layer.feeds or 'output'}")
        lines.append(f"└─ {len(self.features)} features read outside the block")
        return "\n".join(lines)


def _weight_shape(node: fx.Node) -> str:
    weight = node.args[2 if node.target is torch.ops.aten.addmm.default else 1]
    value = node_value(weight) if isinstance(weight, fx.Node) else None
    return f"[{' × '.join(str(int(size)) for size in value.shape)}]" if isinstance(value, Tensor) else ""


def _with_private_sources(graph: fx.Graph, members: set[fx.Node], allowed: frozenset[str],
                          dependence: dict[fx.Node, frozenset[str]]) -> list[fx.Node]:  # fmt: skip
    """Add what only the block reads: constants, shape numbers, and what the `finite` inputs alone lead to."""
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" or not dependence[node] <= allowed or not node.users:
            continue
        if all(user in members for user in node.users):
            members.add(node)
    return [node for node in graph.nodes if node in members]


def repeated_last(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Those of ``nodes``, in graph order, behind a repetition of rows that no linear follows.

    The features are what is repeated: the block has one row an item of the batch, and so has its table.
    """
    repeated: set[fx.Node] = set()
    for node in nodes:
        if repeats_rows(node) or any(n in repeated for n in data_arguments(node)):
            repeated.add(node)
    before_linear: set[fx.Node] = set()
    for node in reversed(nodes):
        if is_weighted(node) or any(user in before_linear for user in node.users):
            before_linear.add(node)
    return repeated - before_linear


def find_temporal_block(
    program: fx.GraphModule | ExportedProgram,
    timestep: str = "timestep",
    *,
    finite: Collection[str] | None = None,
) -> TemporalBlock:
    """Find the nodes whose only data ancestor among the inputs is the timestep, and read their structure.

    Args:
        program: A captured graph (``meta["val"]`` on its nodes), or an ``ExportedProgram``.
        timestep: Name of the timestep input.
        finite: Further inputs from a finite set that the block may depend on, e.g. ``("class_labels",)``; None:
            those that the graph's table of rows is indexed by, if it has one.

    Returns:
        The block. A model without one gets an empty block whose ``reason`` says why; finding no block
        is never an error. The graph is not changed.

    Raises:
        PassError: ``program`` is not a captured graph.

    Source: TFMQ-DM (CVPR 2024), section 4, the temporal information block; the rule by data flow is ours.
    """
    graph_module: object = program
    if isinstance(program, ExportedProgram):
        with exclusive():
            graph_module = program.module(check_guards=False)
    if not isinstance(graph_module, fx.GraphModule):
        msg = f"a temporal block is found in a captured graph, not in a {type(program).__name__}; use tfmq_fx.capture"
        raise PassError(msg)
    if finite is None:
        finite = tuple(name for name in row_columns(graph_module) if name != timestep)
    further = (finite,) if isinstance(finite, str) else tuple(finite)
    allowed = frozenset((timestep, *further))

    def empty(reason: str) -> TemporalBlock:
        return TemporalBlock(timestep=timestep, finite=further, reason=reason)

    inputs = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    missing = [name for name in (timestep, *further) if name not in inputs]
    if missing:
        return empty(f"the model has no input named {missing[0]!r}; its inputs are {', '.join(inputs) or 'none'}")

    dependence = data_dependence(graph_module)
    members = {
        node
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_module") and timestep in dependence[node] and dependence[node] <= allowed
    }
    if not members:
        used = any(timestep in dependence[node] for node in graph_module.graph.nodes if node.op == "call_function")
        if not used:
            return empty(f"nothing in the model reads the values of {timestep!r}")
        return empty(f"{timestep!r} meets the other inputs before any operation of its own")
    members -= repeated_last([node for node in graph_module.graph.nodes if node in members])
    nodes = _with_private_sources(graph_module.graph, members, allowed, dependence)
    if reason := impurity(nodes):
        return empty(reason)
    ancestry = linear_ancestry(nodes)
    if not ancestry:
        return empty(f"no linear layer depends on {timestep!r} alone; it is wholly conditional")
    trunk, last = split_structure(ancestry)
    features = tuple(
        node
        for node in nodes
        if node.op in ("call_function", "call_module")
        and dependence[node]
        and any(
            user not in members and node in data_arguments(user) and not reads_as_parameter(user, node)
            for user in node.users
        )
    )
    return TemporalBlock(
        nodes=tuple(nodes),
        time_embedding=tuple(trunk),
        embedding_layers=tuple(EmbeddingLayer(node, fqn(node), reading_module(node, members)) for node in last),
        features=features,
        timestep=timestep,
        finite=further,
        _members=frozenset(members),
    )
