"""Values at the edge of what the kernels can hold, compiled and by their definition in torch."""

import itertools

import pytest
import torch
from torch.nn import functional

from tests.kernels import compiled
from tests.kernels.toolchain import compiler
from tfmq_fx.kernels import OPERATORS, has_native_kernels, pack_weight

needs_library = pytest.mark.skipif(
    not has_native_kernels() or compiler() is None, reason="no AVX-512 VNNI, or no C++ compiler"
)
#: The kernel from a library, and its meaning in torch.
EITHER = pytest.mark.parametrize(
    "kernels", [pytest.param(compiled, marks=needs_library), OPERATORS], ids=["cpp", "torch"]
)
INF, NAN = float("inf"), float("nan")


def normalized(x, groups, eps=1e-5):
    """``x``, ``[N, H, W, C]``, normalized in float64."""
    return functional.group_norm(x.double().permute(0, 3, 1, 2), groups, eps=eps).permute(0, 2, 3, 1)


@needs_library
@pytest.mark.parametrize(
    ("size", "place"),
    [*itertools.product((4, 32, 256), ("first", "last", "first block", "half")), (1024, "first")],
)
def test_a_norm_is_right_however_far_off_a_pixel_is(size, place):
    x = torch.randn(1, size, size, 16, generator=torch.Generator().manual_seed(size))
    pixels = x.view(size * size, 16)
    at = {"first": slice(0, 1), "last": slice(-1, None), "first block": slice(0, 8), "half": slice(0, size * size // 2)}
    pixels[at[place]] += 3e4
    ones, zeros = torch.ones(16), torch.zeros(16)
    given = compiled.group_norm([x], None, ones, zeros, 4, 1e-5, False).double()
    wanted = normalized(x, 4)
    # Each value to a few units in its last place: at most what torch's own float32 is off by.
    assert float((given - wanted).abs().max() / wanted.abs().max()) < 2e-6
    quiet = slice(size * size // 2, -1)
    apart = (given - wanted).view(-1, 16)[quiet].norm() / wanted.reshape(-1, 16)[quiet].norm()
    assert float(apart) < 2e-5


@needs_library
def test_a_norm_of_a_constant_and_of_what_has_no_spread():
    ones, bias = torch.ones(16), torch.linspace(-1, 1, 16)
    for value in (0.0, 1e-20, 7.0, -1e4):
        given = compiled.group_norm([torch.full((2, 33, 5, 16), value)], None, ones, bias, 4, 1e-5, False)
        assert float((given - bias).abs().max()) < 1e-6 + abs(value) * 1e-4


@EITHER
@pytest.mark.parametrize("narrow", [False, True])
def test_quantizing_saturates_and_takes_nan_to_zero(kernels, narrow):
    huge = [2.0**31 * 0.02, 2.0**33, 1e30, 3e38, INF]
    row = torch.tensor([*huge, *(-value for value in huge), NAN, -NAN, 0.0, 255 * 0.02, -0.0, 1e-38])
    x = row.to(torch.bfloat16 if narrow else torch.float32).reshape(1, 1, 1, 16)
    for zero in (0, 77, 255):
        given = kernels.quantized_image(x, 1, float(torch.tensor(0.02)), zero, [0, 0, 0, 0]).flatten().tolist()
        assert given == [255] * 5 + [0] * 5 + [0, 0, zero, 255, zero, zero]


@EITHER
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 5, 700])
def test_a_norm_passes_on_what_is_no_number(kernels, value, place):
    """One of them makes its group NaN, as in torch, and no other; as a byte it is 0."""
    x = torch.randn(2, 27, 27, 64)
    x.view(-1, 64)[place, 20] = value
    constants = (None, torch.ones(64), torch.zeros(64), 4, 1e-5)
    for silu in (False, True):
        given = kernels.group_norm([x], *constants, silu)
        lost = torch.zeros_like(given, dtype=torch.bool)
        lost[0, :, :, 16:32] = True
        assert torch.equal(given.isnan(), lost)
    if kernels is compiled:
        quantized = compiled.group_norm([x], *constants, False, (0.02, 128))
    else:
        quantized = OPERATORS.quantized_group_norm([x], *constants, False, 0.02, 128, [0, 0, 0, 0])
    assert not quantized[lost].any() and float((quantized[~lost] > 0).float().mean()) > 0.9


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_passes_on_what_its_residual_holds(kernels, dtype):
    weight = pack_weight(torch.zeros(16, 4, 1, 1, dtype=torch.int8))
    x = torch.zeros(1, 1, 16, 4, dtype=torch.uint8)
    residual = torch.zeros(1, 1, 16, 16, dtype=dtype)
    patterns = torch.tensor([0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7F81, 0x7F7F], dtype=torch.int32)
    residual[0, 0, :8, 3] = patterns.to(torch.int16).view(torch.bfloat16).to(dtype)
    given = kernels.integer_conv(x, weight, torch.ones(16), torch.zeros(16), residual, [1, 1], [1, 1], dtype)
    assert torch.equal(given.isnan(), residual.isnan())
    assert torch.equal(given[~given.isnan()], residual[~residual.isnan()])


@needs_library
def test_sums_as_long_as_an_int32_holds():
    """The longest that a layer may have, at their extremes, of both signs."""
    depth = 4 * ((2**31 - 1) // (255 * 128) // 4)
    x = torch.full((1, 1, 7, depth), 255, dtype=torch.uint8)
    for byte in (-128, 127):
        weight = torch.full((16, depth, 1, 1), byte, dtype=torch.int8)
        arguments = (x, pack_weight(weight), torch.ones(16), torch.zeros(16), None, [1, 1], [1, 1], torch.float32)
        assert (compiled.integer_conv(*arguments) == float(torch.tensor(255.0 * byte * depth))).all()


@needs_library
@pytest.mark.parametrize(("keys", "depth"), [(40_000, 4), (3, 33_024)])
def test_attention_over_many_keys_and_over_a_long_depth(keys, depth):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, depth, generator=generator) * 0.02 for n in (2, keys))
    value = torch.rand(1, 1, keys, depth, generator=generator)
    scales = [float(torch.tensor(scale)) for scale in (1e-5, 1e-5, 1e-6 if keys > 3 else 1 / 255, 1 / 255)]
    for zero in (0, 255):
        arguments = (query, key, value, 1.0, scales, [zero, zero, 0])
        given, wanted = compiled.integer_attention(*arguments), OPERATORS.integer_attention(*arguments)
        assert float((given - wanted).norm() / wanted.norm()) < 1e-3


@needs_library
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch):
    x, constants = torch.randn(batch, 3, 5, 32), (None, torch.ones(32), torch.zeros(32), 4, 1e-5, True)
    for threads in (1, 4):
        norm = compiled.group_norm([x], *constants, threads=threads)
        image = compiled.quantized_image(x, 2, 0.5, 3, [1, 0, 2, 1], threads=threads)
        heads = x.reshape(batch, 3, 5, 32)
        mixed = compiled.integer_attention(heads, heads, heads, 1.0, [0.5] * 4, [3] * 3, threads=threads)
        shapes = [list(result.shape) for result in (norm, image, mixed)]
        assert shapes == [[batch, 3, 5, 32], [batch, 9, 11, 32], [batch, 5, 3, 32]]
