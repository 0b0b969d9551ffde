"""``lower``: from the quantized program to a denoiser, through one of the backends."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tfmq_fx._torch.core import HAS_INTEGER_CONVS, output_structure
from tfmq_fx.artefact.paths import path_of
from tfmq_fx.artefact.tree_specs import load_tree_spec
from tfmq_fx.config.quantization import UnknownTimestep
from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.interface import Interface
from tfmq_fx.frontend.interface_json import interface_from_json, interface_to_json
from tfmq_fx.frontend.roles import sample_inputs
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.lowering.backends.aot import check_package_path, describe_package, load_package
from tfmq_fx.lowering.backends.choose import lower_fastest
from tfmq_fx.lowering.backends.compiling import WHOLE, Kernels, compile_graph, compile_stages, stage_name
from tfmq_fx.lowering.backends.engines import ENGINES, resolve_precision
from tfmq_fx.lowering.backends.native import describe_kernels, sums_bytes_exactly
from tfmq_fx.lowering.examples import example_arguments
from tfmq_fx.lowering.report.eligibility import classify, layers, reads_one_channel, sums_may_overflow
from tfmq_fx.lowering.report.matching import in_float, match_kernels, read_kernels
from tfmq_fx.lowering.report.parity import check_parity
from tfmq_fx.lowering.report.parity_examples import parity_examples
from tfmq_fx.lowering.report.reasons import EAGER, NO_EXACT_BYTES
from tfmq_fx.lowering.report.report import LoweringReport, ReportEntry
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.lowering.run.staged import StagedProgram
from tfmq_fx.lowering.stages import Layout, split_stages
from tfmq_fx.passes import (
    DequantizeWeights,
    FoldWeightZeroPoints,
    IndexTimesteps,
    InlineTimestepRows,
    LowerIndexedConvs,
    StripDeadState,
    TabulateTemporalBlock,
    UseOneTimestepGroup,
)
from tfmq_fx.passes.analysis import ConditionalPart, find_conditional_part, find_temporal_block
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, is_weighted
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers
from tfmq_fx.quantization.convert import program_from_graph
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.stage_checks import describe
from tfmq_fx.quantization.unknown_timesteps import check_unknown_timestep, with_unknown_timestep
from tfmq_fx.temporal.table import store_table

__all__ = ["load_denoiser", "lower"]

decomposed = torch.ops.quantized_decomposed

BACKENDS = ("inductor", "aot", *ENGINES, "auto", "reference")


@in_plain_surroundings
def lower(
    program: QuantizedProgram | fx.GraphModule,
    backend: str = "inductor",
    *,
    tabulate: bool = True,
    reuse: bool = True,
    path: str | Path | None = None,
    precision: str | None = None,
    unknown_timestep: UnknownTimestep | None = None,
) -> Denoiser:
    """Lower a quantized program to kernels and check the result against the reference.

    An integer kernel takes one activation scale a call. So a program with ``activation_groups`` is compiled for
    batches of one timestep group, as sampling has them, and its denoiser splits a batch that mixes groups. Layers that
    depend on the timestep and the conditioning alone, which have parameters per timestep, are computed timestep by
    timestep where ``reuse`` cuts them out; compiled with the rest, they make the denoiser split batches by timestep.

    Args:
        program: The result of :func:`tfmq_fx.convert` or :func:`tfmq_fx.load`, or what ``convert_pt2e``
            returned for a graph prepared with :class:`tfmq_fx.TFMQQuantizer`. It is not changed.
        backend: ``"inductor"``: ``torch.compile`` with frozen weights; ``"aot"``: an AOTInductor package
            at ``path``, loadable without the model's source; ``"openvino"`` and ``"onnxruntime"``: those engines,
            when they are installed (``pip install "tfmq-fx[openvino]"``), compiling each batch size when it first
            comes; ``"auto"``: the fastest of Inductor and those, measured here; ``"reference"``: eager
            quantize/dequantize.
        tabulate: Whether the temporal block is evaluated once per timestep into a table, so that none of
            its layers runs at inference. False keeps it in the graph.
        reuse: Whether what the sample does not reach is kept from call to call: layers that depend on a prompt
            alone run once a prompt, those that depend on the timestep too once a timestep and prompt.
            ``"inductor"`` and ``"aot"`` only; programs with timestep groups run whole.
        path: Where the ``"aot"`` package goes (``.pt2``).
        precision: What passes between integer kernels: ``"bf16"`` or ``"f32"``. Inductor's backends take the first by
            default where our own kernels run (x86 with AVX-512 VNNI), OpenVINO the second.
        unknown_timestep: What a timestep outside the table does: ``"error"`` names it, ``"nearest"`` takes the closest
            one of the table. By default as the program was quantized.

    Returns:
        A denoiser that is called like the original model; ``denoiser.report`` says what runs where.

    Raises:
        LoweringError: The backend is unknown or not installed, it lacks an operator of the program, or the lowered
            program parts from its reference.
    """
    if backend not in BACKENDS:
        msg = f"backend={backend!r} is not supported: use one of {', '.join(map(repr, BACKENDS))}"
        raise LoweringError(msg)
    if backend == "aot" and path is None:
        msg = "backend='aot' needs path=, the .pt2 package to write"
        raise LoweringError(msg)
    narrow = resolve_precision(backend, precision) == "bf16"
    if not isinstance(program, (QuantizedProgram, fx.GraphModule)):
        msg = f"lower needs a quantized program, it was given {describe(program)}"
        raise LoweringError(msg)
    if backend == "aot":
        check_package_path(path_of(path, "a package"))
    if isinstance(program, fx.GraphModule):
        program = program_from_graph(copy.deepcopy(program))
    program = with_unknown_timestep(program, unknown_timestep)
    unknown = program.config.unknown_timestep
    if backend == "auto":
        return _lower_fastest(program, tabulate=tabulate, reuse=reuse)
    reference = _final_graph(program, tabulate=tabulate)
    groups = None if backend == "reference" else _apart(reference)
    lowered = reference if groups is None else _one_group(reference)
    # With groups the example has one timestep.
    indexed = program.indexed
    if groups is not None:
        indexed[program.timestep] = indexed[program.timestep][:1]
    args, kwargs = example_arguments(reference, indexed)
    interface = Interface.of(reference).called_like(program.interface)
    entries, nodes = classify(lowered, program.kept_float), [node.name for node in layers(lowered)]
    if groups is not None and HAS_INTEGER_CONVS and backend not in ENGINES:
        LowerIndexedConvs()(lowered)
        StripDeadState()(lowered)
    if backend in ("inductor", "aot"):
        exact = sums_bytes_exactly()
        entries = entries if exact else in_float(entries, NO_EXACT_BYTES)
        DequantizeWeights(_computed_in_float if exact else is_weighted)(lowered)
        StripDeadState()(lowered)
    samples = {str(node.target) for node in sample_inputs(lowered.graph, program.timestep)}
    part = find_conditional_part(lowered, samples, program.timestep)
    grouped = backend != "reference" and bool(find_grouped_quantizers(reference, (GROUPS,)))
    staged = split_stages(lowered, part) if reuse and backend in ("inductor", "aot") and not grouped else None
    if staged is not None and all(stage.by_row for stage in staged.layout.stages[:-1]):
        # The stages that see timesteps take them one by one by themselves, and what is left has one set of parameters.
        groups = None
    settings = (backend, args, kwargs, path, interface.max_batch, precision)
    run, found = compile_graph(lowered, *settings) if staged is None else compile_stages(lowered, staged, *settings)
    error, floor = 0.0, 0.0
    if found is not None:
        # Against the program as it came in: the rewrites above are checked together with the compiler.
        examples = parity_examples(program.graph_module, program.indexed, program.timestep, alone=groups is not None)
        error, floor = check_parity(run, program.graph_module, examples, narrow=narrow)
    table = program.timesteps
    report = LoweringReport(
        backend=backend,
        entries=_as_compiled(entries, nodes, found),
        temporal_layers=len(find_temporal_block(reference, program.timestep).linears),
        table_rows=0 if table is None else len(table),
        parity_error=error,
        parity_floor=floor,
        conditioning=_conditioning(part, reused=staged is not None),
        temporal_choices=program.temporal_choices,
        kernels=describe_kernels(precision) if backend in ("inductor", "aot") else "",
    )
    if backend == "aot":
        about = {
            "interface": interface_to_json(interface),
            "timestep": program.timestep,
            "result": pytree.treespec_dumps(output_structure(reference.graph)),
            "stages": None if staged is None else staged.layout.to_dict(),
            "report": report.to_dict(),
            "timesteps": None if table is None else table.tolist(),
            "finite": {name: values.tolist() for name, values in program.finite.items()},
            "groups": None if groups is None else groups.tolist(),
            "unknown_timestep": unknown,
        }
        describe_package(Path(str(path)), about)
    return Denoiser(
        run,
        interface,
        timestep=program.timestep,
        timesteps=table,
        groups=groups,
        unknown=unknown,
        report=report,
        finite=program.finite,
    )


@in_plain_surroundings
def load_denoiser(path: str | Path, *, unknown_timestep: UnknownTimestep | None = None) -> Denoiser:
    """Load a package that ``lower(..., backend="aot", path=path)`` wrote; nothing is compiled.

    A package is compiled code: load it only from whom you would run a program of.

    Args:
        path: The package.
        unknown_timestep: As for :func:`lower`; by default as it was lowered.

    Raises:
        ArtefactError: The file is missing, damaged, or not a package of ours.
        ConfigError: ``unknown_timestep`` is not supported.
    """
    check_unknown_timestep(unknown_timestep)
    models, about = load_package(path_of(path, "a package"))
    return Denoiser(
        _run_of(models, about),
        interface_from_json(about["interface"], load_tree_spec),
        timestep=about["timestep"],
        timesteps=None if about["timesteps"] is None else torch.tensor(about["timesteps"], dtype=torch.float64),
        groups=None if about.get("groups") is None else torch.tensor(about["groups"]),
        unknown=unknown_timestep or about["unknown_timestep"],
        report=LoweringReport.from_dict(about["report"]),
        finite={name: torch.tensor(values, dtype=torch.float64) for name, values in about["finite"].items()},
    )


def _run_of(models: Mapping[str, Callable[..., Any]], about: Mapping[str, Any]) -> Callable[..., Any]:
    """What runs the programs of a package."""
    if about.get("stages") is None:
        return models[WHOLE]
    layout = Layout.from_dict(about["stages"])
    runs = [models[stage_name(number)] for number in range(len(layout.stages))]
    return StagedProgram(layout, pytree.treespec_loads(about["result"]), runs)


def _lower_fastest(program: QuantizedProgram, *, tabulate: bool, reuse: bool) -> Denoiser:
    """Lower with every backend and keep the fastest."""

    def lower_with(backend: str, precision: str | None) -> Denoiser:
        return lower(program, backend, tabulate=tabulate, reuse=reuse, precision=precision)

    return lower_fastest(lower_with, *example_arguments(program.graph_module, program.indexed))


def _computed_in_float(layer: fx.Node) -> bool:
    """Whether a layer has quantized operands that Inductor's own integer kernels would get wrong."""
    return reads_one_channel(layer) or sums_may_overflow(layer)


def _final_graph(program: QuantizedProgram, *, tabulate: bool) -> fx.GraphModule:
    """The graph that is compiled: a copy with the temporal block as a table and the lookup written out."""
    graph_module = copy.deepcopy(program.graph_module)
    FoldWeightZeroPoints()(graph_module)
    if tabulate and program.timesteps is not None:
        # A program with parameters per timestep has its row already; then this changes nothing.
        unknown = program.config.unknown_timestep
        IndexTimesteps(program.timesteps, timestep=program.timestep, unknown=unknown)(graph_module)
        TabulateTemporalBlock(timestep=program.timestep)(graph_module)
        store_table(graph_module, program.config)
    InlineTimestepRows()(graph_module)
    StripDeadState()(graph_module)
    return graph_module


def _apart(reference: fx.GraphModule) -> Tensor | None:
    """The group of each timestep, ``[K]``, where kernels take the parameters of one group a call; else None."""
    for name in (EACH_TIMESTEP, GROUPS):
        if find_grouped_quantizers(reference, (name,)):
            groups: Tensor = read_attribute(reference, name)
            return groups
    return None


def _conditioning(part: ConditionalPart, *, reused: bool) -> str:
    """Which layers depend on the conditioning and never on the sample, and how they are computed, in a sentence."""
    looked_up = (decomposed.dequantize_per_tensor.tensor, decomposed.dequantize_per_channel.default)
    indexed = sum(is_call(layer.args[0], *looked_up) for layer in part.joint)
    parameters = f"; {indexed} with parameters per timestep" if indexed else ""
    return f"{part}{parameters}{'; reused from call to call' if reused else ''}"


def _one_group(reference: fx.GraphModule) -> fx.GraphModule:
    """A copy whose activations have the parameters of the batch's one timestep group, as kernels take them."""
    lowered = copy.deepcopy(reference)
    UseOneTimestepGroup()(lowered)
    return lowered


def _as_compiled(entries: list[ReportEntry], nodes: list[str], found: Kernels) -> tuple[ReportEntry, ...]:
    """What :func:`classify` expects, held against the integer kernels that there are."""
    if found is None:
        return tuple(in_float(entries, EAGER))
    return match_kernels(entries, found) if isinstance(found, Counter) else read_kernels(entries, nodes, found)
