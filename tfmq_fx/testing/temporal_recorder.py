"""The nodes of a small diffusion model, noted down by what they depend on while they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .graph_builder import GraphBuilder
from .temporal_graph import ExpectedBlock, ExpectedPart
from .time_path import CHANNELS, SIDE, TimePath

__all__ = ["TemporalRecorder"]

aten = torch.ops.aten


class TemporalRecorder:
    """Makes nodes and collects them: those of the block, by the inputs that they follow, and its constants.

    Args:
        path: What the model looks like.

    Attributes:
        temporal: Nodes that follow the timestep alone.
        finite: Nodes that a class embedding enters too.
        prompted: Nodes that a prompt enters too.
        without_timestep: Those of ``finite`` and ``prompted`` that the timestep does not enter.
        constants: What may belong to the block because only it reads it.
    """

    def __init__(self, path: TimePath) -> None:
        self.path = path
        self.builder = GraphBuilder(batch=path.batch, dynamic_batch=path.dynamic_batch, seed=path.seed)
        self.temporal: list[fx.Node] = []
        self.finite: list[fx.Node] = []
        self.prompted: list[fx.Node] = []
        self.without_timestep: list[fx.Node] = []
        self.constants: list[fx.Node] = []
        self.class_linears: list[fx.Node] = []
        self.prompt_linears: list[fx.Node] = []
        self.inputs = self._placeholders()
        self._batch_size: Any = None

    def _placeholders(self) -> dict[str, fx.Node]:
        others = ["sample", *["class_labels"] * (self.path.class_embedding != "none")]
        others += ["pooled"] * (self.path.prompt != "none")
        index = {"first": 0, "middle": 1, "last": len(others)}[self.path.position]
        names = [*others[:index], self.path.timestep_name, *others[index:]]
        batch = self.builder.batch
        shapes: dict[str, tuple[Any, ...]] = {"sample": (batch, CHANNELS, SIDE, SIDE), "class_labels": (batch,)}
        shapes["pooled"] = (batch, self.path.prompt_width)
        shapes[self.path.timestep_name] = () if self.path.scalar_timestep else (batch,)
        dtypes = {"sample": torch.float32, "pooled": torch.float32, self.path.timestep_name: self.path.timestep_dtype}
        return {name: self.builder.placeholder(name, shapes[name], dtypes.get(name, torch.int64)) for name in names}

    # -- nodes of the block, of the constants, and of the rest ------------------------------------------------

    def _record(self, into: list[fx.Node], target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.builder.call(target, *args, **kwargs)
        into.append(node)
        return node

    def _t(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._record(self.temporal, target, *args, **kwargs)

    def _constant(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._record(self.constants, target, *args, **kwargs)

    def _weight(self, name: str, *shape: int) -> fx.Node:
        node = self.builder.weight(name, shape)
        self.constants.append(node)
        return node

    def _linear(self, into: list[fx.Node], name: str, source: fx.Node, width: int, fan_in: int) -> fx.Node:
        weight, bias = self._weight(f"{name}.weight", width, fan_in), self._weight(f"{name}.bias", width)
        return self._record(into, aten.linear.default, source, weight, bias)

    def _conv(self, name: str, source: fx.Node) -> fx.Node:
        weight = self.builder.weight(f"{name}.weight", (CHANNELS, CHANNELS, 3, 3))
        bias = self.builder.weight(f"{name}.bias", (CHANNELS,))
        with self.builder.inside(name):
            return self.builder.call(aten.conv2d.default, source, weight, bias, [1, 1], [1, 1])

    def _size(self) -> Any:
        """The batch size as the time path sees it: a number, or one node that reads it off the sample."""
        if not self.path.dynamic_batch:
            return self.path.batch
        if self._batch_size is None:
            self._batch_size = self._constant(aten.sym_size.int, self.inputs["sample"], 0)
        return self._batch_size

    # -- the answers ------------------------------------------------------------------------------------------

    def _answer(
        self, members: list[fx.Node], trunk: list[fx.Node], layers: list[fx.Node], frontier: list[fx.Node]
    ) -> ExpectedBlock:
        # A constant belongs to the block when the block alone reads it; the latest come first, because
        # constants may be computed from constants.
        inside = set(members)
        for constant in reversed(self.constants):
            if constant.users and all(user in inside for user in constant.users):
                inside.add(constant)
        order = {node: index for index, node in enumerate(self.builder.graph.nodes)}
        return ExpectedBlock(
            nodes=frozenset(node.name for node in inside),
            time_embedding=tuple(node.name for node in trunk),
            embedding_layers=tuple(node.name for node in layers),
            features=tuple(node.name for node in sorted(set(frontier), key=order.__getitem__)),
        )

    def _part(self, joint: list[fx.Node]) -> ExpectedPart:
        alone = {node.name for node in self.without_timestep}
        reached = {node.name for node in (*self.temporal, *self.finite, *self.prompted)}
        return ExpectedPart(
            per_prompt=frozenset(alone),
            per_timestep=frozenset(reached - alone),
            joint=tuple(node.name for node in joint),
            conditions=tuple(name for name in self.inputs if name in ("class_labels", "pooled")),
        )
