r"""Layer error: the signal-to-quantization-noise ratio of every weighted layer's output.

.. math:: SQNR = 20 \log_{10}(\lVert x \rVert / \lVert x - \hat x \rVert) \text{ dB}

*Accumulated*, as the net runs: a layer has the error of all layers before it, too. *Local*: every layer reads
what the float net computes, so only its own quantization, and that of what lies between it and the
layers before it, is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.diagnostics.graph_runs import run_graph
from tfmq_fx.diagnostics.json_values import number
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.quantization.layer_outputs import match_layers
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["LayerError", "LayerErrors", "layer_errors", "match_layers"]

Flavour = Literal["accumulated", "local"]


@dataclass(frozen=True)
class LayerError:
    """One layer: its name, and the norms of its float output and of the error over all batches."""

    name: str
    signal: float
    error: float

    @property
    def sqnr(self) -> float:
        """Decibels: ``20 log10(signal / error)``; infinite without an error."""
        if self.error == 0:
            return math.inf
        return 20 * math.log10(self.signal / self.error) if self.signal > 0 else -math.inf


@dataclass(frozen=True)
class LayerErrors:
    """The errors of all weighted layers, in the order in which the float net runs them.

    Attributes:
        flavour: ``"accumulated"`` or ``"local"``.
        layers: One entry per layer that both graphs have.
        unmatched: Layers that only one of the graphs has, or in another number.
        rows: How many samples they are measured on.
    """

    flavour: Flavour
    layers: tuple[LayerError, ...]
    unmatched: tuple[str, ...] = ()
    rows: int = 0

    def worst(self, count: int = 5) -> list[LayerError]:
        """The layers with the lowest ratio, the worst first."""
        return sorted(self.layers, key=lambda layer: layer.sqnr)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``sqnr`` is there for readers of the file."""
        layers = [
            {"name": x.name, "signal": number(x.signal), "error": number(x.error), "sqnr": number(x.sqnr)}
            for x in self.layers
        ]
        return {"flavour": self.flavour, "rows": self.rows, "unmatched": list(self.unmatched), "layers": layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerErrors:
        """The inverse of :meth:`to_dict`."""
        layers = (LayerError(x["name"], float(x["signal"]), float(x["error"])) for x in values["layers"])
        return cls(values["flavour"], tuple(layers), tuple(values["unmatched"]), values["rows"])


@in_plain_surroundings
def layer_errors(
    captured: fx.GraphModule,
    quantized: fx.GraphModule | QuantizedProgram,
    batches: Iterable[Batch],
    *,
    flavour: Flavour = "accumulated",
    on_batch: Callable[[], None] | None = None,
) -> LayerErrors:
    """Measure every weighted layer's error by running both graphs on the same batches.

    Args:
        captured: The float graph.
        quantized: A quantized program, or a graph of the same model.
        batches: The model's own inputs, each a tuple, a mapping by argument name, or a single tensor.
        flavour: ``"accumulated"``, as the net runs, or ``"local"``, every layer on float inputs.
        on_batch: Called after every batch.

    Returns:
        Norms over all batches, in float64. All weighted layers' float outputs of one batch are in memory at once.

    Raises:
        ConfigError: The flavour is unknown, there is no batch, it does not fit, or no layer corresponds.
        TimestepError: A batch has a timestep that the program does not serve.
    """
    if flavour not in get_args(Flavour):
        msg = f"flavour={flavour!r} is not supported: use 'accumulated' or 'local'"
        raise ConfigError(msg)
    graph_module = quantized.graph_module if isinstance(quantized, QuantizedProgram) else quantized
    timestep = quantized.timestep if isinstance(quantized, QuantizedProgram) else "timestep"
    pairs, unmatched = match_layers(captured, graph_module)
    if not pairs:
        msg = "the two graphs have no layer in common, so the quantized one is of another model"
        raise ConfigError(msg)
    totals = {name: [0.0, 0.0] for name in pairs}
    samples = 0
    for batch in batches:
        samples += _add_batch(captured, graph_module, batch, pairs, totals, local=flavour == "local", timestep=timestep)
        if on_batch is not None:
            on_batch()
    if samples == 0:
        msg = "layer errors need at least one batch of the model's own inputs"
        raise ConfigError(msg)
    layers = (LayerError(name, math.sqrt(signal), math.sqrt(error)) for name, (signal, error) in totals.items())
    return LayerErrors(flavour, tuple(layers), unmatched, samples)


def _add_batch(
    captured: fx.GraphModule,
    quantized: fx.GraphModule,
    batch: Batch,
    pairs: Mapping[str, tuple[fx.Node, fx.Node]],
    totals: dict[str, list[float]],
    *,
    local: bool,
    timestep: str,
) -> int:
    """Add one batch's squared norms to the totals; return how many samples it has."""
    float_names = {node: name for name, (node, _) in pairs.items()}
    quantized_names = {node: name for name, (_, node) in pairs.items()}
    expected: dict[str, Tensor] = {}

    def remember(node: fx.Node, value: Tensor) -> Tensor:
        expected[float_names[node]] = value
        return value

    def compare(node: fx.Node, value: Tensor) -> Tensor:
        name = quantized_names[node]
        # A linear of the quantized graph may have its leading axes folded into one.
        x = expected.pop(name).reshape(value.shape)
        totals[name][0] += x.double().square().sum().item()
        totals[name][1] += (x.double() - value.double()).square().sum().item()
        return x.to(value.dtype) if local else value

    try:
        run_graph(captured, batch, float_names, remember, timestep)
    except (TypeError, RuntimeError, IndexError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        msg = f"a batch does not fit the captured model: {first}"
        raise ConfigError(msg) from error
    run_graph(quantized, batch, quantized_names, compare, timestep)
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
