"""The overloads ``.rows`` as a program gets them: compiled by Inductor for any batch, against what they mean."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.kernels import OPERATORS, pack_weight
from tfmq_fx.kernels.checks import has_native_kernels
from tfmq_fx.kernels.inductor import register_native_kernels
from tfmq_fx.lowering.backends.inductor.compiler import compile_inductor

pytestmark = pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI")


class Rows(nn.Module):
    """Every overload, its rows an input, a feature's place in a table of them, repeated for pixels, or one for all."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("wide", (96, 32, 3, 3)), ("point", (48, 32, 1, 1))):
            weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            self.register_buffer(name, pack_weight(weight))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0], generator=generator) * 1e-3)
            self.register_buffer(f"{name}_sum", weight.sum((1, 2, 3), dtype=torch.int32))
            self.register_buffer(f"{name}_bias", torch.randn(shape[0], generator=generator))
        self.register_buffer("gain", torch.rand(64, generator=generator))
        self.register_buffer("offset", torch.randn(64, generator=generator))
        self.register_buffer("scales", torch.tensor([0.02, 0.05, 0.03]))
        self.register_buffer("zeros", torch.tensor([120, 7, 200]))
        of_attention = [[0.02, 0.03, 1 / 255, 0.03], [0.05, 0.03, 1 / 1000, 0.03], [0.01, 0.03, 1 / 400, 0.03]]
        self.register_buffer("attention_scales", torch.tensor(of_attention))
        self.register_buffer("attention_zeros", torch.tensor([[128, 120, 0, 125], [90, 120, 0, 125], [7, 120, 0, 125]]))
        self.register_buffer("groups", torch.tensor([2, 0, 1, 1]))

    def conv(self, x, rows, name="wide", residual=None, dtype=torch.float32, kernel=3, stride=1):
        constants = (getattr(self, f"{name}{part}") for part in ("", "_scale", "_sum", "_bias"))
        table = (self.scales, self.zeros, rows)
        return OPERATORS.integer_conv.rows(x, *constants, residual, *table, [kernel] * 2, [stride] * 2, dtype)

    def forward(self, x, y, shift, tokens, rows, one):
        table = (self.scales, self.zeros)
        affine = (self.gain, self.offset)
        grouped = self.groups.index_select(0, rows.clamp(0, 3))
        norm = OPERATORS.quantized_group_norm.rows
        image = OPERATORS.quantized_image.rows(x, 2, *table, rows, [0, 0, 1, 1])
        first = self.conv(image, rows, stride=2)
        narrow = self.conv(image, grouped, dtype=torch.bfloat16)
        pixels = OPERATORS.quantized_image.rows(x, 1, *table, grouped, [0] * 4)[:, :3, :4].reshape(-1, 1, 1, 32)
        heads = tokens.view(tokens.shape[0], -1, 3, 40).transpose(1, 2)
        of_attention = (0.15, self.attention_scales, self.attention_zeros)
        return (
            image,
            norm([x, y], shift[:, 64:], *affine, 8, 1e-5, True, *table, grouped, [1, 2, 0, 1]),
            norm([x, y], None, *affine, 8, 1e-5, True, *table, grouped, [0] * 4, self.gain + 0.5),
            OPERATORS.quantized_image.rows(y, 1, *table, rows, [1, 0, 1, 0], self.gain[:32] + 0.5),
            norm([narrow[..., :64].contiguous()], None, *affine, 4, 1e-5, False, *table, one, [0] * 4),
            first,
            self.conv(image, rows, residual=first, stride=2),
            narrow,
            self.conv(pixels, grouped, "point", kernel=1),
            self.conv(pixels, one, "point", kernel=1),
            OPERATORS.quantized_image.rows(narrow, 1, *table, one, [1, 1, 1, 1]),
            OPERATORS.integer_attention.rows(heads, heads, heads * 2, *of_attention, rows),
            OPERATORS.integer_attention.rows(heads, heads[:1], heads[:1], *of_attention, grouped),
            OPERATORS.integer_attention.rows(heads, heads, heads * 2, *of_attention, rows, True),
            OPERATORS.integer_attention.rows(*[heads.bfloat16()] * 3, *of_attention, one),
        )


def inputs(count):
    generator = torch.Generator().manual_seed(count)
    shapes = ((count, 8, 8, 32), (count, 8, 8, 32), (count, 128), (count, 50, 120))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    rows = torch.randint(-1, 5, (count,), generator=generator)  # some outside the table
    return (*drawn, rows, torch.tensor([count % 3]))


@pytest.fixture(scope="module")
def compiled():
    register_native_kernels()
    program = tfmq_fx.capture(Rows().eval(), inputs(3), batched=["x", "y", "shift", "tokens", "rows"])
    return program, compile_inductor(program)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_compiled_overloads_compute_what_they_mean(compiled, count):
    program, run = compiled
    with torch.no_grad():
        pairs = list(zip(run(*inputs(count)), program(*inputs(count)), strict=True))
    for given, wanted in pairs:
        assert given.shape == wanted.shape and given.dtype == wanted.dtype and given.is_contiguous()
        # A float sum in another order may turn one rounding in a hundred, by one step.
        steps = {torch.uint8: 1.0, torch.bfloat16: 2**-7 * float(wanted.float().abs().max())}
        step = steps.get(wanted.dtype, 2 / 255 * float(wanted.float().abs().max()))
        difference = (given.float() - wanted.float()).abs()
        assert float(difference.max()) <= step and float((difference > 1e-3 * step).float().mean()) < 1e-2
