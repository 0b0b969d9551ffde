"""A program in stages: what the sample does not reach is computed once per prompt, or per timestep and prompt.

::

    (timestep, labels) ─ temporal program ─▶ features, timestep groups ─┐
    (conditions) ─ per prompt ─▶ values ─┐
    (timestep, conditions, values) ─ per timestep and prompt ─▶ values ─┐
    (all inputs, values) ─ every step ─▶ result
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import decomposed
from tfmq_fx._torch.tensors import depends_on_data
from tfmq_fx.passes.analysis import data_dependence
from tfmq_fx.passes.analysis.conditional_part import ConditionalPart
from tfmq_fx.passes.support.item_columns import REPEATS
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.subgraphs import extract_subgraph
from tfmq_fx.passes.temporal.group_timesteps import GROUPS_INPUT

__all__ = ["FirstStage", "Layout", "Stage", "StageRun", "StagedGraph", "split_stages"]

aten = torch.ops.aten
#: What quantizes by rows of a table.
BY_ROWS = (decomposed.quantize_per_channel.default, decomposed.dequantize_per_channel.default)
#: Runs a stage: called with its inputs, it returns its outputs as a tuple.
StageRun = Callable[..., Any]


@dataclass(frozen=True)
class Stage:
    """What a part of a program is called with, and what it returns as a tuple.

    Attributes:
        inputs: Names of the program's inputs, and of values of earlier stages.
        outputs: Names of the values that later stages read, and of results of the program.
        by_row: Whether item ``n`` of every output depends on item ``n`` of the inputs alone; a field of package files.
        timestep: Name of the input that is the timestep, where the items of one call must share it: kernels take one
            set of activation parameters a call, and those behind it are the timestep's. None where they may mix.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    by_row: bool
    timestep: str | None = None


@dataclass(frozen=True)
class Layout:
    """How the stages of a program go together.

    Attributes:
        inputs: Names of the program's inputs, in order.
        stages: Its stages, in order.
        results: Names of the values that it returns, flat; None where it returns None.
    """

    inputs: tuple[str, ...]
    stages: tuple[Stage, ...]
    results: tuple[str | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`, also after a way through JSON, which has no tuples."""
        stages = (Stage(tuple(s["inputs"]), tuple(s["outputs"]), s["by_row"], s["timestep"]) for s in values["stages"])
        return cls(tuple(values["inputs"]), tuple(stages), tuple(values["results"]))


@dataclass(frozen=True)
class StagedGraph:
    """A graph that was cut into stages.

    Attributes:
        layout: How they go together.
        graph_modules: One for each stage.
        runs: By position, what runs a stage in place of compiled code, and keeps its values itself: no backend gets
            its graph, so that such a stage may stand in front of any.
    """

    layout: Layout
    graph_modules: tuple[fx.GraphModule, ...]
    runs: Mapping[int, StageRun] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FirstStage:
    """A stage that was cut out before, and runs by itself: the temporal program.

    Attributes:
        stage: Its outputs are the last inputs of the graph that is left.
        graph_module: Its graph.
        run: What runs it, and keeps its values.
    """

    stage: Stage
    graph_module: fx.GraphModule
    run: StageRun


def split_stages(
    graph_module: fx.GraphModule, part: ConditionalPart | None, first: FirstStage | None = None
) -> StagedGraph | None:
    """Cut a program in front of what the sample reaches; its last stage computes the results.

    Args:
        graph_module: The q/dq graph that is about to be compiled; it is not changed.
        part: Its conditional part; None leaves the graph in one piece.
        first: The stage that stands in front of it.

    Returns:
        The stages, or None when no layer would be saved and there is no ``first``, or a stage cannot be cut out because
        it needs a size that none of its own inputs has.
    """
    prompt, both = (0, 0) if part is None else part.layers
    cuts: list[tuple[fx.Node, ...]] = []
    if part is not None:
        cuts += [part.per_prompt] if prompt else []
        cuts += [part.per_timestep if prompt else (*part.per_prompt, *part.per_timestep)] if both else []
    returned = pytree.tree_leaves(graph_module.graph.output_node().args[0])
    if not (cuts or first) or any(not isinstance(leaf, fx.Node | None) for leaf in returned):
        return None
    computed = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    constants = {node for node, inputs in data_dependence(graph_module).items() if not inputs} & set(computed)
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    timesteps = _distinguishing_timesteps(inputs, part, first)
    rest = set(computed)
    stages: list[tuple[Stage, fx.GraphModule]] = []
    gathers = _gathered_parameters(computed)
    for cut in cuts:
        rest -= set(cut) - gathers
        read = {source for node in [*rest, graph_module.graph.output_node()] for source in node.all_input_nodes}
        frontier = [node for node in cut if node in read and node not in gathers]
        if not all(isinstance(node_value(node), Tensor) for node in frontier):
            return None
        stages.append(_stage(graph_module, set(cut) | constants, frontier, timesteps))
    results = [node for node in graph_module.graph.output_node().all_input_nodes if node in rest]
    if not results:
        return None
    stages.append(_stage(graph_module, rest, results))
    if any(_takes_sizes(module) for _, module in stages):
        return None
    computed_before = () if first is None else first.stage.outputs
    if first is not None:
        stages.insert(0, (first.stage, first.graph_module))
    layout = Layout(
        tuple(node.name for node in inputs if node.name not in computed_before),
        tuple(stage for stage, _ in stages),
        tuple(leaf.name if isinstance(leaf, fx.Node) else None for leaf in returned),
    )
    runs = {} if first is None else {0: first.run}
    return StagedGraph(layout, tuple(module for _, module in stages), runs)


def _gathered_parameters(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The rows of tables that quantizers read: each stage gathers its own, because kernels take tables and row numbers.

    They cost nothing next to a layer. What crosses stages is the row of each item, one number for all tables.
    """
    gathers: set[fx.Node] = set()
    for node in nodes:
        for parameter in node.args[1:3] if is_call(node, *BY_ROWS) else ():
            if not is_call(parameter, aten.index_select.default):
                continue
            gathers.add(parameter)
            index: Any = parameter.args[2]
            while is_call(index, *REPEATS):
                gathers.add(index)
                index = index.args[0]
    return gathers


def _distinguishing_timesteps(
    inputs: Sequence[fx.Node], part: ConditionalPart | None, first: FirstStage | None
) -> list[fx.Node]:
    """The inputs that tell timesteps with parameters of their own apart: with a ``first`` stage, their groups."""
    if first is not None:
        return [node for node in inputs if GROUPS_INPUT in node.meta]
    return [node for node in inputs if part is not None and str(node.target) == part.timestep]


def _stage(
    graph_module: fx.GraphModule,
    allowed: set[fx.Node],
    outputs: Sequence[fx.Node],
    timesteps: Sequence[fx.Node] = (),
) -> tuple[Stage, fx.GraphModule]:
    """What ``outputs`` need out of ``allowed``; a size is read off the stage's own inputs instead.

    One of ``timesteps`` that is among its inputs keeps items of other timesteps apart.
    """
    members: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node in allowed and node not in members and not _is_read_off(node_value(node)):
            members.add(node)
            queue.extend(node.all_input_nodes)
    module, inputs = extract_subgraph(graph_module, members, outputs)
    by_row = _is_per_item([node_value(node) for node in inputs], [node_value(node) for node in outputs])
    names = tuple(node.name for node in inputs), tuple(node.name for node in outputs)
    return Stage(*names, by_row, next((node.name for node in timesteps if node in inputs), None)), module


def _is_read_off(value: Any) -> bool:
    """Whether a value is a size that inputs have; one that depends on what is in a tensor has to be computed."""
    return isinstance(value, SymInt) and not depends_on_data(value)


def _is_per_item(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether every tensor has the symbolic batch as its first axis; a 0-dim input goes with every item."""
    leading = [value.shape[0] if value.ndim else None for value in outputs]
    leading += [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.ndim]
    symbols = [size.node.expr if isinstance(size, SymInt) else None for size in leading]
    return bool(symbols) and symbols[0] is not None and symbols[0].is_Symbol and len(set(symbols)) == 1


def _takes_sizes(graph_module: fx.GraphModule) -> bool:
    """Whether an input is a size: compiled code would take it for a constant."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return any(not isinstance(node_value(node), Tensor) for node in placeholders)
