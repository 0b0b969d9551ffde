"""Train all weights of a model together against the float model's own prediction.

Rounding a layer by itself cannot make up for what quantized activations lose elsewhere, nor for what the layers behind
make of its error; at 4 bits that is most of it. Here the loss is the error of the whole model's prediction on the
calibration items, which lie on the float model's trajectories; no image is needed. Weights learn through their rounding
(:mod:`tfmq_fx.reconstruction.trained_weight`), the step sizes of activations beside them. All learning rates are
annealed to zero: with gradients that pass the rounding, weights near the middle of two integers jump to and fro, and
only small steps at the end settle them.

Source: EfficientDM (He et al., ICLR 2024), section 3.2 (the float model as teacher); LSQ (ICLR 2020) for step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer, float_mode, quantizers_of
from tfmq_fx.reconstruction.acceptance import keep_if_better
from tfmq_fx.reconstruction.annealed_adam import AnnealedAdam
from tfmq_fx.reconstruction.checkpoint import TrainingState
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.soft_weights import compiled_if_possible, with_soft_weights
from tfmq_fx.reconstruction.trained_weight import AdaptedWeight, TrainedWeight, WholeWeight
from tfmq_fx.reconstruction.values import in_window, placeholder_value

__all__ = ["train_whole_model"]

#: Fewer training steps than this do not pay for compiling one, which takes a minute or two for a UNet.
WORTH_COMPILING = 300
#: Training steps between two states on disk.
EVERY = 100
#: Adam's step for the logarithms of weights' scales.
SCALE_RATE = 1e-3


class _Teacher:
    """The float model's predictions for all samples, and how far the quantized model is from them."""

    def __init__(self, prepared: fx.GraphModule, samples: Samples, config: ReconstructionConfig) -> None:
        self.samples, self.config = samples, config
        self.columns = [placeholder_value(column) for column in samples.inputs]
        self.model = fx.Interpreter(prepared)
        self.model.extra_traceback = False
        self.trained, self.held_back = samples.split(config.held_back)
        with torch.no_grad(), float_mode(quantizers_of(prepared).values()):
            self.targets = {window.start: self.rounded(window) for window in samples.windows(0, samples.count)}

    def arguments(self, window: Window) -> list[Tensor]:
        """The graph's inputs for a window."""
        return list(in_window(self.columns, window))

    def rounded(self, window: Window) -> list[Tensor]:
        """The model's results with the integers that it has."""
        return _tensors(self.model.run(*self.arguments(window), enable_io_processing=False))

    def _target(self, window: Window) -> list[Tensor]:
        if not self.samples.mixing:
            return self.targets[window.start]
        pieces = [(start, values) for start, values in self.targets.items() if window.start - start < len(values[0])]
        pieces = [(start, values) for start, values in pieces if start < window.stop]
        return [
            torch.cat([values[i][max(0, window.start - start) : window.stop - start] for start, values in pieces])
            for i in range(len(pieces[0][1]))
        ]

    def error(self, results: Sequence[Tensor], window: Window) -> Tensor:
        """The squared error of results relative to the prediction's square, over a window."""
        pairs = list(zip(results, self._target(window), strict=True))
        wrong = sum((result.float() - target).square().sum() for result, target in pairs)
        size = sum(target.square().sum() for _, target in pairs)
        return torch.as_tensor(wrong / size)

    @torch.no_grad()
    def held_back_error(self) -> float:
        """The mean over the samples that are held back; over all when there are none."""
        first = self.trained if self.held_back else 0
        windows = self.samples.windows(first, self.trained + self.held_back)
        total = sum(self.error(self.rounded(window), window).item() * len(window) for window in windows)
        return total / sum(map(len, windows))


def _tensors(results: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def train_whole_model(
    prepared: fx.GraphModule,
    samples: Samples,
    quantizers: Sequence[FakeQuantizer],
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
    kept: TrainingState,
) -> UnitResult:
    """Train a model's weights and step sizes together; kept only where the error on held-back samples falls.

    Args:
        prepared: The graph, its weights rounded; its quantizers are updated in place.
        samples: The calibration samples.
        quantizers: Those that are trained.
        config: The method, iterations, batch size, step sizes, the rank of adapters, and the seed.
        on_iteration: Called after each iteration with its number and loss.
        kept: Where the state of an unfinished training lies.

    Raises:
        ReconstructionError: The error is not finite.
    """
    teacher = _Teacher(prepared, samples, config)
    activations = [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]
    rounded = [quantizer for quantizer in quantizers if isinstance(quantizer, AdaRoundQuantizer)]

    def learn() -> None:
        with torch.enable_grad(), ExitStack() as stack:
            weights = [stack.enter_context(weight) for weight in _trained_weights(rounded, config)]
            for quantizer in activations:
                stack.callback(quantizer.keep_step)
            steps = [quantizer.learn_step() for quantizer in activations]
            _train(prepared, teacher, weights, steps, on_iteration, kept)

    before = teacher.held_back_error()
    result = keep_if_better(
        "whole model", "whole", quantizers, before, learn, teacher.held_back_error, config.iterations
    )
    kept.remove()
    return result


def _trained_weights(quantizers: Sequence[AdaRoundQuantizer], config: ReconstructionConfig) -> list[TrainedWeight]:
    if config.method == "distillation":
        return [WholeWeight(quantizer) for quantizer in quantizers]
    generator = torch.Generator().manual_seed(config.seed)
    return [AdaptedWeight(quantizer, config.adapter_rank, generator) for quantizer in quantizers]


def _train(
    prepared: fx.GraphModule,
    teacher: _Teacher,
    weights: Sequence[TrainedWeight],
    steps: Sequence[torch.nn.Parameter],
    on_iteration: Callable[[int, float], None],
    kept: TrainingState,
) -> None:
    config = teacher.config
    optimizer = AnnealedAdam(
        [
            ([variable for weight in weights for variable in weight.variables], config.whole_model_rate),
            ([weight.log_scale for weight in weights if weight.log_scale is not None], SCALE_RATE),
            (steps, config.step_learning_rate),
        ],
        config.iterations,
    )
    generator = torch.Generator().manual_seed(config.seed)
    optimizer.resume(kept.load(), generator)
    for iteration in range(optimizer.iteration):
        on_iteration(iteration, math.nan)
    model: Callable[..., Any] = with_soft_weights(prepared, [weight.quantizer for weight in weights])
    # By the length of the whole training: one that goes on ends with the same bits.
    if config.iterations >= WORTH_COMPILING:
        first = teacher.arguments(teacher.samples.draw(config.batch_size, teacher.trained, torch.Generator()))
        model = compiled_if_possible(model, [*first, *(weight.soft() for weight in weights)])
    for iteration in range(optimizer.iteration, config.iterations):
        window = teacher.samples.draw(config.batch_size, teacher.trained, generator)
        arguments = [*teacher.arguments(window), *(weight.soft() for weight in weights)]
        loss = teacher.error(_tensors(model(*arguments)), window)
        if not math.isfinite(value := loss.item()):
            msg = "the error of the whole model became NaN or infinite; lower the learning rate or check batches"
            raise ReconstructionError(msg)
        optimizer.step(loss)
        on_iteration(iteration, value)
        if (iteration + 1) % EVERY == 0:
            kept.save(optimizer.state(generator))
