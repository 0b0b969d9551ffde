"""The roundings that the widths are tried with: those of GPTQ where it is the default, as the quantized model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.frontend.batches import Batch, bind_batch
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.quantization.layer_outputs import FloatRun
from tfmq_fx.reconstruction.layer_inputs import input_position, takes_rows
from tfmq_fx.reconstruction.layer_rounding import LayerRounding
from tfmq_fx.search.layers import Operand, SearchLayer
from tfmq_fx.search.operand_quantizers import OperandQuantizers
from tfmq_fx.search.widths import Widths

__all__ = ["round_weights"]

#: Items that the layers' inputs are taken from.
MOST_ITEMS = 256
#: Bytes that the moments of the layers that are rounded together take; more layers take further passes over the items.
MOST_BYTES = 2**29


class _InputRun(FloatRun):
    """Runs the float model and shows some layers their inputs, as they are and quantized.

    Args:
        prepared: The calibrated graph.
        quantizers: Of the operands.
        roundings: By layer's node, its roundings, each with the operand of its input and its widths.
        share: The share of a call in all items.
    """

    def __init__(
        self,
        prepared: fx.GraphModule,
        quantizers: OperandQuantizers,
        roundings: dict[fx.Node, list[tuple[LayerRounding, Operand | None, Widths]]],
    ) -> None:
        super().__init__(prepared)
        self.quantizers, self.roundings, self.share = quantizers, roundings, 1.0
        #: What the observers take beside the value, which may be gone when their layer is reached.
        self.further: dict[fx.Node, tuple[Any, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        if n in self.observers:
            self.further[n] = self.fetch_args_kwargs_from_env(n)[0][1:]
        for rounding, operand, widths in self.roundings.get(n, ()):
            original: Tensor = self.fetch_args_kwargs_from_env(n)[0][input_position(n)]
            quantized = original
            if operand is not None:
                quantized = self.quantizers(operand, widths, original, *self.further[operand.observed])
            rounding.see(quantized, original, self.share)
        return super().run_node(n)


@torch.no_grad()
def round_weights(
    prepared: fx.GraphModule,
    layers: Sequence[SearchLayer],
    quantizers: OperandQuantizers,
    batches: Sequence[Batch],
    timestep: str,
    config: ReconstructionConfig,
    *,
    progress: bool,
) -> int:
    """Round the weights that are tried at few bits by GPTQ, each layer behind the float model.

    Args:
        prepared: The calibrated graph.
        layers: The layers; their weights at 6 bits or fewer are rounded.
        quantizers: Hold the roundings.
        batches: Calibration batches.
        timestep: Name of the timestep input.
        config: Has the damping and the seed.
        progress: Whether to draw a progress bar.

    Returns:
        How many weights were rounded.
    """
    calls = list(_first_calls(prepared, batches, timestep))
    wanted = [(layer, operand, widths) for layer in layers for operand, widths in quantizers.narrow(layer)
              if takes_rows(operand.reader)]  # fmt: skip
    groups = list(_together(quantizers, wanted))
    total, disabled = sum(call.batch or 1 for call in calls), not draws_progress(progress)
    for group in track(groups, "rounding weights", disable=disabled, transient=True, console=progress_console()):
        roundings: dict[fx.Node, list[tuple[LayerRounding, Operand | None, Widths]]] = {}
        for layer, operand, widths in group:
            rounding = LayerRounding(operand.reader, quantizers.weight(operand, widths.weight_bits), config.seed)
            source = next((o for o in layer.operands if o.reader is operand.reader and not o.is_weight), None)
            roundings.setdefault(operand.reader, []).append((rounding, source, widths))
        run = _InputRun(prepared, quantizers, roundings)
        for call in calls:
            run.share = (call.batch or 1) / total
            run.run(*call.leaves)
        for entries in roundings.values():
            for rounding, _, _ in entries:
                rounding.finish(config.damping)
    return len(wanted)


def _first_calls(prepared: fx.GraphModule, batches: Sequence[Batch], timestep: str) -> Iterator[Call]:
    """Calls until there are items enough, spread over the batches."""
    step = max(1, len(batches) * _items(prepared, batches, timestep) // MOST_ITEMS)
    for index in range(0, len(batches), step):
        yield bind_batch(interface_of(prepared), index, batches[index], timestep)


def _items(prepared: fx.GraphModule, batches: Sequence[Batch], timestep: str) -> int:
    return bind_batch(interface_of(prepared), 0, batches[0], timestep).batch or 1


def _together(
    quantizers: OperandQuantizers, wanted: Sequence[tuple[SearchLayer, Operand, Widths]]
) -> Iterator[list[tuple[SearchLayer, Operand, Widths]]]:
    """The weights in groups whose moments fit into memory together."""
    group: list[tuple[SearchLayer, Operand, Widths]] = []
    used = 0
    for entry in wanted:
        weight = quantizers.weight_of(entry[1])
        needed = 8 * weight[0].numel() * (weight[0].numel() + len(weight))
        if group and used + needed > MOST_BYTES:
            yield group
            group, used = [], 0
        group.append(entry)
        used += needed
    if group:
        yield group
