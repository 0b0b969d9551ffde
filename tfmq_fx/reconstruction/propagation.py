"""Two models side by side, node by node over all calibration samples: the float one and the quantized one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tfmq_fx.fake_quantizers import FakeQuantizer, float_mode, quantizers_of
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call
from tfmq_fx.passes.support.subgraphs import known_value
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.store import ActivationStore
from tfmq_fx.reconstruction.values import Batches, collect, in_window, placeholder_value

__all__ = ["Propagation"]


class Propagation:
    """Values of the live nodes of a partitioned graph, for the float and for the quantized model.

    Every node is computed once for all samples, so walking through a graph of ``U`` units costs one pass, not
    ``U``. Values that nothing reads any more are dropped; values that do not differ are kept once.

    Args:
        graph_module: A graph of unit calls and what lies between them (:class:`tfmq_fx.passes.PartitionUnits`).
        samples: The calibration samples.
        store: Where their activations lie.
    """

    def __init__(self, graph_module: fx.GraphModule, samples: Samples, store: ActivationStore) -> None:
        self.graph_module, self.samples, self.store = graph_module, samples, store
        self.float_values: dict[fx.Node, Any] = {}
        self.quantized_values: dict[fx.Node, Any] = {}
        self._columns = iter(samples.inputs)
        order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        self._last_use = {node: max((order[user] for user in node.users), default=order[node]) for node in order}
        self._order = order

    def arguments(self, node: fx.Node, window: Window, *, quantized: bool) -> tuple[Any, ...]:
        """The arguments of a call for a window of samples."""
        values = self.quantized_values if quantized else self.float_values
        args: tuple[Any, ...] = fx.node.map_arg(node.args, lambda n: in_window(values[n], window))
        return args

    def differs(self, node: fx.Node) -> bool:
        """Whether the two models compute different values for a node."""
        return self.quantized_values[node] is not self.float_values[node]

    @torch.no_grad()
    def compute_float(self, node: fx.Node) -> None:
        """Compute a node for the float model."""
        with float_mode(self._quantizers(node)):
            self.float_values[node] = self._compute(node, quantized=False)

    @torch.no_grad()
    def compute_quantized(self, node: fx.Node) -> None:
        """Compute a node for the quantized model; after :meth:`compute_float`."""
        sources = node.all_input_nodes
        if not self._quantizers(node) and not any(self.differs(source) for source in sources):
            self.quantized_values[node] = self.float_values[node]
        else:
            self.quantized_values[node] = self._compute(node, quantized=True)

    def release(self, node: fx.Node) -> None:
        """Drop what no node behind this one reads."""
        now = self._order[node]
        for source in (*node.all_input_nodes, node):
            if self._last_use[source] <= now:
                self.float_values.pop(source, None)
                self.quantized_values.pop(source, None)

    def _quantizers(self, node: fx.Node) -> list[FakeQuantizer]:
        if node.op != "call_module":
            return []
        return list(quantizers_of(self.graph_module.get_submodule(str(node.target))).values())

    def _compute(self, node: fx.Node, *, quantized: bool) -> Any:
        if node.op == "placeholder":
            return placeholder_value(next(self._columns))
        if node.op == "get_attr":
            return Batches((read_attribute(self.graph_module, str(node.target)),))
        if is_call(node, operator.getitem):
            values = self.quantized_values if quantized else self.float_values
            index: Any = node.args[1]
            return values[argument_node(node, 0)][index]
        target: Any = self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        kwargs = node.kwargs

        def run(window: Window) -> Any:
            return target(*self.arguments(node, window, quantized=quantized), **kwargs)

        return collect(self.samples, known_value(self.graph_module, node), run, self.store)
