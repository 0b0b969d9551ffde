"""A quantized graph that is called by itself serves timesteps outside its table: a copy with more rows is kept."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx

from tfmq_fx._torch.exclusion import exclusive
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.analysis import row_lookups, row_values
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.temporal.extend import extend_rows

__all__ = ["ExtendedGraph"]

#: Timesteps that are added to a copy before it starts anew: sampling has some dozens, and training data a thousand.
MOST_ADDED = 4096


class ExtendedGraph:
    """Gives a graph in which given timesteps have rows; the graph itself stays as it is.

    Args:
        graph_module: A converted graph; copies share its tensors.
        timestep: Name of its timestep input.
    """

    def __init__(self, graph_module: fx.GraphModule, timestep: str) -> None:
        self.graph_module, self.timestep = graph_module, timestep
        self._extended = graph_module

    def serving(self, timesteps: Tensor) -> fx.GraphModule:
        """The graph, or a copy with more rows.

        Args:
            timesteps: The timesteps of a call, any shape. One that is no finite number is left to the graph to refuse.

        Raises:
            TimestepError: The temporal block computes NaN or infinite values at one of them.
        """
        if not row_lookups(self.graph_module):
            return self.graph_module
        # Most calls find their rows in the copy that is there, and wait for nobody.
        extended = self._extended
        missing = self._missing(extended, timesteps)
        if missing is None or len(missing) == 0:
            return extended
        with exclusive():
            missing = self._missing(self._extended, timesteps)
            if missing is None or len(missing) == 0:
                return self._extended
            if len(self._values(self._extended)) - len(self._values(self.graph_module)) + len(missing) > MOST_ADDED:
                self._extended = self.graph_module
                missing = self._missing(self._extended, timesteps)
            graph_module = self._extended
            tensors = (*graph_module.parameters(), *graph_module.buffers())
            shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
            extended = copy.deepcopy(graph_module, shared)
            if missing is not None:
                extend_rows(extended, missing, self.timestep)
            self._extended = extended
            return extended

    def _values(self, graph_module: fx.GraphModule) -> Tensor:
        return row_values(graph_module, row_lookups(graph_module)[0])

    def _missing(self, graph_module: fx.GraphModule, timesteps: Tensor) -> Tensor | None:
        """The timesteps without a row; None where one cannot have any."""
        _, in_table = ValueSearch(self._values(graph_module)).find(timesteps)
        try:
            return distinct_timesteps(timesteps[~in_table])
        except ConfigError:
            return None
