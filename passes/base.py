"""The base of every rewrite: torch's ``PassBase`` with a truthful flag and a lint after each run."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tfmq_fx.errors import TfmqError

__all__ = ["GraphPass", "PassError"]


class PassError(TfmqError, RuntimeError):
    """Raised when a graph does not meet what a pass requires; names the pass, the node and a way out."""


class GraphPass(PassBase):
    """One rewrite of an ATen graph: ``SomePass(...)(graph_module) -> PassResult``.

    A subclass sets :attr:`id` and implements :meth:`rewrite`, which edits ``graph_module.graph`` in
    place and returns whether it changed anything. Calling the pass checks :meth:`requires`, runs the
    rewrite, recompiles when it changed something and lints. Instances hold options, never state.
    """

    id: ClassVar[str]

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
