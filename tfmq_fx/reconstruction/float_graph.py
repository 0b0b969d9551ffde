"""The float model that a prepared graph stands for."""

from __future__ import annotations

import copy

from torch import fx

from tfmq_fx.fake_quantizers import quantizers_of

__all__ = ["float_graph"]


def float_graph(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph without its fake quantizers, which shares every tensor; nodes keep their names.

    It looks no timestep up in a table, so it can be evaluated at any.
    """
    copied = fx.GraphModule(prepared, copy.deepcopy(prepared.graph))
    quantizers = quantizers_of(prepared)
    for node in copied.graph.nodes:
        if node.op == "call_module" and str(node.target) in quantizers:
            node.replace_all_uses_with(node.args[0])
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied
