"""Look at every pass that is applied, wherever it is called: leave it out, print the graph behind it, verify it.

``GraphPass.__call__`` goes through :func:`observed`, so nothing has to be patched, and what is observed is a matter
of the context (thread or task) that asked for it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

if TYPE_CHECKING:
    from tfmq_fx.passes.base import GraphPass

__all__ = ["EVERY_PASS", "PRINT_AFTER", "PassApplication", "observe_passes", "observed"]

#: The environment variable that prints graphs: ids of passes between commas, or ``all``.
PRINT_AFTER = "TFMQ_FX_PRINT_AFTER"
#: Stands for every pass where ids of passes to print after are named.
EVERY_PASS = "all"


@dataclass(frozen=True)
class PassApplication:
    """One call of one pass.

    Attributes:
        index: How many passes were applied before it under the same observation; those left out do not count.
        rewrite: The pass, with its options.
        graph_module: The graph, as the pass is given it or as it left it.
        modified: Whether the pass changed the graph; False before it ran.
    """

    index: int
    rewrite: GraphPass
    graph_module: fx.GraphModule
    modified: bool = False

    def __repr__(self) -> str:
        """As printed; the graph alone would fill pages."""
        return f"<PassApplication {self}>"

    def __str__(self) -> str:
        """Number, pass and whether it changed the graph."""
        return f"#{self.index} {self.rewrite.id}{' (modified)' if self.modified else ''}"


#: Is shown a pass and the graph that it is about to get or has just left.
Hook = Callable[[PassApplication], None]


@dataclass(frozen=True)
class _Observation:
    """What one ``observe_passes`` asked for."""

    skip: frozenset[str]
    before: Hook | None
    after: Hook | None
    print_after: frozenset[str]
    verify: bool
    numbers: Iterator[int]


_observations: ContextVar[tuple[_Observation, ...]] = ContextVar("tfmq_fx_pass_observations", default=())


@contextmanager
def observe_passes(
    *,
    skip: Iterable[str] = (),
    before: Hook | None = None,
    after: Hook | None = None,
    print_after: Iterable[str] = (),
    verify: bool = False,
) -> Iterator[None]:
    """Observe every :class:`~tfmq_fx.passes.GraphPass` that is called in this context, wherever the call is made.

    The environment variable ``TFMQ_FX_PRINT_AFTER`` prints without any change of the program. Observations may be
    nested; an outer one sees what an inner one leaves. Other threads are not observed. A pass that a hook calls is
    not observed either.

    Args:
        skip: Ids of passes to leave out, or one: they report that they changed nothing.
        before: Called with each application before the pass runs.
        after: Called with each application after the pass ran.
        print_after: Ids of passes whose graph is printed to stderr when they have run; ``"all"`` for every pass.
        verify: Whether the graph is verified after each pass: it lints, every value recorded in ``meta["val"]`` is
            the one that its node computes, the inputs are the same, and a pass that reports no change made none.

    Raises:
        ConfigError: There is no pass of that id; names near ones.
        PassError: From the call of a pass, when ``verify`` finds the graph wrong behind it.

    Example::

        with observe_passes(skip=["tfmq::fuse_group_norms"], after=print):
            denoiser = tfmq_fx.lower(program)
    """
    # The registry imports every pass, and every pass this module.
    from tfmq_fx.passes.registry import check_pass_ids, ids_of

    skipped, printed = ids_of(skip, "skip"), ids_of(print_after, "print_after")
    check_pass_ids(skipped)
    check_pass_ids(printed - {EVERY_PASS})
    observation = _Observation(skipped, before, after, printed, verify, itertools.count())
    token = _observations.set((*_observations.get(), observation))
    try:
        yield
    finally:
        _observations.reset(token)


def observed(rewrite: GraphPass, graph_module: fx.GraphModule, run: Callable[[], PassResult]) -> PassResult:
    """The result of ``run``, the call of ``rewrite`` on ``graph_module``, seen by the observations of this context."""
    observations = _observations.get()
    printed = _printed_by_environment()
    if not observations and not printed:
        return run()
    if any(rewrite.id in observation.skip for observation in observations):
        return PassResult(graph_module, False)
    numbers = [next(observation.numbers) for observation in observations]
    token = _observations.set(())
    try:
        for number, observation in zip(numbers, observations, strict=True):
            if observation.before is not None:
                observation.before(PassApplication(number, rewrite, graph_module))
        result = _verified(rewrite, graph_module, run) if any(o.verify for o in observations) else run()
        for number, observation in zip(numbers, observations, strict=True):
            if observation.after is not None:
                observation.after(PassApplication(number, rewrite, result.graph_module, bool(result.modified)))
    finally:
        _observations.reset(token)
    requested = printed.union(*(observation.print_after for observation in observations))
    if requested & {rewrite.id, EVERY_PASS}:
        modified = "modified" if result.modified else "unchanged"
        print(f"after {rewrite.id} ({modified}):\n{result.graph_module.graph}", file=sys.stderr, flush=True)
    return result


def _printed_by_environment() -> frozenset[str]:
    """The ids in ``TFMQ_FX_PRINT_AFTER``, checked."""
    names = frozenset(name.strip() for name in os.environ.get(PRINT_AFTER, "").split(",") if name.strip())
    if names - {EVERY_PASS}:
        from tfmq_fx.passes.registry import check_pass_ids

        check_pass_ids(names - {EVERY_PASS}, where=PRINT_AFTER)
    return names


def _verified(rewrite: GraphPass, graph_module: fx.GraphModule, run: Callable[[], PassResult]) -> PassResult:
    # As above: what verifies raises the error that the base defines.
    from tfmq_fx.passes.verification import GraphOutline, verify_pass

    before = GraphOutline.of(graph_module)
    result = run()
    verify_pass(rewrite.id, result, before)
    return result
