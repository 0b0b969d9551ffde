"""The pointwise convolution that quantizes its image itself, compiled, against the naive reference image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import compiled, naive
from tests.kernels.test_compiled_kernels import (
    BATCHES,
    FACTORS,
    FLOATS,
    SEEDS,
    SIZES,
    SPREADS,
    THREADS,
    assert_within,
    scales,
    values,
)
from tests.kernels.test_compiled_rows import drawn_rows
from tests.kernels.toolchain import compiler
from tfmq_fx.kernels import has_native_kernels, pack_weight

pytestmark = [
    pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]

SCALES = scales(1e-7, 1e-5, 1.3e-4, 0.02)
WORDS = st.one_of(st.sampled_from((0, 255, 256, 32768, 65535)), st.integers(0, 65535))


@given(SEEDS, BATCHES, SIZES, SIZES, st.integers(1, 8), st.integers(1, 8), FLOATS, SPREADS, st.data())
def test_pointwise_conv(seed, batch, height, width, depth, channels, dtype, spread, data):
    generator, threads = torch.Generator().manual_seed(seed), data.draw(THREADS)
    depth, channels = 16 * depth, 16 * channels
    x = values(generator, (batch, height, width, depth), dtype, spread)
    plain = torch.randint(-128, 128, (channels, depth), generator=generator, dtype=torch.int8)
    if data.draw(st.booleans()):  # as far as a sum can get
        x.fill_(data.draw(st.sampled_from((-torch.inf, torch.inf))))
        plain.fill_(data.draw(st.sampled_from((-128, 127))))
    weight_scale, bias = torch.rand(channels, generator=generator) * 1e-3, torch.randn(channels, generator=generator)
    residual = values(generator, (batch, height, width, channels), dtype) if data.draw(st.booleans()) else None
    factors = data.draw(FACTORS)(generator, depth)
    constants = (weight_scale, plain.sum(1, dtype=torch.int32), bias)
    packed = pack_weight(plain[:, :, None, None])
    scale, zero = data.draw(SCALES), data.draw(WORDS)
    result = compiled.pointwise_conv(x, packed, *constants, residual, scale, zero, factors, threads=threads)
    assert_within(result, *naive.pointwise_conv(x, plain, weight_scale, bias, residual, scale, zero, factors, dtype))

    count = data.draw(st.integers(1, 4))
    table = (
        torch.tensor([data.draw(SCALES) for _ in range(count)]),
        torch.tensor([data.draw(WORDS) for _ in range(count)]),
    )
    rows = drawn_rows(data, batch, count)
    result = compiled.pointwise_conv(x, packed, *constants, residual, *table, factors, threads=threads, rows=rows)
    for image, row in enumerate(rows.clamp(0, count - 1).tolist()):
        added = None if residual is None else residual[image : image + 1]
        one = float(table[0][row]), int(table[1][row])
        exact = naive.pointwise_conv(x[image : image + 1], plain, weight_scale, bias, added, *one, factors, dtype)
        assert_within(result[image : image + 1], *exact)


def test_what_is_no_number_becomes_the_smallest_word():
    x = torch.full((1, 1, 1, 16), torch.nan)
    plain = torch.ones(16, 16, dtype=torch.int8)
    constants = torch.ones(16), plain.sum(1, dtype=torch.int32), torch.zeros(16)
    result = compiled.pointwise_conv(x, pack_weight(plain[:, :, None, None]), *constants, None, 0.5, 300)
    assert torch.equal(result, torch.full((1, 1, 1, 16), -0.5 * 300 * 16))
