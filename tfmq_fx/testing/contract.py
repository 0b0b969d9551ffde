"""The contract that every graph rewrite keeps, checked on one graph.

========  ==========================================================================================
P1        The result lints, recompiles and runs; new state is read by some node.
P2        It computes the same: to the bit, or within a tolerance.
P3        Running the pass again changes nothing and says so.
P4        ``modified`` is true exactly when the canonical text of the graph changed.
P5        Placeholders, output tree, shapes, dtypes and strides stay; every ``meta["val"]`` is right; metadata of
          nodes that stay is untouched; new nodes know the module they belong to, and join no other layer.
P6        Nodes outside the declared region stay as they are.
P7        The example inputs are not changed.
P8        The same graph gives the same code and state when one pass instance is used twice.
========  ==========================================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tfmq_fx.errors import ConfigError

from .graph_checks import (
    check_confinement,
    check_flag,
    check_interface,
    check_metadata,
    check_module_stack,
    check_sources,
    check_values,
    check_well_formed,
)
from .run_checks import Pass, apply_pass, bytes_of, check_determinism, check_idempotence, check_semantics, run_graph
from .snapshot import GraphSnapshot
from .violation import ContractViolation, fail

__all__ = ["ContractViolation", "assert_pass_contract"]


def assert_pass_contract(
    make_pass: Callable[[], Pass],
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    exact: bool = False,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    more_inputs: Sequence[Sequence[Any]] = (),
    confined_to: Callable[[fx.Node], bool] | None = None,
    may_set: Collection[str] = (),
) -> PassResult:
    """Check properties P1 to P8 of a pass on one graph.

    Args:
        make_pass: Makes the pass. It is called several times: a pass that keeps state is found out.
        graph_module: The graph to rewrite; it stays as it is, the pass runs on copies.
        example_inputs: Positional inputs that the graph is run on before and after.
        exact: Whether the outputs must be equal to the bit (for passes that only move or drop nodes).
        rtol: Relative tolerance of the outputs otherwise.
        atol: Absolute tolerance of the outputs otherwise.
        more_inputs: Further inputs to run on, e.g. of another batch size.
        confined_to: Which nodes of the graph the pass may touch; any by default. The output may always follow.
        may_set: Keys of ``node.meta`` that the pass is there to set on nodes that stay.

    Returns:
        The result of the pass, so that a test can look at the rewritten graph.

    Raises:
        ContractViolation: An ``AssertionError`` that names the property and the node.
        PassError: The pass refused the graph; that is no violation.
        ConfigError: ``make_pass`` makes no passes, or there is no graph.
    """
    if isinstance(make_pass, PassBase) or not callable(make_pass):
        msg = (
            f"a contract is checked on passes made anew, not on {make_pass!r}: pass the class, or functools.partial of "
            "it with options"
        )
        raise ConfigError(msg)
    if not isinstance(graph_module, fx.GraphModule):
        msg = f"a contract is checked on an fx.GraphModule, not on a {type(graph_module).__name__}"
        raise ConfigError(msg)
    calls = [tuple(example_inputs), *(tuple(inputs) for inputs in more_inputs)]
    inputs_before = [bytes_of(inputs) for inputs in calls]
    before = GraphSnapshot.of(graph_module)
    allowed = {node.name for node in graph_module.graph.nodes if confined_to is None or confined_to(node)}
    expected = [run_graph(graph_module, inputs) for inputs in calls]

    working = copy.deepcopy(graph_module)
    rewrite = make_pass()
    result = apply_pass(rewrite, working)
    rewritten = result.graph_module
    after = GraphSnapshot.of(rewritten)

    check_well_formed(rewritten, before, after)
    check_flag(result, before, after)
    check_interface(graph_module, rewritten, before)
    check_confinement(rewritten, before, after, allowed)
    check_metadata(rewritten, before, after, frozenset(may_set))
    check_values(rewritten, before, calls[0])
    check_module_stack(rewritten, before, after)
    check_sources(rewritten, before)
    for inputs, outputs in zip(calls, expected, strict=True):
        check_semantics(rewritten, inputs, outputs, exact, rtol, atol)
    if [bytes_of(inputs) for inputs in calls] != inputs_before:
        fail("P7", "the pass or the rewritten graph wrote to the example inputs", rewritten)
    check_idempotence(make_pass, rewritten, after)
    check_determinism(rewrite, graph_module, after)
    return result
