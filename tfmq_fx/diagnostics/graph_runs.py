"""Run captured graphs: as a denoiser, with watched layers, or with foreign temporal features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.diagnostics.features import (
    TemporalFeatures,
    align_features,
    temporal_features,
    temporal_layers,
)
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch, batch_arguments
from tfmq_fx.frontend.binding import Call, bind
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.support.timestep_row import timestep_row

__all__ = ["NodeValue", "graph_denoiser", "run_graph", "sample_input", "with_temporal_features"]

#: Called with a node and its value; what it returns is the node's value from then on.
NodeValue = Callable[[fx.Node, Any], Any]


class _Watched(fx.Interpreter):
    """An interpreter that shows chosen nodes' values, and takes what it gets back."""

    def __init__(self, graph_module: fx.GraphModule, watched: Mapping[fx.Node, Any], watch: NodeValue) -> None:
        super().__init__(graph_module)
        self.watched, self.watch = watched, watch
        # Errors stay one sentence; where in the graph they happened says nothing to who gave the input.
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        return self.watch(n, value) if n in self.watched else value


@torch.no_grad()
def run_graph(
    graph_module: fx.GraphModule,
    batch: Batch,
    watched: Mapping[fx.Node, Any],
    watch: NodeValue,
    timestep: str = "timestep",
) -> Any:
    """Run ``graph_module`` on a batch, showing the values of the ``watched`` nodes to ``watch``.

    Args:
        graph_module: A captured graph, at any later stage.
        batch: The model's own inputs: a tuple, a mapping by argument name, or a single tensor.
        watched: The nodes to show.
        watch: Sees, and may replace, their values.
        timestep: Name of the timestep input.

    Raises:
        InputError: The batch does not have the graph's inputs.
    """
    args, kwargs = batch_arguments(batch)
    call = bind(interface_of(graph_module), args, kwargs, timestep)
    return _Watched(graph_module, watched, watch).run(*call.leaves)


def sample_input(graph_module: fx.GraphModule, timestep: str) -> str:
    """The name of the model's sample: its first input that is not the timestep.

    Raises:
        ConfigError: The graph has no such inputs.
    """
    names = calling_convention(graph_module.graph)[0]
    rest = [name for name in names if name != timestep]
    if timestep not in names or not rest:
        msg = f"the graph takes {', '.join(names) or 'nothing'}, not a sample and {timestep!r}"
        raise ConfigError(msg)
    return rest[0]


def graph_denoiser(
    graph_module: fx.GraphModule,
    *,
    timestep: str = "timestep",
    extra: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    run: Callable[[dict[str, Any]], Any] | None = None,
) -> Callable[[Tensor, Tensor], Any]:
    """Make a captured graph callable as ``denoiser(sample, timestep)``, like a diffusers model.

    Args:
        graph_module: The graph, float or quantize/dequantize.
        timestep: Name of its timestep input; a 0-dim timestep is given the captured shape.
        extra: Further inputs by name, the same in every call: tensors with one item per sample, or
            anything else, which is passed as it is.
        max_batch: The largest batch of one call of the graph; a larger one is run in several.
        run: Runs the inputs by name; by default the graph itself.

    Raises:
        ConfigError: The graph has no timestep and sample, or needs an input that ``extra`` does not have.
        InputError: When called: an input does not fit, or the timestep is fractional, and the graph has integers.
    """
    extra = dict(extra or {})
    sample = sample_input(graph_module, timestep)
    names = calling_convention(graph_module.graph)[0]
    if missing := [name for name in names if name not in (sample, timestep, *extra)]:
        msg = f"the model also takes {', '.join(missing)}; pass extra={{{missing[0]!r}: …}}"
        raise ConfigError(msg)
    interface = interface_of(graph_module)

    def run_call(call: Call) -> Any:
        args, kwargs = call.arguments()
        if run is not None:
            return run(dict(zip(interface.names, (*args, *kwargs.values()), strict=True)))
        return graph_module(*args, **kwargs)

    @in_plain_surroundings
    @torch.no_grad()
    def denoise(x: Tensor, t: Tensor) -> Any:
        call = bind(interface, (), {sample: x, timestep: t, **extra}, timestep)
        items = torch.split(torch.arange(len(x)), max_batch or len(x))
        if len(items) == 1:
            return run_call(call)
        return pytree.tree_map(lambda *parts: torch.cat(parts), *(run_call(call.take(piece)) for piece in items))

    return denoise


@in_plain_surroundings
def with_temporal_features(
    graph_module: fx.GraphModule,
    features: TemporalFeatures,
    *,
    timestep: str = "timestep",
    extra: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
) -> Callable[[Tensor, Tensor], Any]:
    """The denoiser of a graph whose embedding layers say what ``features`` hold, everything else as it is.

    With the float graph and quantized features it tells what quantizing the temporal block alone costs
    (TFMQ-DM, CVPR 2024, section 4).

    Args:
        graph_module: The graph.
        features: The features of the same model's embedding layers (matched by :func:`align_features`).
        timestep: Name of the timestep input.
        extra: Further inputs by name (:func:`graph_denoiser`).
        max_batch: The largest batch of one call of the graph.

    Raises:
        ConfigError: The graph has no temporal block or other embedding layers.
        TimestepError: When called: the features are not of this timestep.
    """
    own = temporal_features(graph_module, features.timesteps, timestep=timestep)
    features = align_features(own, features)
    pairs = zip(own.values, features.values, strict=True)
    differences = (value.double() - own_value.double() for own_value, value in pairs)
    shifts = dict(zip(temporal_layers(find_temporal_block(graph_module, timestep)), differences, strict=True))

    def run(inputs: dict[str, Any]) -> Any:
        row = timestep_row(inputs[timestep].reshape(-1).cpu(), features.timesteps, "error")

        def shift(node: fx.Node, value: Tensor) -> Tensor:
            # The difference rather than the feature: features that are the graph's own change no bit.
            difference = shifts[node][row].to(value)
            fits = difference.numel() == value.numel()
            return value + (difference.reshape(value.shape) if fits else difference)

        return run_graph(graph_module, inputs, shifts, shift, timestep)

    return graph_denoiser(graph_module, timestep=timestep, extra=extra, max_batch=max_batch, run=run)
