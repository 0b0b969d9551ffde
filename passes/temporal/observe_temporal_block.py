"""Observe the activations inside the temporal block, row by row of the timestep table."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import fx, nn

from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.analysis.table_row import require_row
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.item_rows import rows_of_items
from tfmq_fx.passes.support.nodes import insert_module_call
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["ObserveTemporalBlock"]

aten = torch.ops.aten


class ObserveTemporalBlock(GraphPass):
    """Insert ``observer(x, rows)`` before every linear of the temporal block.

    Before::

        %s = silu(%emb)      %y = linear(%s, %w, %b)            # the timestep is its only ancestor

    After::

        %s = silu(%emb)      %o = temporal_observer_0(%s, %rows)      %y = linear(%o, %w, %b)

    Legality: an observer returns its input, so numerics are preserved until the graph is converted.
    ``rows`` holds one table row per item of the batch, so a batch may mix timesteps. Linears that read
    the same value share one observer (all ``g_i`` read ``SiLU(h(t))``). A linear that is observed
    already is left alone. Source: finite set calibration, TFMQ-DM (CVPR 2024), section 5.
    Meta: the new nodes take the module stack of the linear.

    Args:
        make_observer: Makes a module called as ``observer(x, rows)`` for the linear that it stands before.
        timestep: Name of the timestep placeholder.
        select: Which linears of the block to observe; all by default.
    """

    id: ClassVar[str] = "tfmq::observe_temporal_block"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(
        self,
        make_observer: Callable[[fx.Node], nn.Module],
        *,
        timestep: str = "timestep",
        select: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:
        super().__init__()
        self.make_observer, self.timestep, self.select = make_observer, timestep, select

    def requires(self, graph_module: fx.GraphModule) -> None:
        """A row of the timestep table."""
        super().requires(graph_module)
        require_row(graph_module, self.id)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Observe the input of each selected linear once per distinct value."""
        graph = graph_module.graph
        row = require_row(graph_module, self.id)
        temporal = set(find_temporal_block(graph_module, self.timestep).linears)
        # In graph order, so that an observer stands before the first of the linears that share it.
        linears = [n for n in graph.nodes if n in temporal and self.select(n)]
        observed: dict[fx.Node, fx.Node] = {}
        for linear in linears:
            source = linear.args[1 if linear.target is aten.addmm.default else 0]
            if not isinstance(source, fx.Node) or source.op == "call_module" or node_value(source).ndim < 2:
                continue
            if source not in observed:
                name = self._register(graph_module, linear)
                with graph.inserting_before(linear):
                    rows = rows_of_items(graph, row, node_value(source), anchor=linear)
                    observed[source] = insert_module_call(graph, name, (source, rows), anchor=linear)
            linear.replace_input_with(source, observed[source])
        return bool(observed)

    def _register(self, graph_module: fx.GraphModule, linear: fx.Node) -> str:
        count = 0
        while hasattr(graph_module, f"temporal_observer_{count}"):
            count += 1
        name = f"temporal_observer_{count}"
        graph_module.add_submodule(name, self.make_observer(linear))
        return name
