"""The weighted layers of two graphs of one model: which belong together, and how far apart their outputs are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.frontend.program_stage import live_observers
from tfmq_fx.passes.layout.add_low_rank_branches import is_branch
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.predicates import fqn, is_call, is_weighted, module_path
from tfmq_fx.quantization.fidelity import relative

__all__ = ["FloatRun", "accumulated_errors", "match_layers"]


class FloatRun(fx.Interpreter):
    """Runs a prepared graph without its observers and fake quantizers: float numerics, and nothing is learnt.

    Args:
        graph_module: A graph at any stage.
        watched: Nodes whose values are shown to ``watch``, with their names.
        watch: Called with a name and its value.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        watched: Mapping[fx.Node, str] | None = None,
        watch: Callable[[str, Tensor], object] | None = None,
    ) -> None:
        super().__init__(graph_module)
        self.observers = live_observers(graph_module)
        self.watched, self.watch = watched or {}, watch
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; an observer returns what it is given."""
        observed = n in self.observers
        value = self.fetch_args_kwargs_from_env(n)[0][0] if observed else super().run_node(n)
        if self.watch is not None and n in self.watched:
            self.watch(self.watched[n], value)
        return value


@torch.no_grad()
def accumulated_errors(prepared: fx.GraphModule, converted: fx.GraphModule, leaves: list[Any]) -> dict[str, float]:
    """The relative error of each layer's output, with the error of all layers before it, on one call.

    All layers' float outputs are in memory at once.

    Args:
        prepared: The prepared graph; its observers learn nothing.
        converted: The converted graph.
        leaves: The flat inputs of the call.

    Returns:
        By layer, in the order of the converted graph; of all layers that both graphs have.
    """
    pairs, _ = match_layers(prepared, converted)
    expected: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def compare(name: str, value: Tensor) -> None:
        # A linear of the converted graph may have its leading axes folded into one.
        wanted = expected.pop(name).double().flatten()
        errors[name] = relative(float((value.double().flatten() - wanted).norm()), float(wanted.norm()))

    FloatRun(prepared, {node: name for name, (node, _) in pairs.items()}, expected.__setitem__).run(*leaves)
    FloatRun(converted, {node: name for name, (_, node) in pairs.items()}, compare).run(*leaves)
    return errors


def _layer_outputs(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The output nodes of the weighted layers by module path, in graph order.

    Convolutions of one module that are only added to each other count as one layer: the parts of a
    convolution of a concatenation, and a layer with the branch beside it.
    """
    path_of: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if is_weighted(node):
            path_of[node] = module_path(node) or fqn(node)
            if is_branch(node):
                path_of.pop(argument_node(node, 0), None)
        elif is_call(node, torch.ops.aten.add.Tensor):
            parts = node.all_input_nodes
            paths = {path_of.get(part) for part in parts}
            if len(parts) == 2 and len(paths) == 1 and None not in paths and all(len(p.users) == 1 for p in parts):
                path_of[node] = path_of.pop(parts[0])
                path_of.pop(parts[1])
    outputs = defaultdict(list)
    for node in graph.nodes:
        if node in path_of:
            outputs[path_of[node]].append(node)
    return dict(outputs)


def match_layers(
    captured: fx.GraphModule, quantized: fx.GraphModule
) -> tuple[dict[str, tuple[fx.Node, fx.Node]], tuple[str, ...]]:
    """Match the weighted layers of two graphs of one model by module path, and by order within a module.

    Returns:
        The outputs of each layer in both graphs, by name in the float graph's order; and the module paths
        that do not correspond.
    """
    float_layers, quantized_layers = _layer_outputs(captured.graph), _layer_outputs(quantized.graph)
    pairs = {}
    unmatched = [path for path in quantized_layers if path not in float_layers]
    for path, nodes in float_layers.items():
        if len(quantized_layers.get(path, ())) != len(nodes):
            unmatched.append(path)
            continue
        for index, (node, other) in enumerate(zip(nodes, quantized_layers[path], strict=True)):
            name = fqn(node) if node.op == "call_function" and is_weighted(node) else path
            if name in pairs:
                name = f"{name}#{index + 1}"
            pairs[name] = (node, other)
    order = {node: position for position, node in enumerate(captured.graph.nodes)}
    return dict(sorted(pairs.items(), key=lambda item: order[item[1][0]])), tuple(unmatched)
