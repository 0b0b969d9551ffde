"""The just-in-time backend: Inductor with weight freezing, for this one compilation only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.compilation import CompilerError, no_special_batch_sizes
from tfmq_fx._torch.graphs import output_structure
from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.inductor.added_values import copy_added_values
from tfmq_fx.lowering.backends.inductor.kernels import KernelCounter
from tfmq_fx.passes.support.nodes import fake_mode_of
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["CompiledProgram", "compile_inductor", "compiler_errors", "freezing"]


@contextlib.contextmanager
def freezing(counter: KernelCounter) -> Iterator[None]:
    """Switch on what integer kernels need, and put everything back afterwards.

    Without freezing Inductor emits no integer kernel and says nothing. The batch is compiled without
    the special case for sizes 0 and 1, so that one compilation serves every batch.
    """
    from tfmq_fx._torch.inductor import freeze_weights

    with freeze_weights(copy_added_values, counter), no_special_batch_sizes():
        yield


class CompiledProgram:
    """A graph that Inductor compiled, called like the graph.

    It holds the compiled code itself: nothing in it is looked up, guarded or compiled again, whatever is done to
    ``torch.compile``'s own state. A call with another shape or dtype would run wrong code; the denoiser checks every
    call before it gets here.

    Args:
        run: Takes the tensor inputs in order, and returns the tensor results in order.
        tensors: The numbers of the inputs that are tensors.
        results: Per leaf of the result, whether it is a tensor; else what is returned there.
        structure: What the results are put into; None for one alone.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        tensors: list[int],
        results: list[Any],
        structure: pytree.TreeSpec,
    ) -> None:
        self._run, self._tensors, self._results, self._structure = run, tensors, results, structure

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled code."""
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = iter(self._run(*[leaves[index] for index in self._tensors]))
        outputs = [next(tensors) if isinstance(leaf, fx.Node) else leaf for leaf in self._results]
        return pytree.tree_unflatten(outputs, self._structure)


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn what the compiler raises in the block into an error that says what to do.

    Raises:
        LoweringError: The compiler raised something.
    """
    try:
        yield
    except CompilerError as error:
        cause = getattr(error, "inner_exception", error)
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        msg = (
            f"Inductor could not compile this program ({first.strip()}); capture the model with dynamic_batch=False, "
            "which is easier to compile, or run it with backend='reference'"
        )
        raise LoweringError(msg) from error


@torch.no_grad()
def compile_inductor(graph_module: fx.GraphModule) -> tuple[CompiledProgram, KernelCounter]:
    """Compile ``graph_module`` once, for every batch size.

    Args:
        graph_module: The q/dq graph; sizes that are symbolic in its ``meta["val"]`` stay so. It is not changed.

    Returns:
        The compiled callable and the integer kernels in it.
    """
    from tfmq_fx._torch.inductor import compile_flat_graph

    counter = KernelCounter()
    # The weights are read and packed, never written: a copy of them would only double the memory.
    shared = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    flat = copy.deepcopy(graph_module, shared)
    output = flat.graph.output_node()
    results = pytree.tree_leaves(output.args[0])
    structure = output_structure(graph_module.graph)
    output.args = (tuple(leaf for leaf in results if isinstance(leaf, fx.Node)),)
    placeholders = [node for node in flat.graph.nodes if node.op == "placeholder"]
    tensors = [index for index, node in enumerate(placeholders) if isinstance(node_value(node), Tensor)]
    for index, node in enumerate(placeholders):
        if index not in tensors:
            flat.graph.erase_node(node)
    flat.graph.set_codegen(fx.graph.CodeGen())
    flat.recompile()
    mode = fake_mode_of(flat.graph)
    with mode:
        # Every caller hands over contiguous tensors; a stage's graph remembers the strides of the whole one.
        examples = [value.new_empty(value.shape) for value in (node_value(placeholders[index]) for index in tensors)]
    with freezing(counter):
        run = compile_flat_graph(flat, examples, mode)
    return CompiledProgram(run, tensors, results, structure), counter
