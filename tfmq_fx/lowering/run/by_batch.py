"""Run a program on an engine that compiles for one batch size at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import output_structure
from tfmq_fx.frontend.sizes import sizes_of
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["ByBatch", "Session"]

#: Takes the tensor inputs in graph order and returns the tensor results in graph order.
Session = Callable[[list[Tensor]], list[Tensor]]

#: Batch sizes that stay compiled: each has its own copy of the weights.
MOST_SESSIONS = 4


class ByBatch:
    """Called like the graph; compiles on the first call with a batch size. The least recently used gives way.

    Args:
        graph_module: The graph; it is kept.
        compile_for: Compiles for a batch size.
    """

    def __init__(self, graph_module: fx.GraphModule, compile_for: Callable[[int], Session]) -> None:
        self._compile_for = compile_for
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._lock = threading.Lock()
        inputs = [node_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        self._batch = _batch_axis(inputs)
        output = graph_module.graph.output_node()
        self._results = pytree.tree_leaves(output.args[0])
        self._structure = output_structure(graph_module.graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: leaf is None)
        tensors = [leaves[index] for index in self._tensors]
        batch = 1 if self._batch is None else self._batch.of(tensors)
        computed = iter(self.session(batch)(tensors))
        outputs = [next(computed) if isinstance(leaf, fx.Node) else leaf for leaf in self._results]
        return pytree.tree_unflatten(outputs, self._structure)

    def session(self, batch: int) -> Session:
        """The compiled program for ``batch``."""
        with self._lock:  # another thread's batch may push this one out
            if batch not in self._sessions:
                self._sessions[batch] = self._compile_for(batch)
                if len(self._sessions) > MOST_SESSIONS:
                    self._sessions.popitem(last=False)
            self._sessions.move_to_end(batch)
            return self._sessions[batch]


@dataclass(frozen=True)
class _BatchAxis:
    """Which tensor input has the batch along which axis, and how many entries for each item."""

    index: int
    axis: int
    times: int

    def of(self, tensors: list[Tensor]) -> int:
        """The batch size of a call."""
        return int(tensors[self.index].shape[self.axis]) // self.times


def _batch_axis(inputs: list[Any]) -> _BatchAxis | None:
    """Where the batch is read off, None when it is fixed."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    for index, value in enumerate(tensors):
        for axis, size in enumerate(sizes_of(value)):
            if not isinstance(size, int):
                return _BatchAxis(index, axis, size.times)
    return None
