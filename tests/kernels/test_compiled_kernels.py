"""The kernels as a compiler makes them, on drawn shapes, layouts and values, against a naive reference.

They are compiled from the headers with Inductor's options into one library and called by pointer, because Inductor
itself takes seconds for every set of shapes; ``test_through_inductor.py`` is its turn. ``make nightly`` draws a
thousand cases of each.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import compiled, naive
from tests.kernels.toolchain import compiler
from tfmq_fx.kernels import has_native_kernels, pack_weight

pytestmark = [
    pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
]

FLOATS = st.sampled_from((torch.float32, torch.bfloat16))
BATCHES = st.integers(1, 5)
SIZES = st.sampled_from((1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 33))
THREADS = st.sampled_from((1, 2, 3, 8))
VECTORS = st.one_of(st.integers(1, 6), st.integers(1, 32))
BYTES = st.integers(0, 255)
#: Makes a number for each of ``count`` channels, or none.
FACTORS = st.sampled_from(
    (lambda *_: None, lambda generator, count: torch.exp2(2 * torch.randn(count, generator=generator)))
)
PADDING = st.tuples(*[st.integers(0, 3)] * 4)
SEEDS = st.integers(0, 2**31)
#: How large values are, and how far off their mean is.
SPREADS, MEANS = st.sampled_from((1e-3, 1.0, 30.0, 1e4)), st.sampled_from((0.0, 3.0, -100.0))


def scales(*choices):
    """Scales as observers make them: numbers of float32."""
    return st.sampled_from([float(torch.tensor(choice)) for choice in choices])


SCALES = scales(1e-7, 0.004, 0.02, 0.3, 7.0)


def assert_within(given, exact, error):
    assert list(given.shape) == list(exact.shape)
    apart = (given.double() - exact).abs() - error
    assert bool((apart <= 0).all()), f"off by {float(apart.max())} more than {float(error.max())} at most"


def values(generator, size, dtype, spread=1.0, mean=0.0):
    drawn = torch.randn(size, generator=generator) * spread + mean
    if drawn.numel() and int(torch.randint(0, 3, (1,), generator=generator)) == 0:
        place = int(torch.randint(0, drawn.numel(), (1,), generator=generator))
        drawn.view(-1)[place] *= 1e4
    return drawn.to(dtype)


@given(SEEDS, BATCHES, SIZES, SIZES, VECTORS, VECTORS, st.data())
def test_integer_conv(seed, batch, height, width, depth, channels, data):
    kernel = [data.draw(st.sampled_from((1, 3, 5, 7))) for _ in range(2)]
    stride, threads = [data.draw(st.integers(1, 3)) for _ in range(2)], data.draw(THREADS)
    dtype, residual = data.draw(FLOATS), data.draw(st.booleans())
    depth = 4 * depth if data.draw(st.booleans()) else 16 * depth
    channels = 16 * channels
    if depth * channels * kernel[0] * kernel[1] > 2**21 or max(kernel) > 7:
        channels = 16
    generator = torch.Generator().manual_seed(seed)
    size = (batch, height + kernel[0] - 1, width + kernel[1] - 1, depth)
    x = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    plain = torch.randint(-128, 128, (channels, depth, *kernel), generator=generator, dtype=torch.int8)
    if data.draw(st.booleans()):  # as far as a sum can get
        x.fill_(255)
        plain.fill_(data.draw(st.sampled_from((-128, 127))))
    scale = torch.rand(channels, generator=generator) * 1e-4
    bias = torch.randn(channels, generator=generator)
    rows, columns = (-(-n // s) for n, s in zip((height, width), stride, strict=True))
    added = values(generator, (batch, rows, columns, channels), dtype) if residual else None
    packed = pack_weight(plain)
    result = compiled.integer_conv(x, packed, scale, bias, added, kernel, stride, dtype, threads=threads)
    assert_within(result, *naive.integer_conv(x, plain, scale, bias, added, stride, dtype))


@given(SEEDS, BATCHES, SIZES, SIZES, VECTORS, st.integers(0, 8), st.data())
def test_group_norm(seed, batch, height, width, first, second, data):
    counts = [16 * first] + ([16 * second] if second else [])
    channels = sum(counts)
    groups = data.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    dtype, silu, threads = data.draw(FLOATS), data.draw(st.booleans()), data.draw(THREADS)
    spread, mean = data.draw(SPREADS), data.draw(MEANS)
    generator = torch.Generator().manual_seed(seed)
    x = [values(generator, (batch, height, width, n), dtype, spread, mean) for n in counts]
    rows = data.draw(st.sampled_from((0, 1, batch)))
    wide = values(generator, (rows, channels + 48), torch.float32, spread)
    shift = wide[:, 16 : 16 + channels] if rows else None  # the rows of a table, of which this block reads a part
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    arguments = (x, shift, weight, bias, groups, 1e-5, silu)
    exact, error = naive.group_norm(*arguments)
    assert_within(compiled.group_norm(*arguments, threads=threads), exact, error)
    scale, zero, padding = data.draw(scales(0.004, 0.02, 0.3)), data.draw(BYTES), data.draw(PADDING)
    factors = data.draw(FACTORS)(generator, channels)
    result = compiled.group_norm(*arguments, (scale, zero), padding, factors, threads=threads)
    place, room = naive.quantized(*naive.times(exact, error, factors), scale, zero)
    top, left, bottom, right = padding
    exact, room = naive.padded(place, zero, padding), torch.nn.functional.pad(room, [0, 0, left, right, top, bottom])
    assert_within(result, exact, room)


@given(SEEDS, BATCHES, SIZES, SIZES, VECTORS, st.integers(1, 3), BYTES, PADDING, FLOATS, SPREADS, st.data())
def test_quantized_image(seed, batch, height, width, channels, enlarge, zero, padding, dtype, spread, data):
    generator, threads, scale = torch.Generator().manual_seed(seed), data.draw(THREADS), data.draw(SCALES)
    x = values(generator, (batch, height, width, 16 * channels), dtype, spread)
    factors = data.draw(FACTORS)(generator, 16 * channels)
    result = compiled.quantized_image(x, enlarge, scale, zero, padding, factors, threads=threads)
    exact = (
        naive.steps(naive.scaled(x, factors), scale, zero).repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    )
    assert torch.equal(result.double(), naive.padded(exact, zero, padding))  # to the bit


def laid_out(generator, size, dtype, layout):
    """``[N, heads, rows, depth]``, as models make it: a head behind the other, or out of one product of all three."""
    batch, heads, rows, depth = size
    if layout == "expanded":  # one head for all, without a copy
        return values(generator, (batch, 1, rows, depth), dtype).expand(size)
    if layout == "own":
        return values(generator, size, dtype)
    wide = values(
        generator, (batch, rows, 3, heads, depth) if layout == "joined" else (batch, rows, heads, depth), dtype
    )
    return (wide[:, :, 1] if layout == "joined" else wide).transpose(1, 2)


@given(SEEDS, BATCHES, st.integers(1, 6), st.integers(1, 70), st.integers(1, 150), st.integers(1, 40), st.data())
def test_integer_attention(seed, batch, heads, rows, keys, depth, data):
    layout = st.sampled_from(("own", "turned", "joined", "expanded"))
    dtype, threads, shared = data.draw(FLOATS), data.draw(THREADS), st.sampled_from((1, batch))
    groups = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    key_heads, value_heads = (data.draw(st.sampled_from((1, groups))) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (data.draw(shared), heads, rows, 4 * depth),
        (data.draw(shared), key_heads, keys, 4 * depth),
        (data.draw(shared), value_heads, keys, 4 * depth),
    )
    operands = [laid_out(generator, size, dtype, data.draw(layout)) for size in sizes]
    drawn = [scales(0.004, 0.02, 0.2), scales(0.004, 0.02, 0.2), scales(1 / 255, 1 / 2000), scales(0.02, 0.5)]
    parameters = [data.draw(choice) for choice in drawn]
    zeros = [data.draw(BYTES) for _ in range(3)]
    arguments = (*operands, data.draw(st.sampled_from((1.0, 0.125))), parameters, zeros)
    deferred = data.draw(st.booleans())
    result = compiled.integer_attention(*arguments, threads=threads, deferred=deferred)
    assert_within(result, *naive.integer_attention(*arguments, dtype, deferred))
