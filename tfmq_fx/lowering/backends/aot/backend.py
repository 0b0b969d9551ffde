"""AOTInductor as a backend: it compiles what Inductor compiles, into a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tfmq_fx._torch import pytree
from tfmq_fx.artefact.temporal_program import store_temporal_program
from tfmq_fx.artefact.tree_specs import load_tree_spec
from tfmq_fx.frontend.graph_export import export_graph
from tfmq_fx.frontend.interface_json import interface_from_json, interface_to_json
from tfmq_fx.lowering.backends.aot.package import (
    Package,
    check_package_path,
    compile_package,
    describe_package,
    is_package,
    load_models,
    load_package,
    staged_package,
)
from tfmq_fx.lowering.backends.backend import WHOLE, CompiledGraphs, GraphToCompile, stage_name
from tfmq_fx.lowering.backends.inductor.backend import InductorBackend
from tfmq_fx.lowering.backends.inductor.compiler import compiler_errors
from tfmq_fx.lowering.backends.inductor.native import on_native_kernels
from tfmq_fx.lowering.options import LoweringOptions
from tfmq_fx.lowering.plan import LoweringPlan
from tfmq_fx.lowering.report.matching import KernelsByModule
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.lowering.run.staged import StagedProgram
from tfmq_fx.lowering.stages import Layout
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["AotBackend"]


class AotBackend(InductorBackend):
    """Inductor's kernels in a package that is loaded without the model's source and without a compiler."""

    name, title = "aot", "AOTInductor"
    summary = "a package of compiled code, kept for the next time"
    package_suffix = ".pt2"

    def check(self, options: LoweringOptions) -> LoweringOptions:
        """Find out too whether the package can be written, before minutes of compiling."""
        resolved = super().check(options)
        check_package_path(_path_in(resolved))
        return resolved

    def lower(self, program: QuantizedProgram, options: LoweringOptions) -> Denoiser:
        """Write the package beside its place: a failure leaves what was there."""
        with staged_package(_path_in(options)) as path:
            return super().lower(program, replace(options, path=path))

    def compile_graphs(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        """Compile all graphs into one package."""
        path, precision, max_batch = _path_in(plan.options), plan.options.precision, plan.interface.max_batch
        native = {graph.name: on_native_kernels(graph.graph_module, precision) for graph in graphs}
        with compiler_errors():
            programs = {
                graph.name: export_graph(native[graph.name], graph.args, graph.kwargs, max_batch) for graph in graphs
            }
            counts = compile_package(programs, path).counts
            models = load_models(path)
        return CompiledGraphs(tuple(models[graph.name] for graph in graphs), KernelsByModule(counts))

    def finish(self, plan: LoweringPlan, report: LoweringReport) -> None:
        """Write beside the code how its programs go together and are called."""
        program, temporal = plan.program, None
        files: dict[str, bytes] = {}
        if plan.temporal is not None:
            stored, files = store_temporal_program(plan.temporal)
            temporal = stored.to_json()
        manifest = {
            "interface": interface_to_json(plan.interface),
            "timestep": program.timestep,
            "result": pytree.treespec_dumps(plan.result),
            "stages": None if plan.staged is None else plan.staged.layout.to_dict(),
            "temporal": temporal,
            "report": report.to_dict(),
            "timesteps": None if plan.served_timesteps is None else plan.served_timesteps.tolist(),
            "finite": {name: values.tolist() for name, values in program.finite.items()},
            "groups": None if plan.groups is None else plan.groups.tolist(),
            "unknown_timestep": program.config.unknown_timestep,
        }
        describe_package(_path_in(plan.options), manifest, files)

    def recognizes(self, path: Path) -> bool:
        """Whether the file has our description in it."""
        return is_package(path)

    def load(self, path: Path, unknown_timestep: str | None) -> Denoiser:
        """Load a package; nothing is compiled.

        Raises:
            ArtefactError: The file is missing, damaged, not a package of ours, or for another machine.
        """
        policy: Any = unknown_timestep
        package = load_package(path, policy)
        manifest = package.manifest
        timesteps, groups = manifest.timesteps, manifest.groups
        unknown = unknown_timestep or manifest.unknown_timestep
        return Denoiser(
            _assemble(package),
            interface_from_json(manifest.interface, load_tree_spec),
            timestep=manifest.timestep,
            timesteps=None if timesteps is None else torch.tensor(timesteps, dtype=torch.float64),
            groups=None if groups is None else torch.tensor(groups),
            unknown="nearest" if unknown == "nearest" else "error",
            temporal=package.temporal,
            report=LoweringReport.from_dict(manifest.report),
            finite={name: torch.tensor(values, dtype=torch.float64) for name, values in manifest.finite.items()},
        )


def _path_in(options: LoweringOptions) -> Path:
    assert options.path is not None  # Backend.check asks for one
    return options.path


def _assemble(package: Package) -> Callable[..., Any]:
    """What runs the programs of a package."""
    if package.manifest.stages is None:
        return package.models[WHOLE]
    layout = Layout.from_dict(package.manifest.stages)
    own = () if package.temporal is None else (0,)
    runs = [
        package.temporal if number in own and package.temporal is not None else package.models[stage_name(number)]
        for number in range(len(layout.stages))
    ]
    return StagedProgram(layout, pytree.treespec_loads(package.manifest.result), runs, own=own)
