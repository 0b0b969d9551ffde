"""A prepared graph whose quantized weights are inputs, so that training hands over what it makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.compilation import CompilerError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, quantizers_of

__all__ = ["compiled_if_possible", "with_soft_weights"]


def with_soft_weights(prepared: fx.GraphModule, quantizers: Sequence[AdaRoundQuantizer]) -> fx.GraphModule:
    """A copy of a graph that takes the values of weights from its caller; everything else is shared.

    Before::

        call(x): conv(quantize(x), fake_quantize(weight)), linear(y, fake_quantize(other))

    After, ``rounded`` being the value that ``other`` is rounded to now::

        call(x, soft_0): conv(quantize(x), soft_0), linear(y, rounded)

    Args:
        prepared: A graph with fake quantizers.
        quantizers: Those of the weights that become inputs, in the order of the inputs, behind the graph's own. The
            other weights become constants: rounding them looks at values, which no compiler can take.

    Returns:
        A module that takes the flat inputs of the graph, then the weights, and returns its flat results as a tuple.
    """
    graph = copy.deepcopy(prepared.graph)
    # Flat inputs and results: no tree is packed and unpacked in each step.
    graph.set_codegen(fx.graph.CodeGen())
    module, modules = fx.GraphModule(prepared, graph), quantizers_of(prepared)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[int, fx.Node] = {}
    for index, quantizer in enumerate(quantizers):
        with graph.inserting_after(last):
            last = inputs[id(quantizer)] = graph.placeholder(f"soft_{index}")
    for node in list(graph.nodes):
        called = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(called, AdaRoundQuantizer):
            continue
        value = inputs.get(id(called))
        if value is None:
            module.register_buffer(name := f"rounded_{node.name}", called(called.seen_weight()))
            with graph.inserting_after(node):
                value = graph.get_attr(name)
        value.meta.update(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def compiled_if_possible(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """The function, compiled for arguments of these shapes; the function itself where it cannot be compiled.

    Args:
        function: To compile, gradients included.
        arguments: What it is tried with: compiling happens here, and so do its failures.
    """
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    try:
        results = [
            result
            for result in pytree.tree_leaves(compiled(*arguments))
            if isinstance(result, Tensor) and result.requires_grad
        ]
        if results:
            # The way back is compiled when it is first gone; nothing may collect its gradients.
            wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            torch.autograd.grad([result.sum() for result in results], wanted, allow_unused=True)
    except CompilerError:
        return function
    return compiled
