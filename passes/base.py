"""The base of every rewrite: torch's ``PassBase`` with a truthful flag, a promise about numerics and a lint."""

from __future__ import annotations

from abc import abstractmethod
from enum import IntEnum
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tfmq_fx._torch.exclusion import exclusive
from tfmq_fx.errors import TfmqError
from tfmq_fx.passes.observation import observed

__all__ = ["GraphPass", "Numerics", "PassError"]


class PassError(TfmqError, RuntimeError):
    """Raised when a graph does not meet what a pass requires; names the pass, the node and a way out."""


class Numerics(IntEnum):
    """What a rewrite promises about the results of the graph; a smaller number promises more.

    Attributes:
        EXACT: The same bits, NaN and ``-0.0`` included.
        CLOSE: The same operations, but for the order of float sums and the roundings that follow from it.
        CHANGED: Other numbers; the docstring says by how much.
    """

    EXACT = 0
    CLOSE = 1
    CHANGED = 2

    def __str__(self) -> str:
        """The promise in words."""
        return ("equal to the bit", "equal up to float rounding", "changes numerics")[self]


class GraphPass(PassBase):
    """One rewrite of an ATen graph: ``SomePass(...)(graph_module) -> PassResult``.

    A subclass sets :attr:`id` and :attr:`numerics` and implements :meth:`rewrite`, which edits ``graph_module.graph``
    in place and returns whether it changed anything. Calling the pass checks :meth:`requires`, runs the
    rewrite, recompiles when it changed something and lints; :func:`tfmq_fx.passes.observe_passes` can look on.
    Instances hold options, never state.

    Attributes:
        id: ``namespace::verb_noun``, unique among all passes.
        numerics: What the rewrite promises; nothing by default.
    """

    id: ClassVar[str]
    numerics: ClassVar[Numerics] = Numerics.CHANGED

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check the graph, rewrite it, lint it.

        Raises:
            PassError: It is no graph, or one that the pass does not take.
        """
        if not isinstance(graph_module, fx.GraphModule):
            msg = f"{self.id}: a {type(graph_module).__name__} is no fx.GraphModule; capture it with tfmq_fx.capture"
            raise PassError(msg)

        def run() -> PassResult:
            result = PassBase.__call__(self, graph_module)
            assert result is not None
            return result

        # Copies of a graph share its fake tensors, and with them their mode.
        with exclusive():
            return observed(self, graph_module, run)

    @abstractmethod
    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Edit the graph in place; return True exactly when it changed."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise :class:`PassError` unless every computing node knows its value (``meta["val"]``)."""
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                msg = (
                    f"{self.id}: node {node.name!r} ({node.target}) has no meta['val']; "
                    "capture the model with tfmq_fx.capture or torch.export first"
                )
                raise PassError(msg)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the rewrite and recompile when it changed the graph."""
        modified = self.rewrite(graph_module)
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Lint the graph."""
        graph_module.graph.lint()
