"""The operator of the pointwise convolution: what it means, what it refuses, and how Inductor compiles it."""

import itertools

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx import LoweringError
from tfmq_fx.kernels import OPERATORS, pack_weight
from tfmq_fx.kernels.checks import has_native_kernels
from tfmq_fx.kernels.inductor import register_native_kernels
from tfmq_fx.lowering.backends.inductor.compiler import compile_inductor

DEPTH, CHANNELS = 32, 48


def arguments(**other):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(-127, 128, (CHANNELS, DEPTH, 1, 1), generator=generator, dtype=torch.int8)
    found = {
        "x": torch.randn(2, 3, 5, DEPTH, generator=generator),
        "weight": pack_weight(plain),
        "weight_scale": torch.rand(CHANNELS, generator=generator) * 1e-2,
        "weight_sum": plain.sum((1, 2, 3), dtype=torch.int32),
        "bias": torch.randn(CHANNELS, generator=generator),
        "residual": None,
        "scale": 2e-4,
        "zero_point": 30000,
        "dtype": torch.float32,
        "factors": None,
    }
    return plain, {**found, **other}


def by_rows(**other):
    plain, found = arguments()
    del found["scale"], found["zero_point"]
    table = {"scales": torch.tensor([2e-4, 1e-4]), "zero_points": torch.tensor([30000, 20000])}
    return plain, {**found, **table, "rows": torch.tensor([1, 0]), **other}


def test_it_is_a_convolution_of_what_16_bits_hold():
    plain, operands = arguments()
    x = operands["x"].permute(0, 3, 1, 2)
    rounded = torch.fake_quantize_per_tensor_affine(x, 2e-4, 30000, 0, 65535)
    weight = plain * operands["weight_scale"].reshape(-1, 1, 1, 1)
    wanted = torch.nn.functional.conv2d(rounded, weight, operands["bias"]).permute(0, 2, 3, 1)
    torch.testing.assert_close(OPERATORS.integer_pointwise_conv(**operands), wanted, rtol=1e-4, atol=1e-5)


def test_each_item_has_its_row():
    _, operands = by_rows()
    result = OPERATORS.integer_pointwise_conv.rows(**operands)
    _, single = arguments()
    for item, (scale, zero_point) in enumerate(((1e-4, 20000), (2e-4, 30000))):
        one = {**single, "x": single["x"][item : item + 1], "scale": scale, "zero_point": zero_point}
        wanted = OPERATORS.integer_pointwise_conv(**one)
        torch.testing.assert_close(result[item : item + 1], wanted)


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("x", torch.zeros(2, 3, 5, 24), "no multiple of 16"),
        ("x", torch.zeros(2, 3, 5, DEPTH, dtype=torch.uint8), "an image is torch.uint8"),
        ("x", torch.zeros(2, 3, DEPTH), "an image has 3 axes"),
        ("weight_sum", torch.zeros(CHANNELS), "the sums are torch.float32"),
        ("bias", torch.zeros(3), "bias is torch.float32"),
        ("scale", 0.0, "a scale is 0.0"),
        ("zero_point", 65536, "the zero point 65536 is no number from 0 to 65535"),
        ("factors", torch.ones(3), "factors is torch.float32"),
        ("residual", torch.zeros(2, 3, 5, CHANNELS, dtype=torch.bfloat16), "the residual is torch.bfloat16"),
        ("dtype", torch.float16, "the result cannot be torch.float16"),
    ],
)
def test_what_the_kernel_would_read_wrongly_is_refused(name, value, problem):
    with pytest.raises(LoweringError, match=f"integer_pointwise_conv cannot take its arguments: .*{problem}"):
        OPERATORS.integer_pointwise_conv(**arguments(**{name: value})[1])
    if name not in ("scale", "zero_point"):
        with pytest.raises(LoweringError, match=problem):
            OPERATORS.integer_pointwise_conv.rows(**by_rows(**{name: value})[1])


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(LoweringError, match="unlike numbers of rows"):
        OPERATORS.integer_pointwise_conv.rows(**by_rows(zero_points=torch.tensor([3]))[1])


class Forms(nn.Module):
    """Both overloads, with and without residual and factors, in both types."""

    FORMS = tuple(itertools.product((False, True), (False, True), (torch.float32, torch.bfloat16)))

    def __init__(self):
        super().__init__()
        _, operands = arguments()
        for name in ("weight", "weight_scale", "weight_sum", "bias"):
            self.register_buffer(name, operands[name])
        self.register_buffer("scales", torch.tensor([2e-4, 1e-4]))
        self.register_buffer("zeros", torch.tensor([30000, 20000]))
        self.register_buffer("factors", torch.linspace(0.5, 1.5, DEPTH))

    def forward(self, x, residual, rows):
        results = []
        for added, scaled, dtype in self.FORMS:
            constants = (self.weight, self.weight_scale, self.weight_sum, self.bias)
            operands = (x.permute(0, 2, 3, 1).to(dtype), *constants, residual.to(dtype) if added else None)
            factors = self.factors if scaled else None
            results.append(OPERATORS.integer_pointwise_conv(*operands, 1.5e-4, 31234, dtype, factors))
            table = (self.scales, self.zeros, rows)
            results.append(OPERATORS.integer_pointwise_conv.rows(*operands, *table, dtype, factors))
        return results


@pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI")
def test_compiled_it_computes_what_it_means():
    register_native_kernels()
    module = Forms().eval()

    def inputs(count):
        generator = torch.Generator().manual_seed(count)
        rows = torch.randint(-1, 3, (count,), generator=generator)
        x, residual = ((count, DEPTH, 5, 7), (count, 5, 7, CHANNELS))
        return torch.randn(x, generator=generator), torch.randn(residual, generator=generator), rows

    program = tfmq_fx.capture(module, inputs(2), timestep="rows")
    run, counter = compile_inductor(program)
    assert sum(counter.counts.values()) == 2 * len(Forms.FORMS)
    for count in (1, 2, 5):
        for wanted, found in zip(program(*inputs(count)), run(*inputs(count)), strict=True):
            exact = wanted.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-5 if exact else 2e-2, atol=2e-5 if exact else 2e-2)
