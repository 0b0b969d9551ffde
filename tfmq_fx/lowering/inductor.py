"""The just-in-time backend: ``torch.compile`` with weight freezing, for this one compilation only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tfmq_fx._compat import no_special_batch_sizes
from tfmq_fx.lowering.examples import batch_symbol
from tfmq_fx.lowering.kernels import KernelCounter

__all__ = ["compile_inductor", "freezing"]


@contextlib.contextmanager
def freezing(counter: KernelCounter) -> Iterator[None]:
    """Switch on what integer kernels need, and put everything back afterwards.

    Without freezing Inductor emits no integer kernel and says nothing. The batch is compiled without
    the special case for sizes 0 and 1, so that one compilation serves every batch.
    """
    with torch._inductor.config.patch(freezing=True, post_grad_custom_post_pass=counter), no_special_batch_sizes():
        yield


@torch.no_grad()
def compile_inductor(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], KernelCounter]:
    """Compile ``graph_module`` once, for every batch size.

    The compiled code has no guards: a call with another shape would run wrong code rather than compile
    again (without freezing, hence in float). The denoiser checks every call before it gets here.

    Args:
        graph_module: The q/dq graph.
        args: Example positional inputs.
        kwargs: Example inputs by name.

    Returns:
        The compiled callable and the integer kernels in it.
    """
    counter = KernelCounter()
    if batch_symbol(graph_module) is not None:
        for node, leaf in zip(_placeholders(graph_module), pytree.tree_leaves((args, kwargs)), strict=True):
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt) and isinstance(leaf, Tensor):
                    torch._dynamo.mark_dynamic(leaf, axis)
    compiled = torch.compile(graph_module, options={"guard_filter_fn": lambda guards: [False] * len(guards)})
    with freezing(counter):
        compiled(*args, **kwargs)
    return compiled, counter


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]
