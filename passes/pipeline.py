"""A pipeline as a value: an ordered list of passes with a name and a promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.observation import observe_passes
from tfmq_fx.passes.registry import check_pass_ids

__all__ = ["PassMaker", "Pipeline", "pass_class", "run_pipeline"]

#: Makes one pass: its class, or a ``partial`` of its class with options.
PassMaker = Callable[[], GraphPass]


def pass_class(make: PassMaker) -> type[GraphPass]:
    """The class that an entry of a pipeline makes.

    Raises:
        ConfigError: The entry is neither a class of passes nor a ``functools.partial`` of one.
    """
    kind = make.func if isinstance(make, partial) else make
    if not (isinstance(kind, type) and issubclass(kind, GraphPass)):
        msg = f"an entry of a pipeline is a class of GraphPass, or functools.partial of one with options, not {make!r}"
        raise ConfigError(msg)
    return kind


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes that says what it promises; it can be iterated, printed, shortened and run.

    Attributes:
        name: What it is called, in the command line too.
        numerics: What it promises about the results of the graph. Each pass must promise as much.
        about: Why the passes stand in this order.
        passes: What makes each pass, in order: classes, or ``functools.partial`` of classes with options. Passes are
            made anew for each run, so no run leaves anything to the next.
        after: The pipeline that has brought the graph into the form that this one expects; None for any graph.

    Raises:
        ConfigError: A pass promises less than the pipeline, or an entry is no pass.
    """

    name: str
    numerics: Numerics
    about: str
    passes: tuple[PassMaker, ...]
    after: Pipeline | None = None

    def __post_init__(self) -> None:
        for kind in map(pass_class, self.passes):
            if kind.numerics > self.numerics:
                msg = f"the pipeline {self.name!r} is {self.numerics}, and {kind.id} is not: it {_verb(kind.numerics)}"
                raise ConfigError(msg)

    def __iter__(self) -> Iterator[PassMaker]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        """The pipeline as a list: number, id, options, and the first line of each pass's documentation."""
        lines = [f"{self.name} ({self.numerics}): {self.about}"]
        width = max((len(entry) for entry in map(_entry, self.passes)), default=0)
        for number, make in enumerate(self.passes):
            lines.append(f"{number:3} {_entry(make):{width}}  {_summary(pass_class(make))}")
        return "\n".join(lines)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the passes, in order."""
        return tuple(pass_class(make).id for make in self.passes)

    def without(self, *pass_ids: str) -> Pipeline:
        """The pipeline without every occurrence of these passes.

        Raises:
            ConfigError: A pass does not exist, or is not one of this pipeline.
        """
        check_pass_ids(pass_ids)
        if absent := [pass_id for pass_id in pass_ids if pass_id not in self.ids]:
            raise ConfigError(self._absent(absent[0]))
        return replace(self, passes=tuple(make for make in self.passes if pass_class(make).id not in pass_ids))

    def with_options(self, kind: type[GraphPass], **options: Any) -> Pipeline:
        """The pipeline with options for one of its passes, wherever that stands in it.

        Args:
            kind: The class of the pass.
            options: Keywords that it is made with, beside those that it has.

        Raises:
            ConfigError: The pipeline does not have the pass, or the pass not the option.
        """
        if kind.id not in self.ids:
            raise ConfigError(self._absent(kind.id))
        parameters = inspect.signature(kind).parameters
        if unknown := [name for name in options if name not in parameters]:
            msg = f"{kind.id} has no option {unknown[0]!r}; it takes {', '.join(parameters) or 'none'}"
            raise ConfigError(msg)
        makers = (partial(make, **options) if pass_class(make) is kind else make for make in self.passes)
        return replace(self, passes=tuple(makers))

    def run(self, graph_module: fx.GraphModule, *, verify: bool = False) -> bool:
        """Run each pass once, in order, in place.

        Args:
            graph_module: The graph.
            verify: Whether the graph is verified after each pass (:func:`~tfmq_fx.passes.observe_passes`).

        Returns:
            Whether any pass changed the graph.

        Raises:
            PassError: A pass refuses the graph, or ``verify`` finds it wrong behind one.
        """
        if verify:
            with observe_passes(verify=True):
                return run_pipeline(graph_module, self.passes)
        return run_pipeline(graph_module, self.passes)

    def _absent(self, pass_id: str) -> str:
        return f"{pass_id} is no pass of the pipeline {self.name!r}, which has {', '.join(dict.fromkeys(self.ids))}"


def run_pipeline(graph_module: fx.GraphModule, pipeline: Pipeline | Sequence[PassMaker | GraphPass]) -> bool:
    """Run each pass once, in order, in place; return whether any changed the graph.

    Args:
        graph_module: The graph.
        pipeline: A pipeline, or what makes each pass, or passes.

    Raises:
        ConfigError: The pipeline is none, or an entry neither a pass nor what makes one.
        PassError: A pass refuses the graph.
    """
    if not isinstance(pipeline, (Pipeline, Sequence)) or isinstance(pipeline, str):
        msg = f"a pipeline is a Pipeline or a list of passes, not {pipeline!r}; find_pipeline knows those with names"
        raise ConfigError(msg)
    # All are made first: what is no pass is refused before the graph is changed.
    passes = [_made(entry) for entry in pipeline]
    # Every pass runs: ``any`` of a generator would stop at the first change.
    return any([rewrite(graph_module).modified for rewrite in passes])


def _made(entry: PassMaker | GraphPass) -> GraphPass:
    """The pass of an entry."""
    if isinstance(entry, GraphPass):
        return entry
    return entry() if callable(entry) else pass_class(entry)()


def _entry(make: PassMaker) -> str:
    options = make.keywords if isinstance(make, partial) else {}
    listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{pass_class(make).id}({listed})" if listed else pass_class(make).id


def _summary(kind: type[GraphPass]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _verb(numerics: Numerics) -> str:
    return str(numerics) if numerics is Numerics.CHANGED else f"is {numerics}"
