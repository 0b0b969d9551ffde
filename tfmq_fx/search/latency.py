"""What each layer costs in time, float and on integer kernels: a layer of its shape is compiled alone and timed here.

Weights of fewer bits run on the same integer kernels as those of 8, so their time is the same and is measured once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from tfmq_fx.config.bits import FLOAT_BITS
from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.diagnostics.comparison import interleaved_latency
from tfmq_fx.frontend.capture import capture
from tfmq_fx.lowering.lower import lower
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.passes.analysis import TemporalBlock
from tfmq_fx.passes.analysis.layer_names import seen_through_observers
from tfmq_fx.passes.support.predicates import is_matmul, is_weighted, node_value
from tfmq_fx.passes.support.sizes import concrete_size
from tfmq_fx.quantization.calibrate import calibrate
from tfmq_fx.quantization.convert import convert
from tfmq_fx.quantization.prepare import prepare
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.reconstruction.layer_inputs import input_position
from tfmq_fx.search.layers import SearchLayer
from tfmq_fx.search.widths import BASE, Widths

__all__ = ["LayerTimes", "StepTimer", "layer_times"]

#: Timed calls of each.
ROUNDS = 40
FLOAT = Widths(FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Seconds of the layers alone, for one item.

    Attributes:
        seconds: Per layer float64 ``[options]``; zeros for layers of the temporal block, which run once a timestep, and
            for those of a form that was not timed.
        untimed: The names of the latter.
    """

    seconds: tuple[Tensor, ...]
    untimed: tuple[str, ...]


class _Weighted(nn.Module):
    """A layer of one operator, with what it is called with behind its input."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.target: Any = node.target
        self.first = input_position(node)
        for index, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and index != self.first:
                value = torch.randn(_shape(argument)) / _shape(argument)[-1]
                self.register_parameter(f"constant{index}", nn.Parameter(value, requires_grad=False))
        self.arguments = [None if isinstance(argument, fx.Node) else argument for argument in node.args]

    def forward(self, sample: Tensor) -> Tensor:
        arguments = [getattr(self, f"constant{i}", argument) for i, argument in enumerate(self.arguments)]
        arguments[self.first] = sample
        result: Tensor = self.target(*arguments)
        return result


class _Attention(nn.Module):
    """The two products of an attention, with its softmax."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)


@torch.no_grad()
def layer_times(layers: Sequence[SearchLayer], block: TemporalBlock, *, progress: bool) -> LayerTimes:
    """Time a layer of the form of each, float and at 8 bits, in turns; those of one form once.

    Inputs and results are float32 images and rows as torch has them, so what joins a layer to its neighbours in the
    whole model is timed with it, and is not always there.

    Args:
        layers: The layers.
        block: The temporal block.
        progress: Whether to draw a progress bar.
    """
    forms: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    keys: list[list[str]] = []
    untimed: list[str] = []
    for layer in layers:
        outside = [node for node in layer.nodes if node not in block]
        parts = _parts(outside)
        if parts is None:
            untimed.append(layer.name)
        keys.append([key for key, _, _ in parts or ()])
        forms.update({key: (module, inputs) for key, module, inputs in parts or ()})
    times: dict[str, Mapping[bool, float]] = {}
    disabled, console = not draws_progress(progress), progress_console()
    for key, form in track(forms.items(), "timing layers", disable=disabled, transient=True, console=console):
        times[key] = _seconds(*form)
    seconds = [
        torch.tensor([sum(times[key][widths.has_integer_kernel] for key in own) for widths in layer.options])
        for layer, own in zip(layers, keys, strict=True)
    ]
    return LayerTimes(tuple(value.double() for value in seconds), tuple(untimed))


def _parts(nodes: Sequence[fx.Node]) -> list[tuple[str, nn.Module, tuple[Tensor, ...]]] | None:
    """What to time for a layer: by a key that is the same for equal forms; None for a form that nothing here times."""
    parts: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []
    products = [node for node in nodes if is_matmul(node)]
    for node in nodes:
        if is_weighted(node):
            inputs = (torch.randn(_shape(node.args[input_position(node)])),)
            described = [_shape(a) if isinstance(a, fx.Node) else a for a in node.args]
            parts.append((f"{node.target} {described}", _Weighted(node), inputs))
    if products:
        shapes = [_shape(argument) for product in products for argument in product.args[:2]]
        if len(products) != 2 or any(len(shape) != 4 for shape in shapes):
            return None
        query, key, _, value = shapes
        own = (torch.randn(query), torch.randn(*key[:2], key[3], key[2]), torch.randn(value))
        parts.append((f"attention {shapes}", _Attention(), own))
    return parts


def _shape(node: Any) -> list[int]:
    """The shape of a value for a batch of one; that of an observer is its input's."""
    return [int(concrete_size(size, 1)) for size in node_value(seen_through_observers(node)).shape]


def _seconds(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[bool, float]:
    """The median time of a module, by whether it runs on integer kernels."""
    calls = {
        str(widths.has_integer_kernel): partial(_lowered(module, inputs, widths), *inputs) for widths in (BASE, FLOAT)
    }
    seconds = interleaved_latency(calls, ROUNDS)
    return {name == "True": statistics.median(values) for name, values in seconds.items()}


def _lowered(module: nn.Module, inputs: tuple[Tensor, ...], widths: Widths) -> Denoiser:
    """A module at these widths, through the way that a whole model goes."""
    config = widths.of(QuantizationConfig(temporal="float", keep_float=()))
    prepared = prepare(capture(module.eval(), inputs), config)
    calibrate(prepared, [inputs], progress=False)
    return lower(convert(prepared))


class StepTimer:
    """Times one call of whole programs in turns; each is lowered once.

    Args:
        args: What they are called with.
        kwargs: Likewise, by name.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._calls: dict[str, Callable[[], Any]] = {}

    def add(self, name: str, program: QuantizedProgram) -> None:
        """Lower a program, to be timed with the others."""
        self._calls[name] = partial(lower(program), *self.args, **self.kwargs)

    @torch.no_grad()
    def seconds(self) -> dict[str, float]:
        """The median time of a call of each."""
        return {name: statistics.median(times) for name, times in interleaved_latency(self._calls, ROUNDS).items()}
