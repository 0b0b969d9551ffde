"""The error that names the broken property."""

from __future__ import annotations

from typing import NoReturn

from torch import fx

__all__ = ["PROPERTIES", "ContractViolation", "fail"]

PROPERTIES = {
    "P1": "well formed",
    "P2": "semantics",
    "P3": "idempotence",
    "P4": "truthful flag",
    "P5": "interface",
    "P6": "confinement",
    "P7": "no input mutation",
    "P8": "determinism",
}


class ContractViolation(AssertionError):
    """A pass broke its contract.

    Attributes:
        property_id: ``"P1"`` to ``"P8"``.
    """

    def __init__(self, property_id: str, message: str, graph_module: fx.GraphModule | None = None) -> None:
        graph = f"\n{graph_module.graph}" if graph_module is not None else ""
        super().__init__(f"{property_id} {PROPERTIES[property_id]}: {message}{graph}")
        self.property_id = property_id


def fail(property_id: str, message: str, graph_module: fx.GraphModule | None = None) -> NoReturn:
    """Raise the violation of ``property_id``, with the graph written below the message."""
    raise ContractViolation(property_id, message, graph_module)
