"""The same kernels with a table of quantizers and the row of each item, against the naive reference image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import compiled, naive
from tests.kernels.test_compiled_kernels import (
    BATCHES,
    BYTES,
    FACTORS,
    FLOATS,
    PADDING,
    SEEDS,
    SIZES,
    THREADS,
    VECTORS,
    assert_within,
    laid_out,
    scales,
    values,
)
from tests.kernels.toolchain import compiler
from tfmq_fx.kernels import has_native_kernels, pack_weight

pytestmark = [
    pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]

#: Images of each item: several are the pixels of a linear.
EACH = st.sampled_from((1, 1, 2, 3, 7))
COUNTS = st.integers(1, 4)
SCALES = (0.004, 0.02, 0.3)


def drawn_rows(data, items, count):
    """Any order, any number of times, and at times outside the table."""
    return torch.tensor(data.draw(st.lists(st.integers(-2, count + 1), min_size=items, max_size=items)))


def drawn_table(data, items, choices=SCALES):
    count = data.draw(COUNTS)
    sizes = [data.draw(scales(*choices)) for _ in range(count)]
    zeros = [data.draw(BYTES) for _ in range(count)]
    return torch.tensor(sizes), torch.tensor(zeros), drawn_rows(data, items, count)


@given(SEEDS, BATCHES, EACH, st.sampled_from((1, 2, 3, 5, 7)), st.integers(1, 6), st.integers(1, 6), st.data())
def test_integer_conv(seed, items, each, side, depth, channels, data):
    kernel = [data.draw(st.sampled_from((1, 3, 5))) for _ in range(2)]
    stride, threads = [data.draw(st.integers(1, 2)) for _ in range(2)], data.draw(THREADS)
    dtype, residual = data.draw(FLOATS), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    batch, depth, channels = items * each, 4 * depth, 16 * channels
    x = torch.randint(0, 256, (batch, side + kernel[0] - 1, side + kernel[1], depth), generator=generator).byte()
    plain = torch.randint(-128, 128, (channels, depth, *kernel), generator=generator, dtype=torch.int8)
    if data.draw(st.booleans()):  # as far as a sum and what its zero points add can get
        x.fill_(data.draw(st.sampled_from((0, 255))))
        plain.fill_(-128)
    weight_scale, bias = torch.rand(channels, generator=generator) * 1e-2, torch.randn(channels, generator=generator)
    table = drawn_table(data, items, (1e-7, *SCALES, 7.0))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel, stride, strict=True))
    added = values(generator, (batch, rows, columns, channels), dtype) if residual else None
    sums = plain.sum((1, 2, 3), dtype=torch.int32)
    geometry = (added, kernel, stride, dtype)
    result = compiled.integer_conv(
        x, pack_weight(plain), weight_scale, bias, *geometry, threads=threads, table=table, weight_sum=sums
    )
    assert_within(result, *naive.integer_conv_rows(x, plain, weight_scale, bias, added, table, stride, dtype))


def test_the_longest_sums_and_the_furthest_zero_points():
    """As many products as an int32 holds: the sum and what the zero point adds are each next to its limits."""
    depth, kernel = 1024, [8, 8]  # 65,536 of at most 65,793
    x = torch.stack([torch.full((8, 8, depth), byte, dtype=torch.uint8) for byte in (255, 0, 0, 255)])
    plain = torch.full((16, depth, *kernel), -128, dtype=torch.int8)
    table = torch.tensor([0.5, 0.5]), torch.tensor([255, 0]), torch.tensor([0, 0, 1, 1])
    ones, zeros, sums = torch.ones(16), torch.zeros(16), plain.sum((1, 2, 3), dtype=torch.int32)
    geometry = (None, kernel, [1, 1], torch.float32)
    result = compiled.integer_conv(x, pack_weight(plain), ones, zeros, *geometry, table=table, weight_sum=sums)
    furthest = 255 * 128 * 65536 * 0.5
    assert result[:, 0, 0, 0].tolist() == [0.0, furthest, 0.0, -furthest]


@given(SEEDS, BATCHES, EACH, SIZES, st.integers(1, 8), st.integers(0, 3), st.data())
def test_quantized_group_norm(seed, items, each, side, first, second, data):
    counts = [16 * first] + ([16 * second] if second else [])
    batch, channels = items * each, sum(counts)
    groups = data.draw(st.sampled_from([n for n in (1, 2, 4, 16, channels) if channels % n == 0]))
    dtype, silu, padding = data.draw(FLOATS), data.draw(st.booleans()), data.draw(PADDING)
    generator = torch.Generator().manual_seed(seed)
    x = [values(generator, (batch, side, 3, n), dtype) for n in counts]
    shift = torch.randn(batch, channels, generator=generator) if data.draw(st.booleans()) else None
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    table = drawn_table(data, items)
    arguments = (x, shift, weight, bias, groups, 1e-5, silu)
    factors = data.draw(FACTORS)(generator, channels)
    result = compiled.group_norm(*arguments, table[:2], padding, factors, threads=data.draw(THREADS), rows=table[2])
    assert_within(result, *naive.quantized_rows(*naive.times(*naive.group_norm(*arguments), factors), table, padding))


@given(SEEDS, BATCHES, EACH, SIZES, VECTORS, st.integers(1, 3), PADDING, FLOATS, THREADS, st.data())
def test_quantized_image(seed, items, each, side, channels, enlarge, padding, dtype, threads, data):
    generator = torch.Generator().manual_seed(seed)
    x = values(generator, (items * each, side, 3, 16 * channels), dtype)
    table, factors = drawn_table(data, items, (1e-7, *SCALES)), data.draw(FACTORS)(generator, 16 * channels)
    result = compiled.quantized_image(x, enlarge, *table[:2], padding, factors, threads=threads, rows=table[2])
    assert torch.equal(
        result.double(), naive.quantized_image_rows(naive.scaled(x, factors), enlarge, table, padding)
    )  # to the bit


@given(SEEDS, BATCHES, st.integers(1, 4), st.integers(1, 20), st.integers(1, 70), st.integers(1, 20), st.data())
def test_integer_attention(seed, batch, heads, length, keys, depth, data):
    layout, shared = st.sampled_from(("own", "turned", "joined", "expanded")), st.sampled_from((1, batch))
    dtype, threads = data.draw(FLOATS), data.draw(THREADS)
    of_keys = [n for n in range(1, heads + 1) if heads % n == 0]
    key_heads = data.draw(st.sampled_from(of_keys))
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (data.draw(shared), heads, length, 4 * depth),
        (data.draw(shared), key_heads, keys, 4 * depth),
        (data.draw(shared), key_heads, keys, 4 * depth),
    )
    operands = [laid_out(generator, size, dtype, data.draw(layout)) for size in sizes]
    images, count = max(size[0] for size in sizes), data.draw(COUNTS)
    one_image = images > 1 and 1 in (sizes[1][0], sizes[2][0])
    choices = ((0.004, 0.02, 0.2), (0.004, 0.02, 0.2), (1 / 255, 1 / 2000), (0.02, 0.5))
    columns, zeros = [], []
    for place, choice in enumerate(choices):
        # Keys or values of one image for all are quantized once, by numbers that all rows have.
        different = 1 if place in (1, 3) and one_image else count
        column = [data.draw(scales(*choice)) for _ in range(different)]
        zero = [0 if place == 2 else data.draw(BYTES) for _ in range(different)]
        columns.append(column * (count // different))
        zeros.append(zero * (count // different))
    table = torch.tensor(columns).T.contiguous(), torch.tensor(zeros).T.contiguous()
    rows = drawn_rows(data, images if data.draw(st.booleans()) else 1, count)
    arguments = (*operands, data.draw(st.sampled_from((1.0, 0.125))), *table)
    deferred = data.draw(st.booleans())
    result = compiled.integer_attention(*arguments, threads=threads, rows=rows, deferred=deferred)
    assert_within(result, *naive.integer_attention_rows(*arguments, rows, dtype, deferred))
