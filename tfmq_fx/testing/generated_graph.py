"""A random graph with inputs that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

__all__ = ["GeneratedGraph"]


@dataclass(frozen=True, repr=False)
class GeneratedGraph:
    """A random graph with inputs that it runs on.

    Attributes:
        graph_module: The graph.
        example_inputs: Positional inputs.
        more_inputs: The same of another batch size, when the batch is symbolic.
        timestep: Name of the timestep placeholder.
    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    more_inputs: tuple[tuple[Tensor, ...], ...]
    timestep: str = "timestep"

    def __repr__(self) -> str:
        """The readable graph and the shapes of its inputs, for the report of a failing example."""
        shapes = [tuple(tensor.shape) for tensor in self.example_inputs]
        return f"GeneratedGraph(inputs {shapes})\n{self.graph_module.graph}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints examples with this; for a dataclass it would write down every weight."""
        printer.text(repr(self))
