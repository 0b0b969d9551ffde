r"""A small classifier of Fashion-MNIST, and what its posteriors say about generated images.

Three scores, of which the first two have their likes on ImageNet:

* *classifier score*: :math:`\exp E_x\, \mathrm{KL}(p(y|x) \,\|\, p(y))`, from 1 (all images alike, or nothing
  recognised) to the number of classes. It is the Inception Score (Salimans et al., 2016, arXiv 1606.03498)
  with this classifier in the place of Inception, so the numbers compare with each other only;
* *agreement*: the share of images that get the same class as their counterparts from the same noise;
* *confidence*: the mean of the largest posterior.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier", "TrainingConfig", "agreement", "classifier_score", "confidence", "posteriors",
           "train_classifier"]  # fmt: skip

CHANNELS = (32, 64, 96)
CLASSES = 10
EVALUATION_BATCH = 200
#: Share of the steps in which the learning rate rises.
WARMUP = 0.2


@dataclass(frozen=True)
class TrainingConfig:
    """How the classifier is trained; a cached classifier is used only for the same configuration.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        peak: Highest learning rate, of AdamW.
        weight_decay: Of AdamW.
        seed: Of the initial weights and of the order of the images.
    """

    epochs: int = 3
    batch_size: int = 128
    peak: float = 5e-3
    weight_decay: float = 1e-2
    seed: int = 0


class Classifier(nn.Module):
    """Three convolutions with batch norm and max pooling, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for channels in CHANNELS:
            conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.features = nn.Sequential(*layers)
        self.classes = nn.Linear(before * 16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of images ``[N, 1, 32, 32]`` in [-1, 1]."""
        logits: Tensor = self.classes(self.features(images).flatten(1))
        return logits


def train_classifier(
    images: Tensor,
    labels: Tensor,
    file: str | Path,
    config: TrainingConfig | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Classifier:
    """Train the classifier, go on with a training that was cut off, or load it when it is done.

    Training runs on one thread, so that one seed gives the same weights, bit for bit, on one machine.

    Args:
        images: ``[N, 1, 32, 32]`` in [-1, 1].
        labels: ``[N]``.
        file: Where the weights go; after every epoch, with what is needed to go on.
        config: How to train.
        on_step: Called after every step with the steps done, all steps, and the loss.

    Raises:
        ValueError: ``file`` holds a classifier that was trained in another way.
    """
    config = config or TrainingConfig()
    file = Path(file)
    about = {**asdict(config), "images": len(images), "channels": list(CHANNELS)}
    steps_per_epoch = len(images) // config.batch_size
    total = config.epochs * steps_per_epoch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = Classifier()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=config.peak, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.peak, total_steps=total, pct_start=WARMUP)
    generator = torch.Generator().manual_seed(config.seed)
    first = 0
    if file.is_file():
        state = torch.load(file, weights_only=True, map_location="cpu")
        if state["about"] != about:
            msg = f"{file} holds a classifier that was trained as {state['about']}, not as {about}; remove it to train"
            raise ValueError(msg)
        first = state["epochs"]
        classifier.load_state_dict(state["classifier"])
        if first < config.epochs:
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"])
    classifier.train()
    with single_thread():
        for epoch in range(first, config.epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in range(steps_per_epoch):
                rows = order[index * config.batch_size : (index + 1) * config.batch_size]
                batch = images[rows].contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(classifier(batch), labels[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                if on_step is not None:
                    on_step(epoch * steps_per_epoch + index + 1, total, loss.item())
            _save(file, {"about": about, "epochs": epoch + 1, "classifier": classifier.state_dict(),
                         "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
                         "generator": generator.get_state()})  # fmt: skip
    return classifier.eval().requires_grad_(False)


@torch.inference_mode()
def posteriors(classifier: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities, float64 ``[N, 10]``, of images in [-1, 1] (clamped) or of uint8 pixels."""
    found = []
    for batch in torch.split(images, EVALUATION_BATCH):
        values = batch.float().div(127.5).sub(1) if batch.dtype == torch.uint8 else batch.clamp(-1, 1)
        found.append(classifier(values.contiguous(memory_format=torch.channels_last)).double().softmax(dim=1))
    return torch.cat(found)


def classifier_score(probabilities: Tensor) -> float:
    """``exp(mean KL(p(y|x) || p(y)))`` of posteriors ``[N, K]``; ``p(y)`` is their mean."""
    p = probabilities.double()
    marginal = p.mean(dim=0)
    # xlogy is 0 where the probability is.
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1)
    return divergence.mean().exp().item()


def agreement(probabilities: Tensor, reference: Tensor) -> float:
    """The share of images whose likeliest class is that of their counterparts; both posteriors ``[N, K]``.

    Raises:
        ValueError: The sets are not of one size.
    """
    if probabilities.shape != reference.shape:
        msg = f"posteriors of {list(probabilities.shape)} and {list(reference.shape)} are not of the same images"
        raise ValueError(msg)
    return (probabilities.argmax(dim=1) == reference.argmax(dim=1)).double().mean().item()


def confidence(probabilities: Tensor) -> float:
    """The mean of the largest posterior of each image."""
    return probabilities.double().amax(dim=1).mean().item()


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread inside, as many as before after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(file: Path, state: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    torch.save(state, part)
    part.replace(file)
