r"""Whether the activations of other weights leave kept ranges, and by how much these are widened.

With given batches the range :math:`[l, h]` of a row is held against what the row sees, :math:`[a, b]`. Where

.. math:: \max\left(\frac{l - a}{h - l}, \frac{b - h}{h - l}\right) > \tfrac14

it becomes the union of both. Less is let pass: so far do items leave ranges that were learnt from others, and so much
of the largest values alone costs less to clip than all steps cost to widen.

Noise is no sample of the schedule, but at its first timestep, and drawn conditionings are none of a prompt: on them,
what a range should be cannot be seen. But the program that has the ranges can be run on them too, unrounded. What the
other weights see there is held against what its own see, and where that exceeds it by more than a quarter of its width,
the kept range grows in the same proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.frontend.binding import Call
from tfmq_fx.observers.grouped import nearest_seen
from tfmq_fx.observers.kept import KeptParameters
from tfmq_fx.quantization.activation_quantizers import ActivationQuantizer
from tfmq_fx.quantization.requantization import WidenedRange

__all__ = ["MARGIN", "seen_unrounded", "widen_ranges"]

#: The share of a range's width by which it is left before it is widened.
MARGIN = 0.25

#: Smallest and largest value of each row, ``[R]``; infinite where nothing was seen.
Ends = tuple[Tensor, Tensor]


class _UnroundedRun(fx.Interpreter):
    """Runs a converted graph with its integer weights and float activations, and notes what each quantizer is given."""

    def __init__(self, converted: fx.GraphModule, quantizers: Iterable[ActivationQuantizer]) -> None:
        super().__init__(converted)
        self.quantizers = {quantizer.node: quantizer for quantizer in quantizers}
        self.passed = {node for quantizer in self.quantizers.values() for node in quantizer.dequantizers}
        # The rows of a quantizer's entries are forgotten behind the lookup of its scales.
        lookups: list[Any] = [node.args[1] for node, quantizer in self.quantizers.items() if quantizer.rows is not None]
        self.rows: dict[fx.Node, Tensor | None] = dict.fromkeys(lookups)
        self.seen: dict[fx.Node, Ends] = {}
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what would round an activation passes it on."""
        if n not in self.quantizers and n not in self.passed and n not in self.rows:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n in self.rows:
            self.rows[n] = args[2]
            return super().run_node(n)
        if n in self.quantizers and args[0].numel():
            self._note(self.quantizers[n], args[0])
        return args[0]

    def _note(self, quantizer: ActivationQuantizer, x: Tensor) -> None:
        size, values = len(quantizer.scale), x.detach().to(torch.float32)
        source: Any = quantizer.node.args[1]
        rows = torch.zeros(1, dtype=torch.int64) if quantizer.rows is None else self.rows[source]
        flat = values.reshape(1, -1) if quantizer.rows is None else values.flatten(1)
        low, high = self.seen.get(quantizer.node, (torch.full((size,), torch.inf), torch.full((size,), -torch.inf)))
        assert rows is not None
        self.seen[quantizer.node] = (
            low.scatter_reduce(0, rows, flat.amin(1), "amin"),
            high.scatter_reduce(0, rows, flat.amax(1), "amax"),
        )


@torch.no_grad()
def seen_unrounded(
    converted: fx.GraphModule, kept: Mapping[str, ActivationQuantizer], calls: Iterable[Call]
) -> dict[str, Ends]:
    """What activations of a quantized program span on calls where none of them is rounded, by names of quantizers.

    Args:
        converted: The program's graph.
        kept: Its quantizers by name.
        calls: What to run it on.
    """
    run = _UnroundedRun(converted, kept.values())
    for call in calls:
        run.run(*call.leaves)
    return {name: run.seen[quantizer.node] for name, quantizer in kept.items() if quantizer.node in run.seen}


@torch.no_grad()
def widen_ranges(
    prepared: fx.GraphModule, kept: Iterable[str], reference: Mapping[str, Ends] | None = None
) -> tuple[WidenedRange, ...]:
    """Widen the ranges that a prepared graph keeps where what its observers have seen leaves them, in place.

    A row that saw nothing, a timestep that was not checked, grows as the nearest one that did.

    Args:
        prepared: The graph, its observers behind some calls.
        kept: The targets of the observers that keep ranges.
        reference: What these ranges' own program has seen on the same calls; None holds the ranges themselves against
            what is seen.

    Returns:
        What was widened, the most first.
    """
    widened = []
    for target in kept:
        observer: Any = prepared.get_submodule(target)
        found = _widen(observer, None if reference is None else reference.get(target))
        if found is not None:
            widened.append(found)
    return tuple(sorted(widened, key=lambda entry: -entry.factor))


def _widen(observer: Any, reference: Ends | None) -> WidenedRange | None:
    assert isinstance(observer, KeptParameters)
    low, high = observer.kept_ranges()
    seen_low, seen_high = observer.seen_ranges()
    is_seen = seen_low <= seen_high
    if not bool(is_seen.any()):
        return None
    seen_low, seen_high = _around_zero(seen_low, seen_high)
    bound_low, bound_high = (low, high) if reference is None else _around_zero(*reference)
    # Weights that saw nothing but zeros there say nothing of the range.
    silent = bound_low == bound_high
    bound_low, bound_high = torch.where(silent, low, bound_low), torch.where(silent, high, bound_high)
    nearest, width = nearest_seen(is_seen), bound_high - bound_low
    # A range of zero width says nothing of its neighbours; it becomes what is seen.
    below, above = (
        (beyond / width).nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp_min(0)[nearest]
        for beyond in (bound_low - seen_low, seen_high - bound_high)
    )
    grown = high - low
    empty = (grown == 0) & (seen_low < seen_high)[nearest]
    rows = empty | (torch.maximum(below, above) > MARGIN)
    if not bool(rows.any()):
        return None
    new_low = torch.where(empty, seen_low[nearest], low - below * grown)
    new_high = torch.where(empty, seen_high[nearest], high + above * grown)
    observer.widen(new_low, new_high, rows)
    factor = float(((new_high - new_low) / grown)[rows].max())
    return WidenedRange(observer.subject, int(rows.sum()), len(rows), factor)


def _around_zero(low: Tensor, high: Tensor) -> Ends:
    """Ranges with zero in them, as all that is quantized has; of zero width where nothing was seen."""
    return low.clamp_max(0.0), high.clamp_min(0.0)
