"""A generated diffusion model and what analyses ought to find in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .time_path import CHANNELS, SIDE, TimePath

__all__ = ["ExpectedBlock", "ExpectedPart", "TemporalGraph"]


@dataclass(frozen=True)
class ExpectedBlock:
    """What ``find_temporal_block`` ought to find, as names of nodes.

    Attributes:
        nodes: All nodes of the block, the constants that only it reads included.
        time_embedding: The linears of ``h`` in order.
        embedding_layers: The linears of the ``g_i`` in order.
        features: The nodes of the block that the rest of the graph reads, in order.
    """

    nodes: frozenset[str]
    time_embedding: tuple[str, ...]
    embedding_layers: tuple[str, ...]
    features: tuple[str, ...]


@dataclass(frozen=True)
class ExpectedPart:
    """What ``find_conditional_part`` ought to find with ``sample`` as the sample, as names of nodes.

    Attributes:
        per_prompt: Tensors that depend on class labels and prompt alone.
        per_timestep: Tensors that depend on the timestep, with or without them.
        joint: The layers that depend on the timestep and on them, in order.
        conditions: The inputs that are not the timestep, in order.
    """

    per_prompt: frozenset[str]
    per_timestep: frozenset[str]
    joint: tuple[str, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class TemporalGraph:
    """A generated diffusion model with its answer.

    Attributes:
        graph_module: The model.
        path: What it was built from.
        expected: The block of the timestep alone.
        expected_finite: The block with ``finite=("class_labels",)``; equal to ``expected`` without classes.
        expected_whole: The block with ``finite=("class_labels", "pooled")``, as far as they are inputs.
        expected_part: What the sample does not reach.
    """

    graph_module: fx.GraphModule
    path: TimePath
    expected: ExpectedBlock
    expected_finite: ExpectedBlock
    expected_whole: ExpectedBlock
    expected_part: ExpectedPart

    def example_inputs(self, timesteps: Sequence[float] = (7, 999), *, batch: int | None = None) -> tuple[Tensor, ...]:
        """Inputs of the model in the order of its placeholders.

        Args:
            timesteps: Given to the items of the batch in turn; a 0-dim timestep takes the first.
            batch: Another batch size, for a symbolic batch.
        """
        size = self.path.batch if batch is None else batch
        random = torch.Generator().manual_seed(self.path.seed)
        cycle = [timesteps[index % len(timesteps)] for index in range(size)]
        inputs = {
            "sample": torch.randn(size, CHANNELS, SIDE, SIDE, generator=random),
            self.path.timestep_name: torch.tensor(
                cycle[0] if self.path.scalar_timestep else cycle, dtype=self.path.timestep_dtype
            ),
            "class_labels": torch.arange(size) % 3,
            "pooled": torch.randn(size, self.path.prompt_width, generator=random),
        }
        names = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        return tuple(inputs[name] for name in names)

    def __repr__(self) -> str:
        """The path and the readable graph, for the report of a failing example."""
        return f"TemporalGraph({self.path})\n{self.graph_module.graph}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints examples with this; for a dataclass it would write down every weight."""
        printer.text(repr(self))
