"""Round one layer by GPTQ: where its inputs come from, and its integers back to its quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.fake_quantizers import AdaRoundQuantizer, float_mode, quantizers_of
from tfmq_fx.passes.support.predicates import is_linear, is_weighted
from tfmq_fx.reconstruction.gptq import CORRECTED, TRIED, InputMoments, round_columns
from tfmq_fx.reconstruction.layer_inputs import grouped_weight, input_position, input_rows, takes_rows
from tfmq_fx.reconstruction.propagation import Propagation

__all__ = ["LayerRounding", "round_unit", "weight_quantizer"]

#: Rows that a layer's inputs are known by: what is beyond a few for each input column changes its integers little.
MOST_ROWS = 2**15


def weight_quantizer(graph_module: fx.GraphModule, layer: fx.Node) -> AdaRoundQuantizer | None:
    """The quantizer of the weight of a layer that GPTQ can round; None for another, or where it is not quantized."""
    source = layer.args[input_position(layer) + 1] if takes_rows(layer) else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    module = graph_module.get_submodule(str(source.target))
    return module if isinstance(module, AdaRoundQuantizer) else None


class LayerRounding:
    """Sees what goes into a layer, then chooses the integers of its weight.

    Args:
        layer: The layer's node: a linear or a convolution.
        quantizer: That of its weight; it has seen the weight.
        seed: Of the rows that are chosen where there are too many.
        corrected: How much of the input's error the layer makes up for.
    """

    def __init__(self, layer: fx.Node, quantizer: AdaRoundQuantizer, seed: int, corrected: float = CORRECTED) -> None:
        self.layer, self.quantizer = layer, quantizer
        self.generator = torch.Generator().manual_seed(seed)
        channels_first = quantizer.seen_weight().to(torch.float32).movedim(quantizer.axis, 0)
        self.shape = channels_first.shape
        self.kernel = () if is_linear(layer) else tuple(self.shape[2:])
        self.moments = InputMoments(grouped_weight(layer, channels_first), corrected)

    def see(self, quantized: Tensor, original: Tensor, share: float) -> None:
        """Take inputs in.

        Args:
            quantized: The input of the quantized model's layer.
            original: The same of the float model's layer.
            share: Their share of all inputs, which is their share of :data:`MOST_ROWS`.
        """
        most = max(1, round(MOST_ROWS * share))
        for rows in input_rows(self.layer, (quantized, original), self.kernel, most, self.generator):
            self.moments.add(*rows)

    def finish(self, damping: float) -> None:
        """Round the weight, and choose the scales of its channels."""
        groups, channels, _ = self.moments.weight.shape
        scale = self.quantizer.scale.reshape(groups, channels, 1)
        zero = self.quantizer.zero_point.reshape(groups, channels, 1)
        low, high = self.quantizer.bounds
        levels, chosen = round_columns(self.moments, scale, low - zero, high - zero, damping, TRIED)
        self.quantizer.scale = chosen.reshape(self.quantizer.scale.shape)
        self.quantizer.put(levels.reshape(self.shape).movedim(0, self.quantizer.axis))


class _Recorder(fx.Interpreter):
    """Runs a unit and remembers what its layer was given."""

    def __init__(self, module: fx.GraphModule, layer: fx.Node) -> None:
        super().__init__(module)
        self.layer, self.found = layer, None

    def run_node(self, n: fx.Node) -> Any:
        if n is self.layer:
            self.found = self.fetch_args_kwargs_from_env(n)[0][input_position(n)]
        return super().run_node(n)

    def input_for(self, args: tuple[Any, ...]) -> Tensor:
        """What the layer sees when the unit is called with ``args``."""
        self.run(*args)
        assert isinstance(self.found, Tensor)
        return self.found


@torch.no_grad()
def round_unit(propagation: Propagation, node: fx.Node, damping: float, count: int, seed: int) -> None:
    """Round the layer of a unit that holds one.

    Args:
        propagation: Holds the unit's inputs.
        node: The unit's call node.
        damping: Relative to the mean of the diagonal.
        count: The samples to see: the first ones.
        seed: Of the rows that are chosen.
    """
    module = propagation.graph_module.get_submodule(str(node.target))
    assert isinstance(module, fx.GraphModule)
    (layer,) = filter(is_weighted, module.graph.nodes)
    quantizer = weight_quantizer(module, layer)
    assert quantizer is not None
    rounding, recorder = LayerRounding(layer, quantizer, seed), _Recorder(module, layer)
    for window in propagation.samples.windows(0, count):
        quantized = recorder.input_for(propagation.arguments(node, window, quantized=True))
        with float_mode(quantizers_of(module).values()):
            original = recorder.input_for(propagation.arguments(node, window, quantized=False))
        rounding.see(quantized, original, len(window) / count)
    rounding.finish(damping)
