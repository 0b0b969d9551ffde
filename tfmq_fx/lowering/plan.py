"""The plan of a lowering: what is compiled, how it is called, and what is expected of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import output_structure
from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.examples import example_arguments
from tfmq_fx.frontend.interface import Interface
from tfmq_fx.frontend.roles import sample_inputs
from tfmq_fx.lowering.options import BackendSupport, LoweringOptions
from tfmq_fx.lowering.report.eligibility import classify, layers
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.lowering.stages import StagedGraph, split_stages
from tfmq_fx.lowering.time_path import TimePath, cut_time_path, with_float_timesteps
from tfmq_fx.passes import FoldWeightZeroPoints, InlineTimestepRows, StripDeadState, UseOneTimestepGroup
from tfmq_fx.passes.analysis import ConditionalPart, find_conditional_part, find_temporal_block, row_lookups
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, writes_in_place
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.program import TemporalProgram

__all__ = ["GraphRewrite", "LoweringPlan", "folded_graph", "make_plan", "timestep_groups",
           "with_lookups_written_out"]  # fmt: skip

decomposed = torch.ops.quantized_decomposed


@dataclass(frozen=True, eq=False)
class LoweringPlan:
    """Everything that is decided before something is compiled.

    Attributes:
        program: The quantized program, taking float timesteps where it can; what is compiled is compared with it.
        options: What was asked for, the precision resolved.
        graph_module: The graph to compile, rewritten for the backend.
        temporal: What computes the temporal features that it takes; None where the block is in it.
        staged: The same cut into stages; None where it is compiled whole.
        args: Example inputs, a batch of two; of one timestep where :attr:`graph_module` takes one group a call.
        kwargs: Example inputs by name.
        interface: What the denoiser is called with.
        result: The structure of what the graph returns.
        groups: The group of each timestep, int64 ``[K]``, where a call takes timesteps of one group; else None.
        entries: Every layer that multiplies, and where it is expected to run.
        nodes: The names of their nodes.
        temporal_layers: Layers of the temporal block that run at inference.
        conditioning: Which layers depend on the conditioning and never on the sample, in a sentence.
    """

    program: QuantizedProgram
    options: LoweringOptions
    graph_module: fx.GraphModule
    temporal: TemporalProgram | None
    staged: StagedGraph | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    interface: Interface
    result: pytree.TreeSpec
    groups: Tensor | None
    entries: tuple[ReportEntry, ...]
    nodes: tuple[str, ...]
    temporal_layers: int
    conditioning: str

    @property
    def served_timesteps(self) -> Tensor | None:
        """The timesteps that the denoiser looks others up in; None where it takes any and has no use for a table."""
        any_timestep = self.program.config.unknown_timestep == "extend" and not row_lookups(self.program.graph_module)
        return None if self.temporal is None and any_timestep else self.program.timesteps


class GraphRewrite(Protocol):
    """Rewrites the graph of a plan for a backend."""

    def __call__(
        self, graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...], *, one_group: bool
    ) -> tuple[ReportEntry, ...]:
        """Rewrite ``graph_module`` in place, and say what becomes of its layers.

        Args:
            graph_module: The graph, before it is cut into stages.
            entries: Its layers, as they were classified.
            one_group: Whether its activations have the parameters of the batch's one timestep group.
        """


def make_plan(
    program: QuantizedProgram, options: LoweringOptions, support: BackendSupport, rewrite: GraphRewrite
) -> LoweringPlan:
    """Decide what is compiled for a backend that can do ``support``.

    Args:
        program: The quantized program; it is not changed.
        options: What was asked for.
        support: What the backend can do.
        rewrite: The backend's own rewrites.
    """
    program = with_float_timesteps(program) if options.tabulate else program
    reference = folded_graph(program)
    path = cut_time_path(program, reference) if options.tabulate else None
    groups = None if support.mixed_groups else timestep_groups(reference)
    graph_module = with_lookups_written_out(reference) if path is None else path.rest
    if groups is not None:
        graph_module = _with_one_group(graph_module)
    indexed = program.indexed
    if groups is not None:
        indexed[program.timestep] = indexed[program.timestep][:1]
    args, kwargs = example_arguments(reference, indexed)
    interface = Interface.of(reference).called_like(program.interface)
    nodes = tuple(node.name for node in layers(graph_module))
    entries = tuple(classify(graph_module, program.kept_float))
    entries = rewrite(graph_module, entries, one_group=groups is not None)
    samples = {str(node.target) for node in sample_inputs(reference.graph, program.timestep)}
    features = () if path is None else [entry.name for entry in path.temporal.inputs]
    part = find_conditional_part(graph_module, samples, program.timestep, features=features)
    one_group_a_call = groups is not None and bool(find_grouped_quantizers(reference, (GROUPS,)))
    splits = options.reuse and support.stages and not one_group_a_call
    staged, reused = _stages(graph_module, part if splits else None, path)
    if reused and staged is not None and all(stage.by_row for stage in staged.layout.stages[:-1]):
        # The stages that see timesteps take them one by one by themselves, and what is left has one set of parameters.
        groups = None
    return LoweringPlan(
        program=program,
        options=options,
        graph_module=graph_module,
        temporal=None if path is None else path.temporal,
        staged=staged,
        args=args,
        kwargs=kwargs,
        interface=interface,
        result=output_structure(reference.graph),
        groups=groups,
        entries=entries,
        nodes=nodes,
        temporal_layers=len(find_temporal_block(reference, program.timestep).linears) if path is None else 0,
        conditioning=_describe_conditioning(part, reused=reused),
    )


def folded_graph(program: QuantizedProgram) -> fx.GraphModule:
    """A copy of the program's graph with the zero points of weights folded into them."""
    graph_module = copy.deepcopy(program.graph_module)
    FoldWeightZeroPoints()(graph_module)
    StripDeadState()(graph_module)
    return graph_module


def with_lookups_written_out(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that keeps its temporal block, and searches its table of timesteps with the backend's own operators."""
    copied = copy.deepcopy(graph_module)
    InlineTimestepRows()(copied)
    StripDeadState()(copied)
    return copied


def _stages(
    graph_module: fx.GraphModule, part: ConditionalPart | None, path: TimePath | None
) -> tuple[StagedGraph | None, bool]:
    """The stages of a graph, the temporal program the first of them, and whether some depend on the conditioning."""
    first = None if path is None else path.first
    write = next(filter(writes_in_place, graph_module.graph.nodes), None)
    if write is not None:
        # A stage holds what its results read, and nobody reads a write.
        if first is None:
            return None, False
        msg = (
            f"node {write.name!r} ({write.target}) writes into memory that others read, and such a program cannot be "
            "cut behind its temporal block; compute a new value there, or lower it with tabulate=False"
        )
        raise LoweringError(msg)
    staged = split_stages(graph_module, part, first) if part is not None else None
    if staged is not None and len(staged.layout.stages) > (1 if first is None else 2):
        return staged, True
    if first is None:
        return None, False
    whole = split_stages(graph_module, None, first)
    if whole is None:
        msg = "the temporal block of this program cannot be cut out of it; lower it with tabulate=False"
        raise LoweringError(msg)
    return whole, False


def timestep_groups(graph_module: fx.GraphModule) -> Tensor | None:
    """The group of each timestep, int64 ``[K]``, where activations have parameters per group; else None."""
    for name in (EACH_TIMESTEP, GROUPS):
        if find_grouped_quantizers(graph_module, (name,)):
            groups: Tensor = read_attribute(graph_module, name)
            return groups
    return None


def _with_one_group(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose activations have the parameters of the batch's one timestep group, as kernels take them."""
    copied = copy.deepcopy(graph_module)
    UseOneTimestepGroup()(copied)
    return copied


def _describe_conditioning(part: ConditionalPart, *, reused: bool) -> str:
    """Which layers depend on the conditioning and never on the sample, and how they are computed."""
    lookups = (decomposed.dequantize_per_tensor.tensor, decomposed.dequantize_per_channel.default)
    indexed = sum(is_call(layer.args[0], *lookups) for layer in part.joint)
    parameters = f"; {indexed} with parameters per timestep" if indexed else ""
    return f"{part}{parameters}{'; reused from call to call' if reused else ''}"
