"""A program in stages: what the sample does not reach is computed once per prompt, or per timestep and prompt.

::

    (conditions) ─ per prompt ─▶ values ─┐
    (timestep, conditions, values) ─ per timestep and prompt ─▶ values ─┐
    (all inputs, values) ─ every step ─▶ result
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import SymInt, Tensor, fx

from tfmq_fx.passes.analysis import data_dependence
from tfmq_fx.passes.analysis.conditional_part import ConditionalPart
from tfmq_fx.passes.predicates import node_value
from tfmq_fx.passes.subgraphs import extract_subgraph

__all__ = ["Stage", "split_stages"]


@dataclass(frozen=True)
class Stage:
    """A part of a program.

    Attributes:
        graph_module: Called with ``inputs`` in order; returns ``outputs`` as a tuple.
        inputs: Names of the program's inputs, and of values of earlier stages.
        outputs: Names of the values that later stages read, and of results of the program.
        by_row: Whether row ``n`` of every output depends on row ``n`` of the inputs alone.
        timestep: Name of the input that is the timestep, where rows of one call must share it: kernels take one set
            of activation parameters a call, and those behind it are the timestep's. None where rows may mix.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    by_row: bool
    timestep: str | None = None


def split_stages(graph_module: fx.GraphModule, part: ConditionalPart) -> list[Stage]:
    """Cut a program in front of what the sample reaches; its last stage computes the results.

    Args:
        graph_module: The q/dq graph that is about to be compiled; it is not changed.
        part: Its conditional part.

    Returns:
        Two or three stages in order, or none when no layer would be saved, or a stage cannot be cut out because it
        needs a size that none of its own inputs has.
    """
    prompt, both = part.layers
    cuts = [part.per_prompt] if prompt else []
    cuts += [part.per_timestep if prompt else (*part.per_prompt, *part.per_timestep)] if both else []
    if not cuts:
        return []
    computed = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    constants = {node for node, inputs in data_dependence(graph_module).items() if not inputs} & set(computed)
    timesteps = [n for n in graph_module.graph.nodes if n.op == "placeholder" and str(n.target) == part.timestep]
    rest = set(computed)
    stages: list[Stage] = []
    for cut in cuts:
        rest -= set(cut)
        read = {source for node in [*rest, graph_module.graph.output_node()] for source in node.all_input_nodes}
        frontier = [node for node in cut if node in read]
        if not all(isinstance(node_value(node), Tensor) for node in frontier):
            return []
        stage = _stage(graph_module, set(cut) | constants, frontier)
        apart = next((node.name for node in timesteps if node.name in stage.inputs), None)
        stages.append(replace(stage, timestep=apart))
    results = [node for node in graph_module.graph.output_node().all_input_nodes if node in rest]
    if not results:
        return []
    stages.append(_stage(graph_module, rest, results))
    return [] if any(_takes_sizes(stage) for stage in stages) else stages


def _stage(graph_module: fx.GraphModule, allowed: set[fx.Node], outputs: Sequence[fx.Node]) -> Stage:
    """What ``outputs`` need out of ``allowed``; a size is read off the stage's own inputs instead."""
    members: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node in allowed and node not in members and not isinstance(node_value(node), SymInt):
            members.add(node)
            queue.extend(node.all_input_nodes)
    module, inputs = extract_subgraph(graph_module, members, outputs)
    by_row = _all_by_row([node_value(node) for node in inputs], [node_value(node) for node in outputs])
    return Stage(module, tuple(node.name for node in inputs), tuple(node.name for node in outputs), by_row)


def _all_by_row(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether every tensor has the symbolic batch as its first axis; a 0-dim input goes with every row."""
    leading = [value.shape[0] if value.ndim else None for value in outputs]
    leading += [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.ndim]
    symbols = [size.node.expr if isinstance(size, SymInt) else None for size in leading]
    return bool(symbols) and symbols[0] is not None and symbols[0].is_Symbol and len(set(symbols)) == 1


def _takes_sizes(stage: Stage) -> bool:
    """Whether an input is a size: compiled code would take it for a constant."""
    placeholders = [node for node in stage.graph_module.graph.nodes if node.op == "placeholder"]
    return any(not isinstance(node_value(node), Tensor) for node in placeholders)
