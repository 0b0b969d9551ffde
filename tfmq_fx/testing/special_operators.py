"""The operators that random graphs hold only where they are favoured."""

from __future__ import annotations

import math
import sys

import torch
from hypothesis import strategies as st

from .graph_growth import is_image, shape_of
from .random_operators import OperatorGrowth

__all__ = ["SPECIAL_OPERATORS", "SpecialGrowth"]

aten = torch.ops.aten

#: Kinds that are drawn only where they are favoured: forms that canonicalization removes, and layers that few models
#: have. To test a pass that looks for something new, add a kind here, and the method of that name below.
SPECIAL_OPERATORS = ("region", "in_place", "written_parts", "sequence_conv", "frame_conv", "repeated_rows")


class SpecialGrowth(OperatorGrowth):
    """A graph that grows by the operators of :data:`SPECIAL_OPERATORS` too."""

    def region(self) -> None:
        """An activation inside a region that records no gradients, as export writes it."""
        if source := self._pick():
            self.count += 1
            flag = self._flag()
            self._keep(self.builder.region(f"region_{self.count}", aten.silu.default, source, records=flag))

    def in_place(self) -> None:
        """An activation that is written into a value of the graph's own, or into a view of it."""
        if source := self._pick():
            fresh = self.builder.call(aten.silu.default, source)
            if self._flag():
                self._keep(fresh)
            target = self.builder.call(aten.alias.default, fresh) if self._flag() else fresh
            self._call(aten.relu_.default, target)

    def written_parts(self) -> None:
        """Uninitialized memory that is written part by part, as rotary embeddings do."""
        if source := self._pick(lambda value: value.dim() > 1 and int(value.shape[1]) > 1):
            memory = self.builder.call(aten.empty_like.default, source)
            for start, end, operator in ((0, 1, aten.silu.default), (1, sys.maxsize, aten.relu.default)):
                part = self.builder.call(aten.slice.Tensor, memory, 1, start, end)
                written = self.builder.call(operator, self.builder.call(aten.slice.Tensor, source, 1, start, end))
                self.builder.call(aten.copy_.default, part, written)
            self._keep(memory)

    def sequence_conv(self) -> None:
        """A convolution of a sequence: the pixels of an image, one after the other."""
        if source := self._pick(is_image):
            channels = int(source.meta["val"].shape[1])
            kernel = self.draw(st.sampled_from([1, 3]))
            pixels = self.builder.call(
                aten.reshape.default, source, [-1, channels, math.prod(shape_of(source.meta["val"])[2:])]
            )
            self._weighted(aten.conv1d.default, pixels, self._weight(2, channels, kernel), [1], [kernel // 2], [1], 1)

    def frame_conv(self) -> None:
        """A convolution along the frames of an image that is a video of one frame."""
        if source := self._pick(is_image):
            video = self.builder.call(aten.unsqueeze.default, source, 2)
            weight = self._weight(2, int(source.meta["val"].shape[1]), 3, 1, 1)
            self._weighted(aten.conv3d.default, video, weight, [1, 1, 1], [1, 0, 0], [1, 1, 1], 1)

    def repeated_rows(self) -> None:
        """A time path whose rows are repeated once per frame in front of its last layer."""
        column = self.builder.call(aten.to.dtype, self.timestep, torch.float32)
        column = self.builder.call(aten.reshape.default, column, [1, 1] if self.scalar_timestep else [-1, 1])
        waves = self.builder.call(aten.sin.default, self.builder.call(aten.mul.Tensor, column, self._weight(4)))
        emb = self._weighted(aten.linear.default, waves, self._weight(8, 4))
        repeated = self.builder.call(aten.repeat.default, emb, [3, 1])
        self._weighted(aten.linear.default, self.builder.call(aten.silu.default, repeated), self._weight(4, 8))
