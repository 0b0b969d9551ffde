r"""How far each layer alone moves the prediction: quantized at a width, with all others in float.

For an item the float model's values are computed once and kept; for every layer and width only the nodes behind that
layer are computed again, its operands quantized. So a graph of :math:`L` layers costs about half of :math:`L` forward
passes for each width and item, and nothing is prepared, calibrated or converted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.quantization.fidelity import TimestepFidelity
from tfmq_fx.quantization.layer_outputs import FloatRun
from tfmq_fx.quantization.probes import Probe, float_results
from tfmq_fx.search.layers import Operand, SearchLayer
from tfmq_fx.search.operand_quantizers import OperandQuantizers
from tfmq_fx.search.widths import Widths

__all__ = ["Sensitivities", "measure_sensitivities"]


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What was measured.

    Attributes:
        probes: The items, ``T`` of them, with the float predictions.
        errors: Per layer the squared norms of the differences, float64 ``[options, T]``; infinite where the quantized
            prediction is not finite.
    """

    probes: tuple[Probe, ...]
    errors: tuple[Tensor, ...]

    @cached_property
    def float_predictions(self) -> tuple[TimestepFidelity, ...]:
        """What the float model predicts for each item, as predictions without any error."""
        return tuple(TimestepFidelity.of(p.timestep, p.expected, p.expected) for p in self.probes)

    @property
    def signals(self) -> Tensor:
        """Squared norms of the float predictions, float64 ``[T]``."""
        return torch.tensor([entry.signal**2 for entry in self.float_predictions], dtype=torch.float64)


class _LayerRun(FloatRun):
    """Keeps the float values of all nodes, and computes those behind one layer again.

    Args:
        prepared: The calibrated graph.
        quantizers: Of the operands.
    """

    def __init__(self, prepared: fx.GraphModule, quantizers: OperandQuantizers) -> None:
        super().__init__(prepared)
        self.quantizers = quantizers
        self.garbage_collect_values = False
        self.nodes = list(prepared.graph.nodes)
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.operands: dict[fx.Node, list[Operand]] = {}
        self.widths: Widths | None = None

    def quantized(self, values: Mapping[fx.Node, Any], layer: SearchLayer, widths: Widths) -> list[Tensor]:
        """The results with one layer quantized, from the float ``values`` of all nodes."""
        self.env = dict(values)
        self.widths, self.operands = widths, {}
        for operand in layer.operands:
            self.operands.setdefault(operand.reader, []).append(operand)
        changed: set[fx.Node] = set()
        result: Any = ()
        for node in self.nodes[self.places[layer.nodes[0]] :]:
            if node in self.operands or not changed.isdisjoint(node.all_input_nodes):
                result = self.env[node] = self.run_node(node)
                changed.add(node)
        return float_results(result) if self.nodes[-1] in changed else float_results(self.env[self.nodes[-1]])

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node; those of the layer are quantized."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.widths is None or n not in self.operands:
            return args, kwargs
        given = list(args)
        for operand in self.operands[n]:
            further = [self.env[node] for node in operand.observed.args[1:] if isinstance(node, fx.Node)]
            given[operand.position] = self.quantizers(operand, self.widths, given[operand.position], *further)
        return tuple(given), kwargs


@torch.no_grad()
def measure_sensitivities(
    prepared: fx.GraphModule,
    layers: Sequence[SearchLayer],
    quantizers: OperandQuantizers,
    probes: Sequence[Probe],
    *,
    progress: bool,
) -> Sensitivities:
    """Quantize each layer alone, at each of its widths, and hold the predictions against the float ones.

    Memory: the values of all nodes for one item.

    Args:
        prepared: The calibrated graph; its observers learn nothing.
        layers: The layers.
        quantizers: Of their operands.
        probes: The items.
        progress: Whether to draw a progress bar.
    """
    run = _LayerRun(prepared, quantizers)
    errors = [torch.zeros(len(layer.options), len(probes), dtype=torch.float64) for layer in layers]
    known: list[Probe] = []
    for index, layer_index, values, probe in _visits(run, layers, probes, progress=progress):
        if layer_index == 0:
            known.append(probe)
        layer = layers[layer_index]
        for option, widths in enumerate(layer.options):
            if not widths.is_float:
                results = run.quantized(values, layer, widths)
                found = TimestepFidelity.of(probe.timestep, results, probe.expected)
                errors[layer_index][option, index] = found.difference**2
    return Sensitivities(tuple(known), tuple(errors))


def _visits(
    run: _LayerRun, layers: Sequence[SearchLayer], probes: Sequence[Probe], *, progress: bool
) -> Iterator[tuple[int, int, Mapping[fx.Node, Any], Probe]]:
    """Each item with each layer: the number of both, the item's float values, and the item with its results."""
    pairs = [(index, layer) for index in range(len(probes)) for layer in range(len(layers))]
    values: dict[fx.Node, Any] = {}
    probe = probes[0]
    disabled = not draws_progress(progress)
    for index, layer in track(pairs, "measuring layers", disable=disabled, transient=True, console=progress_console()):
        if layer == 0:
            run.widths = None
            results = float_results(run.run(*probes[index].call.leaves))
            values = dict(run.env)
            probe = replace(probes[index], expected=tuple(value.clone() for value in results))
        yield index, layer, values, probe
