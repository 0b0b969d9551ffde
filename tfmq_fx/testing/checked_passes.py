"""Hold the passes of a whole program to their contract, as they are applied."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tfmq_fx.passes.base import Numerics
from tfmq_fx.passes.observation import PassApplication, observe_passes

from .bisect import values_of_inputs
from .contract import assert_pass_contract

__all__ = ["check_passes"]


@contextmanager
def check_passes(
    inputs: Mapping[str, Any] | Sequence[Any], *, rtol: float = 1e-3, atol: float = 1e-3
) -> Iterator[list[str]]:
    """Check the contract (:func:`assert_pass_contract`) of every pass that is applied in this context.

    A pass is held to its own promise: equal to the bit, within the tolerances, or any numbers at all. It runs several
    times on copies of its graph, so this takes some ten times as long as the passes alone.

    Args:
        inputs: Tensors by name of the placeholders, or in their order. A graph with other placeholders is not
            checked.
        rtol: Relative tolerance of passes that promise results equal up to float rounding.
        atol: Absolute tolerance of them.

    Yields:
        A list that fills with the ids of the passes that were checked, in order.

    Raises:
        ContractViolation: From the call of a pass that breaks its contract.
    """
    checked: list[str] = []

    def check(application: PassApplication) -> None:
        values = values_of_inputs(application.graph_module, inputs)
        if values is None:
            return
        rewrite = application.rewrite
        checked.append(rewrite.id)
        free = rewrite.numerics is Numerics.CHANGED
        assert_pass_contract(
            lambda: copy.copy(rewrite),
            application.graph_module,
            values,
            exact=rewrite.numerics is Numerics.EXACT,
            rtol=rtol,
            atol=math.inf if free else atol,
        )

    with observe_passes(before=check):
        yield checked
