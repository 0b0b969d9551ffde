"""Reconstruct one unit: its inputs from the quantized prefix, its targets from the float model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer, quantizers_of
from tfmq_fx.reconstruction.acceptance import keep_if_better, undo_if_worse
from tfmq_fx.reconstruction.layer_rounding import round_unit
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.samples import Window
from tfmq_fx.reconstruction.training import STEP_POWER, train, train_steps
from tfmq_fx.reconstruction.unit_error import channel_axis, unit_error
from tfmq_fx.reconstruction.values import in_window

__all__ = ["reconstruct_unit", "trainable_weights"]


def trainable_weights(module: torch.nn.Module) -> list[AdaRoundQuantizer]:
    """The weights of a unit that learn their rounding."""
    return [quantizer for quantizer in quantizers_of(module).values() if isinstance(quantizer, AdaRoundQuantizer)]


def _mixed(quantized: Any, original: Any, probability: float, generator: torch.Generator) -> Any:
    """Take each element from the quantized prefix with this probability, else from the float model (QDrop)."""
    if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
        return quantized
    return torch.where(torch.rand(quantized.shape, generator=generator) < probability, quantized, original)


class _UnitTraining:
    """A unit with its data: draws mini-batches, computes errors."""

    def __init__(
        self,
        propagation: Propagation,
        node: fx.Node,
        config: ReconstructionConfig,
        fisher: list[Tensor | None] | None,
        seed: int,
    ) -> None:
        self.propagation, self.node, self.config = propagation, node, config
        self.module = propagation.graph_module.get_submodule(str(node.target))
        self.generator = torch.Generator().manual_seed(seed)
        self.trained, self.held_back = propagation.samples.split(config.held_back)
        assert isinstance(self.module, fx.GraphModule)
        values = [leaf for leaf in pytree.tree_leaves(node.meta["val"]) if isinstance(leaf, Tensor)]
        self.axes = [channel_axis(self.module.graph, value.ndim) for value in values]
        self.fisher = fisher or [None] * len(values)

    def _error(self, window: Window, args: tuple[Any, ...], power: float = 2.0) -> Tensor:
        targets = in_window(self.propagation.float_values[self.node], window)
        outputs = [leaf for leaf in pytree.tree_leaves(self.module(*args)) if isinstance(leaf, Tensor)]
        targets = [leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, Tensor)]
        return unit_error(outputs, targets, self.axes, self.fisher, power)

    def drawn_error(self, iteration: int, power: float = 2.0) -> Tensor:
        """The error on a random mini-batch."""
        window = self.propagation.samples.draw(self.config.batch_size, self.trained, self.generator)
        args = self.propagation.arguments(self.node, window, quantized=True)
        if self.config.quantized_inputs < 1.0:
            originals = self.propagation.arguments(self.node, window, quantized=False)
            share = self.config.quantized_inputs
            args = pytree.tree_map(lambda q, f: _mixed(q, f, share, self.generator), args, originals)
        return self._error(window, args, power)

    @torch.no_grad()
    def held_back_error(self) -> float:
        """The mean error on the samples that are held back; on all samples when there are none."""
        first = self.trained if self.held_back else 0
        windows = self.propagation.samples.windows(first, self.trained + self.held_back)
        total = 0.0
        for window in windows:
            args = self.propagation.arguments(self.node, window, quantized=True)
            total += self._error(window, args).item() * len(window)
        return total / sum(len(window) for window in windows)


def reconstruct_unit(
    propagation: Propagation,
    node: fx.Node,
    config: ReconstructionConfig,
    *,
    fisher: list[Tensor | None] | None,
    seed: int,
    on_iteration: Callable[[int, float], None],
    compiled: bool = False,
) -> UnitResult:
    """Choose the rounding of a unit's weights: learn it, or round its one layer by GPTQ.

    Args:
        propagation: Holds the unit's inputs and, from :meth:`Propagation.compute_float`, its targets.
        node: The unit's call node.
        config: Iterations and schedules.
        fisher: Weights of its outputs' elements, or None.
        seed: Seed of the mini-batches.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Source: BRECQ (ICLR 2021), algorithm 1; QDrop (ICLR 2022) with ``quantized_inputs`` and
    ``drop_activations``.
    """
    name, kind = node.meta["tfmq_fx.unit"]
    training = _UnitTraining(propagation, node, config, fisher, seed)
    quantizers = list(quantizers_of(training.module).values())
    weights = trainable_weights(training.module)
    activations = [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]
    for quantizer in weights:
        quantizer.round_to_nearest()
    before = training.held_back_error()

    if config.rounds_columns:

        def choose() -> None:
            round_unit(propagation, node, config.damping, training.trained, seed)

        result = keep_if_better(name, kind, quantizers, before, choose, training.held_back_error, 1)
        on_iteration(0, result.after)
        return result

    steps = config.step_iterations(config.iterations) if activations else 0

    def learn_steps() -> None:
        loss = partial(training.drawn_error, power=STEP_POWER)
        train_steps(activations, loss, steps, config, on_iteration, precision=config.precision)

    def learn() -> None:
        for quantizer in activations:
            quantizer.drop = config.drop_activations
        try:
            # What drops activations draws from the global generator; nothing else of the process may see it.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                error = training.drawn_error
                train(
                    weights,
                    activations,
                    error,
                    config.iterations,
                    config,
                    on_iteration,
                    precision=config.precision,
                    compiled=compiled,
                )
                if steps:
                    undo_if_worse(activations, learn_steps, training.held_back_error)
        finally:
            for quantizer in activations:
                quantizer.drop = 0.0

    return keep_if_better(name, kind, quantizers, before, learn, training.held_back_error, config.iterations + steps)


def state_of(quantizers: dict[str, FakeQuantizer]) -> dict[str, Tensor]:
    """What a unit's training may have changed, by quantizer and buffer."""
    return {
        f"{name}.{buffer}": value
        for name, quantizer in quantizers.items()
        for buffer, value in quantizer.state_dict().items()
        if buffer != "weight"
    }


def load_state(quantizers: dict[str, FakeQuantizer], state: dict[str, Tensor]) -> None:
    """The inverse of :func:`state_of`."""
    for name, quantizer in quantizers.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        quantizer.load_state_dict(own, strict=False)
