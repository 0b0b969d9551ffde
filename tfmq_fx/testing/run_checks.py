"""Properties seen by running: the graph (P2, P7), or the pass once more (P3, P8)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import has_calling_convention
from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.base import PassError

from .canonical import tensor_bytes, value_signature
from .graph_checks import first_difference
from .snapshot import GraphSnapshot
from .violation import fail

__all__ = [
    "Pass",
    "apply_pass",
    "bytes_of",
    "check_determinism",
    "check_idempotence",
    "check_semantics",
    "run_graph",
]

#: A pass as torch knows it: called on a graph module, it returns a ``PassResult``.
Pass = Callable[[fx.GraphModule], PassResult | None]


def bytes_of(inputs: Sequence[Any]) -> list[Any]:
    """The leaves of ``inputs`` in a form in which equal means equal to the bit."""
    leaves = pytree.tree_leaves(list(inputs))
    return [(leaf.dtype, tensor_bytes(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def run_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run the graph on one value per placeholder; one that keeps what it sees, as observers do, is run as a copy.

    A graph with a calling convention of its own, as captures have it, returns its results in a flat list.
    """
    runnable = graph_module
    if keeps_state(graph_module):
        # Observers write to their buffers; parameters are only read, and a copy would double the memory.
        runnable = copy.deepcopy(graph_module, {id(weight): weight for weight in graph_module.parameters()})
    with torch.no_grad():
        if not has_calling_convention(graph_module.graph):
            return runnable(*inputs)
        return pytree.tree_leaves(fx.Interpreter(runnable).run(*inputs, enable_io_processing=False))


def keeps_state(graph_module: fx.GraphModule) -> bool:
    """Whether running the graph may change it: it calls modules, or operators that write to their arguments."""
    for node in graph_module.graph.nodes:
        mutable = isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable
        if node.op == "call_module" or mutable:
            return True
    return False


def apply_pass(rewrite: Pass, graph_module: fx.GraphModule, property_id: str = "P1") -> PassResult:
    """Run the pass in place; a failure other than a refusal breaks ``property_id``."""
    try:
        result = rewrite(graph_module)
    except PassError:
        raise
    except Exception as error:
        message = f"the pass failed: {type(error).__name__}: {error}"
        fail(property_id, message, graph_module)
    if not isinstance(result, PassResult):
        fail("P4", f"the pass returned {result!r} and not a PassResult")
    return result


def check_semantics(
    rewritten: fx.GraphModule, inputs: Sequence[Any], outputs: Any, exact: bool, rtol: float, atol: float
) -> None:
    """P2: the graph returns ``outputs``, to the bit or within the tolerance; P5: in the same structure."""
    try:
        computed = run_graph(rewritten, inputs)
    except Exception as error:
        fail("P1", f"the graph does not run: {type(error).__name__}: {error}", rewritten)
    old, new = pytree.tree_flatten(outputs), pytree.tree_flatten(computed)
    if str(old[1]) != str(new[1]):
        fail("P5", f"the graph returns {new[1]}, it returned {old[1]}", rewritten)
    for index, (expected, actual) in enumerate(zip(old[0], new[0], strict=True)):
        if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
            if expected != actual:
                fail("P2", f"output {index} is {actual!r}, it was {expected!r}", rewritten)
            continue
        if value_signature(expected) != value_signature(actual):
            message = f"output {index} is {value_signature(actual)}, it was {value_signature(expected)}"
            fail("P5", message, rewritten)
        if exact and tensor_bytes(expected) != tensor_bytes(actual):
            fail("P2", f"output {index} differs in its bits by {_distance(expected, actual)}", rewritten)
        if not exact and not torch.allclose(expected, actual, rtol=rtol, atol=atol, equal_nan=True):
            fail("P2", f"output {index} differs by {_distance(expected, actual)}", rewritten)


def _distance(expected: Tensor, actual: Tensor) -> float:
    return float((expected.to(torch.float64) - actual.to(torch.float64)).abs().max())


def check_idempotence(make_pass: Callable[[], Pass], rewritten: fx.GraphModule, after: GraphSnapshot) -> None:
    """P3: a second run changes nothing and reports nothing."""
    again = copy.deepcopy(rewritten)
    result = apply_pass(make_pass(), again, "P3")
    snapshot = GraphSnapshot.of(result.graph_module)
    if snapshot.text != after.text:
        message = f"the second run changed the graph again, at {first_difference(after, snapshot)}"
        fail("P3", message, again)
    if result.modified:
        fail("P3", "the second run reports a change", again)


def check_determinism(rewrite: Pass, graph_module: fx.GraphModule, after: GraphSnapshot) -> None:
    """P8: the instance that gave ``after`` gives its code and state again; it has kept nothing."""
    result = apply_pass(rewrite, copy.deepcopy(graph_module), "P8")
    snapshot = GraphSnapshot.of(result.graph_module)
    if snapshot.code != after.code or snapshot.state != after.state:
        fail("P8", "the same graph gave another code or state this time", result.graph_module)
    if address := re.search(r"0x[0-9a-f]{6,}", after.code):
        fail("P8", f"the code holds a memory address, {address.group()}", graph_module)
