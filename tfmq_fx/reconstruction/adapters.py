r"""Train all weights of a model together, each as :math:`Q(W + B A)`, against the float model's own prediction.

Rounding a layer by itself cannot make up for what quantized activations lose elsewhere; at 4 bits that is most of it.
Here the loss is the error of the whole model's prediction on the calibration items, which lie on the float model's
trajectories; no image is needed. Of each weight only :math:`B` and :math:`A`, of a low rank, are trained, with
gradients that pass the rounding as if it were not there, and the step sizes of activations beside them. Where training
starts every weight is rounded as it was: :math:`W` is then the value nearest to the float one that rounds so, and
:math:`B = 0`. At the end only the integers are kept.

Source: EfficientDM (He et al., ICLR 2024), section 3.2 (quantization-aware low-rank adapters, the float model as
teacher); LSQ (ICLR 2020) for step sizes. Our reading: :math:`B` is measured in the scale of its channel, which is what
its scale-aware optimization is for; scales of weights stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, fx, nn

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer, float_mode, quantizers_of
from tfmq_fx.fake_quantizers.straight_through import quantize_straight_through
from tfmq_fx.reconstruction.acceptance import keep_if_better
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.values import in_window, placeholder_value

__all__ = ["AdaptedWeight", "train_adapters"]

#: How far from its grid point a weight starts at most, in steps: just short of where it would round to the next.
START = 0.49


class AdaptedWeight:
    """A weight ``Q(W + B A)`` while its adapter is trained; a context manager, behind which its integers are kept.

    Args:
        quantizer: Of the weight, which has seen it; what it rounds to now is where training starts.
        rank: Of the adapter; at most that of the weight.
        generator: Draws ``A``.

    Attributes:
        down: ``A``, ``[r, n]``.
        up: ``B`` in scales of its output channels, ``[C, r]``.
    """

    def __init__(self, quantizer: AdaRoundQuantizer, rank: int, generator: torch.Generator) -> None:
        self.quantizer = quantizer
        self.scale, self.zero_point = quantizer.scale[:, None], quantizer.zero_point[:, None]
        self.shape = quantizer.up.movedim(quantizer.axis, 0).shape
        weight, rounded = (self._channels(w) for w in (quantizer.seen_weight(), quantizer.dequantized()))
        reach = START * self.scale
        self.start = torch.minimum(torch.maximum(weight, rounded - reach), rounded + reach)
        rank = min(rank, *weight.shape)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def _channels(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32).movedim(self.quantizer.axis, 0).flatten(1)

    def _latent(self) -> Tensor:
        return self.start + self.scale * (self.up @ self.down)

    def refresh(self) -> None:
        """Let the quantizer return what the adapter makes of the weight now; gradients go to the adapter."""
        quantized = quantize_straight_through(self._latent(), self.scale, self.zero_point, *self.quantizer.bounds)
        self.quantizer.soft = quantized.reshape(self.shape).movedim(0, self.quantizer.axis)

    def __enter__(self) -> AdaptedWeight:
        """Nothing is changed before :meth:`refresh`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error, keep the integers."""
        self.quantizer.soft = None
        if error is None:
            with torch.no_grad():
                low, high = self.quantizer.bounds
                integers = ((self._latent() / self.scale).round() + self.zero_point).clamp(low, high)
                levels = (integers - self.zero_point).reshape(self.shape)
                self.quantizer.put(levels.movedim(0, self.quantizer.axis))


class _Teacher:
    """The float model's predictions for all samples, and how far the quantized model is from them."""

    def __init__(self, prepared: fx.GraphModule, samples: Samples, config: ReconstructionConfig, seed: int) -> None:
        self.samples, self.config = samples, config
        self.columns = [placeholder_value(column) for column in samples.inputs]
        self.model = fx.Interpreter(prepared)
        self.model.extra_traceback = False
        self.trained, self.held_back = samples.split(config.held_back)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), float_mode(quantizers_of(prepared).values()):
            self.targets = {window.start: self._run(window) for window in samples.windows(0, samples.count)}

    def _run(self, window: Window) -> list[Tensor]:
        results = self.model.run(*in_window(self.columns, window), enable_io_processing=False)
        return [result for result in results if isinstance(result, Tensor)]

    def _target(self, window: Window) -> list[Tensor]:
        if not self.samples.mixing:
            return self.targets[window.start]
        pieces = [(start, values) for start, values in self.targets.items() if window.start - start < len(values[0])]
        pieces = [(start, values) for start, values in pieces if start < window.stop]
        return [
            torch.cat([values[i][max(0, window.start - start) : window.stop - start] for start, values in pieces])
            for i in range(len(pieces[0][1]))
        ]

    def error(self, window: Window) -> Tensor:
        """The squared error relative to the prediction's square, over a window."""
        pairs = list(zip(self._run(window), self._target(window), strict=True))
        wrong = sum((result - target).square().sum() for result, target in pairs)
        size = sum(target.square().sum() for _, target in pairs)
        return torch.as_tensor(wrong / size)

    def drawn_error(self) -> Tensor:
        """The same over a random mini-batch."""
        return self.error(self.samples.draw(self.config.batch_size, self.trained, self.generator))

    @torch.no_grad()
    def held_back_error(self) -> float:
        """The mean over the samples that are held back; over all when there are none."""
        first = self.trained if self.held_back else 0
        windows = self.samples.windows(first, self.trained + self.held_back)
        return sum(self.error(window).item() * len(window) for window in windows) / sum(map(len, windows))


def train_adapters(
    prepared: fx.GraphModule,
    samples: Samples,
    quantizers: Sequence[FakeQuantizer],
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
) -> UnitResult:
    """Train a model's weights and step sizes together; kept only where the error on held-back samples falls.

    Args:
        prepared: The graph, its weights rounded; its quantizers are updated in place.
        samples: The calibration samples.
        quantizers: Those that are trained.
        config: Iterations, batch size, step sizes, the rank of adapters, and the seed.
        on_iteration: Called after each iteration with its number and loss.

    Raises:
        ReconstructionError: The error is not finite.
    """
    teacher = _Teacher(prepared, samples, config, config.seed)
    activations = [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]

    def learn() -> None:
        generator = torch.Generator().manual_seed(config.seed)
        with torch.enable_grad(), ExitStack() as stack:
            weights = [
                stack.enter_context(AdaptedWeight(quantizer, config.adapter_rank, generator))
                for quantizer in quantizers
                if isinstance(quantizer, AdaRoundQuantizer)
            ]
            for quantizer in activations:
                stack.callback(quantizer.keep_step)
            _train(teacher, weights, [quantizer.learn_step() for quantizer in activations], config, on_iteration)

    before = teacher.held_back_error()
    return keep_if_better("whole model", "whole", quantizers, before, learn, teacher.held_back_error, config.iterations)


def _train(
    teacher: _Teacher,
    weights: Sequence[AdaptedWeight],
    steps: Sequence[nn.Parameter],
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
) -> None:
    """Adam, both step sizes annealed along a cosine."""
    adapters = [parameter for weight in weights for parameter in (weight.down, weight.up)]
    rates = [(adapters, config.adapter_rate), (steps, config.step_learning_rate)]
    optimizer = torch.optim.Adam([{"params": list(group), "lr": rate} for group, rate in rates if group])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    for iteration in range(config.iterations):
        for weight in weights:
            weight.refresh()
        loss = teacher.drawn_error()
        if not math.isfinite(value := loss.item()):
            msg = "the error of the whole model became NaN or infinite; lower the learning rate or check batches"
            raise ReconstructionError(msg)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        optimizer.step()
        scheduler.step()
        on_iteration(iteration, value)
