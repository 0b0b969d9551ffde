"""What an engine is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Arrays", "Engine", "Step", "Unavailable"]

Arrays = Mapping[str, np.ndarray]
Step = Callable[[Arrays], np.ndarray]


class Unavailable(Exception):
    """The engine cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        environment: ``"project"``, or the name of an environment of ``make bench-peers``.
        module: Of ``latency_engines``.
        settings: What the module's functions are given.
        arithmetic: The narrowest arithmetic of its convolutions, whose ceiling its time is held against.
        dynamic: Whether what it compiles serves every batch.
        wrong: Relative error to eager float32 above which its output is wrong.
    """

    environment: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: str = "float32"
    dynamic: bool = False
    wrong: float = 0.15

    @property
    def prepared(self) -> str:
        """What ``prepare`` makes: engines of the same name here share its files."""
        return "-".join([self.module, *(str(self.settings[k]) for k in ("model", "weight_bits") if k in self.settings)])

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the engine's module; None where it has none."""
        module = importlib.import_module(f"latency_engines.{self.module}")
        return getattr(module, function)(*arguments) if hasattr(module, function) else None
