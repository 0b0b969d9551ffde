"""What a backend is: its name, what it needs, what it can do, and how it makes a program run."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from tfmq_fx.errors import ArtefactError, LoweringError
from tfmq_fx.lowering.backends.compiled import CompiledGraphs, GraphToCompile, checked_compiled
from tfmq_fx.lowering.options import BackendSupport, LoweringOptions
from tfmq_fx.lowering.plan import LoweringPlan, make_plan
from tfmq_fx.lowering.report.matching import IntegerKernels
from tfmq_fx.lowering.report.parity import check_parity
from tfmq_fx.lowering.report.parity_examples import parity_examples
from tfmq_fx.lowering.report.report import LoweringReport, ReportEntry
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.lowering.run.staged import StagedProgram, stage_inputs
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["WHOLE", "Backend", "CompiledGraphs", "CompilerBackend", "GraphToCompile", "stage_name"]

#: What a program is called that was not cut into stages.
WHOLE = "model"


def stage_name(number: int) -> str:
    """What a stage is called."""
    return f"stage_{number}"


def _is_installed(name: str) -> bool:
    """Whether a package is there, or a module in one: asking for that imports the packages around it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


class Backend(ABC):
    """What :func:`tfmq_fx.lower` can be asked for by name. One that compiles is a :class:`CompilerBackend`.

    Attributes:
        name: What it is asked for by.
        title: Its name in messages.
        summary: What it is, in a line.
        requires: The packages that it imports when it is used; a tuple, one name each.
        extra: What pip installs to have them, such as ``"tfmq-fx[openvino]"``.
        package_suffix: How the files end that it writes to ``path``; None where it writes none.
        automatic: Whether ``backend="auto"`` tries it; never where it writes a package.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    package_suffix: ClassVar[str | None] = None
    automatic: ClassVar[bool] = True

    @property
    def precisions(self) -> tuple[str, ...]:
        """What can pass between its integer kernels on this machine, the default first; empty where none is chosen."""
        return ()

    def missing_packages(self) -> list[str]:
        """The packages that it requires and that are not installed."""
        return [name for name in self.requires if not _is_installed(name)]

    def check(self, options: LoweringOptions) -> LoweringOptions:
        """Refuse what it cannot do before anything is computed; return the options with the precision resolved.

        Raises:
            LoweringError: A package is missing, ``path`` has no use or is not what it needs, or it lacks the precision.
        """
        path, suffix = options.path, self.package_suffix
        if suffix is not None and (path is None or path.suffix != suffix):
            given = "" if path is None else f", and {str(path)!r} does not end in {suffix}"
            msg = f"backend={self.name!r} needs path=, the {suffix} package to write{given}"
            raise LoweringError(msg)
        if path is not None and suffix is None:
            msg = f"backend={self.name!r} writes no package: leave path={str(path)!r} out, or use 'aot'"
            raise LoweringError(msg)
        resolved = replace(options, precision=self.resolve_precision(options.precision))
        if missing := self.missing_packages():
            wanted = f'"{self.extra}"' if self.extra else " ".join(missing)
            msg = f"backend={self.name!r} needs {' and '.join(missing)}: pip install {wanted}"
            raise LoweringError(msg)
        return resolved

    def resolve_precision(self, precision: str | None) -> str:
        """What passes between its kernels: ``precision``, or its default.

        Raises:
            LoweringError: It does not have it; the message names what it has.
        """
        supported = self.precisions
        if precision is not None and precision not in supported:
            choices = f"use one of {', '.join(map(repr, supported))}" if supported else "it takes none"
            msg = f"precision={precision!r} is not supported by backend={self.name!r}: {choices}"
            raise LoweringError(msg)
        return precision or next(iter(supported), "f32")

    @abstractmethod
    def lower(self, program: QuantizedProgram, options: LoweringOptions) -> Denoiser:
        """Make a denoiser of ``program``.

        Args:
            program: The quantized program; it is not changed.
            options: What :meth:`check` returned.

        Raises:
            LoweringError: It lacks an operator of the program, or what it made parts from the program.
        """

    def recognizes(self, path: Path) -> bool:
        """Whether the file at ``path`` is a package that it wrote."""
        return False

    def load(self, path: Path, unknown_timestep: str | None) -> Denoiser:
        """Load a package that it wrote; None for ``unknown_timestep`` leaves it as it was lowered.

        Raises:
            ArtefactError: It cannot be loaded.
        """
        msg = f"{path} cannot be loaded: backend={self.name!r} writes no packages"
        raise ArtefactError(msg)


class CompilerBackend(Backend):
    """A backend that compiles graphs: a subclass says what it supports and compiles; the rest is the same for all.

    Attributes:
        support: What it can do.
    """

    support: ClassVar[BackendSupport] = BackendSupport()

    @abstractmethod
    def compile_graphs(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        """Compile.

        Args:
            graphs: The whole program, or its stages where it supports them.
            plan: What they belong to, with the precision and the path to write to.

        Raises:
            LoweringError: It lacks an operator, or its compiler fails.
        """

    def rewrite(
        self, graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...], *, one_group: bool
    ) -> tuple[ReportEntry, ...]:
        """Its own rewrites of the graph (:class:`tfmq_fx.lowering.plan.GraphRewrite`); by default none."""
        return entries

    def describe_kernels(self, precision: str) -> str:
        """Whose integer kernels it uses here, where that is not plain from its name."""
        return ""

    def finish(self, plan: LoweringPlan, report: LoweringReport) -> None:
        """Called at the end: a backend that writes a package adds what loading it needs."""

    def lower(self, program: QuantizedProgram, options: LoweringOptions) -> Denoiser:
        """Plan, compile, compare and report."""
        plan = make_plan(program, options, self.support, self.rewrite)
        run, kernels = self.compile(plan)
        report = self.report(plan, run, kernels)
        self.finish(plan, report)
        return Denoiser(
            run,
            plan.interface,
            timestep=program.timestep,
            timesteps=plan.served_timesteps,
            groups=plan.groups,
            unknown=program.config.lookup,
            temporal=plan.temporal,
            report=report,
            finite=program.finite,
        )

    def compile(self, plan: LoweringPlan) -> tuple[Callable[..., Any], IntegerKernels]:
        """Compile a plan: the whole graph, or each of its stages that does not run by itself."""
        staged = plan.staged
        if staged is None:
            compiled = self._compiled([GraphToCompile(WHOLE, plan.graph_module, plan.args, plan.kwargs)], plan)
            return compiled.runs[0], compiled.kernels
        inputs = stage_inputs(staged, plan.args, plan.kwargs)
        graphs = {
            number: GraphToCompile(stage_name(number), graph_module, inputs[number], {})
            for number, graph_module in enumerate(staged.graph_modules)
            if number not in staged.runs
        }
        compiled = self._compiled(list(graphs.values()), plan)
        runs = {**staged.runs, **dict(zip(graphs, compiled.runs, strict=True))}
        in_order = [runs[number] for number in range(len(staged.layout.stages))]
        return StagedProgram(staged.layout, plan.result, in_order, own=tuple(staged.runs)), compiled.kernels

    def _compiled(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        return checked_compiled(self.compile_graphs(graphs, plan), len(graphs), self.name)

    def report(self, plan: LoweringPlan, run: Callable[..., Any], kernels: IntegerKernels) -> LoweringReport:
        """Hold what was compiled against what was expected, and against the program itself.

        Raises:
            LoweringError: Its results part from the program's.
        """
        program, precision = plan.program, plan.options.precision or ""
        error, floor = 0.0, 0.0
        if self.support.compared:
            # Against the program as it came in: the rewrites of the plan are checked together with the compiler.
            examples = parity_examples(
                program.graph_module, program.indexed, program.timestep, one_timestep=plan.groups is not None
            )
            error, floor = check_parity(run, program.graph_module, examples, narrow=precision == "bf16")
        return LoweringReport(
            backend=self.name,
            entries=kernels.match(plan.entries, plan.nodes),
            temporal_layers=plan.temporal_layers,
            table_rows=0 if program.timesteps is None else len(program.timesteps),
            parity_error=error,
            parity_floor=floor,
            conditioning=plan.conditioning,
            temporal_choices=program.temporal_choices,
            kernels=self.describe_kernels(precision),
            fidelity=program.fidelity,
        )
