"""Weights with their quantizers, for the tests of rounding."""

import torch
from hypothesis import strategies as st

from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.observers import PerChannelWeightObserver


def generator(seed):
    return torch.Generator().manual_seed(seed)


def adaround(weight, bits, symmetric, search=False, axis=0):
    observer = PerChannelWeightObserver(bits, symmetric, search, axis)
    observer(weight)
    return AdaRoundQuantizer(observer, weight), observer


def aligned(values, quantizer):
    """One value per channel, to broadcast against the weight."""
    return values.reshape([-1 if i == quantizer.axis else 1 for i in range(quantizer.up.ndim)])


@st.composite
def weights(draw):
    """A quantizer of a random weight, and the observer that it came from."""
    shape = draw(st.sampled_from([(6, 5), (1, 7), (4, 3, 3, 3), (5, 2, 1, 1), (3, 4, 3)]))
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]))
    symmetric = bits >= 8 or draw(st.booleans())
    values = torch.randn(shape, generator=generator(draw(st.integers(0, 2**31)))) * draw(st.sampled_from([1e-3, 1, 50]))
    if draw(st.booleans()):
        values = values.abs()
    return adaround(values, bits, symmetric, draw(st.booleans()), draw(st.integers(0, len(shape) - 1)))
