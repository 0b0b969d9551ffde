"""Fill in the values that another tool's rewrite left out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, read_attribute

__all__ = ["PropagateValues"]


class PropagateValues(GraphPass):
    """Give ``meta["val"]`` to every node that has none.

    Before::

        %q = quantize_per_tensor(%x, 0.1, 128, 0, 255, uint8)          # inserted by convert_pt2e, no value

    After::

        the same graph; %q.meta["val"] is a fake uint8 tensor of the shape of %x

    Legality: only metadata changes, no node does. Values are computed under the fake mode of the
    placeholders, so symbolic sizes stay symbolic.
    Meta: ``val`` alone.
    """

    id: ClassVar[str] = "tfmq::propagate_values"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The values of the inputs; the others are what this pass is for."""
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and "val" not in node.meta:
                msg = (
                    f"{self.id}: input {node.name!r} has no meta['val'] to start from; "
                    "capture the model with tfmq_fx.capture or torch.export first"
                )
                raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Compute each missing value from those of its arguments."""
        mode = fake_mode_of(graph_module.graph)
        modified = False
        for node in graph_module.graph.nodes:
            if "val" in node.meta or node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                value = read_attribute(graph_module, str(node.target))
                if isinstance(value, torch.Tensor):
                    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
                    modified = True
                continue
            if node.op == "call_module":
                node.meta["val"] = node.args[0].meta["val"]
                modified = True
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = compute_value(mode, node.target, args, kwargs)
            modified = True
        return modified
