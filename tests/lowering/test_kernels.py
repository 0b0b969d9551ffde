"""Our integer kernels: the compiled operators against their definition, and a denoiser that runs on them."""

import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import LoweringError
from tfmq_fx.kernels import OPERATORS, block_columns, pack_weight, unpack_weight
from tfmq_fx.kernels.checks import has_native_kernels
from tfmq_fx.kernels.inductor import register_native_kernels
from tfmq_fx.lowering.backends.inductor import backend, native
from tfmq_fx.lowering.backends.inductor.compiler import compile_inductor
from tfmq_fx.lowering.report.reasons import NO_EXACT_BYTES

needs_kernels = pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI")


class Operators(nn.Module):
    """Every operator, in the forms that the passes make; all outputs are returned."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("wide", (96, 32, 3, 3)), ("narrow", (80, 32, 1, 1))):
            weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            self.register_buffer(name, pack_weight(weight))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0], generator=generator) * 1e-4)
            self.register_buffer(f"{name}_bias", torch.randn(shape[0], generator=generator))
        self.register_buffer("gain", torch.rand(64, generator=generator))
        self.register_buffer("offset", torch.randn(64, generator=generator))

    def conv(self, x, name, residual=None, *, kernel=3, stride=1, dtype=torch.float32):
        constants = (getattr(self, f"{name}{part}") for part in ("", "_scale", "_bias"))
        return OPERATORS.integer_conv(x, *constants, residual, [kernel] * 2, [stride] * 2, dtype)

    def forward(self, x, y, shift, tokens):
        affine = (self.gain, self.offset)
        norm = OPERATORS.quantized_group_norm([x, y], shift[:, 64:], *affine, 8, 1e-5, True, 0.02, 13, [1, 2, 0, 1])
        image = OPERATORS.quantized_image(x, 2, 0.02, 120, [0, 0, 1, 1])
        first = self.conv(image, "wide", stride=2)
        narrow = self.conv(image, "wide", dtype=torch.bfloat16)
        heads = tokens.view(tokens.shape[0], -1, 3, 40).transpose(1, 2)
        few = heads[:, :, :77]
        parameters = (0.15, [0.004, 0.02, 0.003, 0.04], [128, 120, 125])
        return (
            norm,
            image,
            first,
            self.conv(image, "wide", first, stride=2),
            narrow,
            self.conv(image, "narrow", kernel=1),
            OPERATORS.group_norm([x], None, *(constant[:32] for constant in affine), 8, 1e-5, False),
            OPERATORS.group_norm([narrow[..., :64].contiguous()], None, *affine, 4, 1e-5, True),
            OPERATORS.quantized_image(narrow, 1, 0.05, 7, [1, 1, 1, 1]),
            OPERATORS.integer_attention(heads, few, few * 2, *parameters),
            OPERATORS.integer_attention(heads.bfloat16(), few.bfloat16(), few.bfloat16(), *parameters),
        )


def inputs(count):
    generator = torch.Generator().manual_seed(count)
    shapes = ((count, 8, 8, 32), (count, 8, 8, 32), (count, 128), (count, 100, 120))
    x, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return (x + 3, *rest)  # a mean of three standard deviations, where sums of squares would cancel


@pytest.fixture(scope="module")
def compiled():
    register_native_kernels()
    program = tfmq_fx.capture(Operators().eval(), inputs(2))
    return program, compile_inductor(program)[0]


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_compiled_operators_compute_what_their_definition_says(compiled, count):
    program, run = compiled
    with torch.no_grad():
        pairs = list(zip(run(*inputs(count)), program(*inputs(count)), strict=True))
    for given, wanted in pairs:
        assert given.shape == wanted.shape and given.dtype == wanted.dtype and given.is_contiguous()
        # A float sum in another order may turn one rounding in a hundred, by one step.
        steps = {torch.uint8: 1.0, torch.bfloat16: 2**-7 * float(wanted.float().abs().max())}
        step = steps.get(wanted.dtype, 1e-2 * float(wanted.float().std()))
        difference = (given.float() - wanted.float()).abs()
        assert float(difference.max()) <= step and float((difference > 1e-3 * step).float().mean()) < 1e-2


@pytest.mark.parametrize("shape", [(64, 16, 3, 3), (48, 4, 1, 1), (96, 8, 1, 5), (128, 32, 3, 3)])
def test_packing_is_reversible(shape):
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = pack_weight(weight)
    assert packed.shape[3] == block_columns(shape[0]) and packed.numel() == weight.numel()
    assert torch.equal(unpack_weight(packed, shape[1], shape[2:]), weight)


def test_channels_that_do_not_fill_a_vector_have_no_block():
    assert [block_columns(n) for n in (256, 320, 144, 80, 16, 24, 3)] == [64, 64, 48, 16, 16, 0, 0]


def test_a_definition_is_an_operator():
    x = torch.randint(0, 256, (2, 5, 5, 16), dtype=torch.uint8)
    weight = pack_weight(torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8))
    arguments = (x, weight, torch.rand(16), torch.rand(16), None, [3, 3], [1, 1], torch.float32)
    torch.library.opcheck(OPERATORS.integer_conv.default, arguments)
    image = torch.randn(2, 4, 4, 16)
    gain = torch.rand(16)
    torch.library.opcheck(OPERATORS.quantized_image.default, (image, 2, 0.1, 3, [0, 1, 0, 1]))
    norm = ([image], None, gain, gain, 4, 1e-5, True)
    torch.library.opcheck(OPERATORS.group_norm.default, norm)
    torch.library.opcheck(OPERATORS.quantized_group_norm.default, (*norm, 0.1, 3, [1, 1, 1, 1]))
    heads = torch.randn(2, 3, 5, 8)
    quantization = (0.3, [0.01, 0.01, 0.004, 0.02], [128, 128, 128])
    torch.library.opcheck(OPERATORS.integer_attention.default, (heads, heads, heads, *quantization))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 48),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    ).eval()
    calibration = [{"sample": torch.randn(4, 2, 8, 8), "timestep": TIMESTEPS[:4]}]
    return tfmq_fx.quantize(model, None, calibration, timesteps=TIMESTEPS, progress=False)


@needs_kernels
def test_a_denoiser_runs_on_them(program):
    denoiser = tfmq_fx.lower(program, precision="f32")
    report = denoiser.report
    assert report.kernels == "tfmq_fx (AVX-512 VNNI, f32 between them)" and report.kernels in str(report)
    # Both products of the four attentions included; what is left in float are the two ends.
    assert report.integer_kernels == report.eligible
    assert [e.name for e in report.entries if e.kernel == "float"] == ["conv_in", "conv_out"]
    assert sum(e.operator == "matmul" for e in report.entries) == 8
    reference = tfmq_fx.lower(program, "reference")
    for count in (1, 3, 7):
        x = torch.randn(count, 2, 8, 8)
        assert relative(denoiser(x, 300).sample, reference(x, 300).sample) < 0.05
        t = TIMESTEPS[torch.arange(count) % 10]
        assert relative(denoiser(x, t).sample, reference(x, t).sample) < 0.05


@needs_kernels
def test_a_package_holds_them(program, tmp_path):
    path = tmp_path / "denoiser.pt2"
    made = tfmq_fx.lower(program, "aot", path=path)
    assert made.report.kernels == "tfmq_fx (AVX-512 VNNI, bf16 between them)"
    assert made.report.integer_kernels == made.report.eligible
    # A new process knows neither the model nor the class of its result.
    call = "tfmq_fx.load_denoiser(sys.argv[1])(torch.zeros(1, 2, 8, 8), 300)"
    script = f"import sys, torch, tfmq_fx; print({call}.sample.shape)"
    shown = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "[1, 2, 8, 8]" in shown.stdout
    loaded, x = tfmq_fx.load_denoiser(path), torch.randn(3, 2, 8, 8)
    assert loaded.report == made.report
    assert torch.equal(loaded(x, 300).sample, made(x, 300).sample)
    assert relative(loaded(x, 300).sample, tfmq_fx.lower(program, "reference")(x, 300).sample) < 0.05


@pytest.mark.parametrize("groups", [1, 2, None])
def test_without_vnni_nothing_saturates_silently(groups, monkeypatch):
    monkeypatch.setattr(native, "has_native_kernels", lambda: False)
    for module in (backend, native):
        monkeypatch.setattr(module, "sums_bytes_exactly", lambda: False)
    config = tfmq_fx.QuantizationConfig(activation_groups=groups, shortcut_bits=None)
    program = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program)
    assert denoiser.report.integer_kernels == 0 and denoiser.report.kernels == ""
    assert sum(e.reason == NO_EXACT_BYTES for e in denoiser.report.entries) == 7
    x, t = batch(3)
    assert relative(denoiser(x, t), tfmq_fx.lower(program, "reference")(x, t)) < 0.01


def test_a_precision_that_there_is_not(program):
    with pytest.raises(LoweringError, match=r"precision='f16'.*'f32'"):
        tfmq_fx.lower(program, precision="f16")
