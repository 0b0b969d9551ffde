"""Programs with activation ranges per timestep: any mix of timesteps in one call on our kernels, split on oneDNN's."""

import functools

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import tfmq_fx
from tests.lowering.test_stages import cut, inputs
from tests.models import TIMESTEPS, Block, PromptDenoiser, SmallDenoiser, relative
from tests.processor import on_integer_kernels
from tfmq_fx import QuantizationConfig
from tfmq_fx.kernels.checks import has_native_kernels
from tfmq_fx.lowering.backends.inductor import backend, native
from tfmq_fx.lowering.report.reasons import ROWS_UNCOVERED
from tfmq_fx.passes.support.byte_quantizers import row_table

aten = torch.ops.aten
needs_kernels = pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI")
MANY = {"activation_groups": 10}


def widen(model):
    """Give a small denoiser channels that fill vectors."""
    model.enter, model.leave = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
    model.down, model.up, model.qkv = Block(16, 16), Block(32, 16), nn.Linear(16, 48)


class WidePromptDenoiser(PromptDenoiser):
    """Of channels that fill vectors, but for what the prompt's attention gives back."""

    def __init__(self) -> None:
        super().__init__()
        widen(self)


@functools.cache
def prompted(**config):
    torch.manual_seed(0)
    batches = [inputs((0, 1, 2, 1, 0), TIMESTEPS[n : n + 5].tolist(), seed=n) for n in range(6)]
    return tfmq_fx.quantize(
        WidePromptDenoiser().eval(), QuantizationConfig(**config), batches, timesteps=TIMESTEPS, progress=False
    )


class LoudDenoiser(SmallDenoiser):
    """Half of it is not normalized: there activations are as loud as the input, so each timestep needs its own row."""

    def __init__(self) -> None:
        super().__init__()
        widen(self)
        self.up.norm = nn.Identity()


def loudness(timesteps):
    """As under a variance-exploding schedule."""
    return (timesteps.double() / 150).exp().float()


@functools.cache
def unconditional():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    calibration = [(torch.randn(4, 1, 8, 8, generator=generator) * loudness(t), t.expand(4)) for t in TIMESTEPS]
    config = QuantizationConfig(**MANY, activation_range="minmax", shortcut_bits=None)
    return tfmq_fx.quantize(LoudDenoiser().eval(), config, calibration, timesteps=TIMESTEPS, progress=False)


@pytest.fixture
def on_onednn(monkeypatch):
    """Inductor without our kernels, as on processors that do not run them."""
    for module in (backend, native):
        monkeypatch.setattr(module, "has_native_kernels", lambda: False)


def mixed(count):
    generator = torch.Generator().manual_seed(count)
    t = TIMESTEPS[torch.randint(0, 10, (count,), generator=generator)]
    return torch.randn(count, 1, 8, 8, generator=generator) * loudness(t)[:, None, None, None], t


def assert_item_by_item(denoiser, program, tolerance=2e-3):
    """Each item of a mixed batch is what the denoiser gives it alone, and near what the program gives it."""
    for count in (1, 2, 7):
        x, t = mixed(count)
        together = denoiser(x, t)
        for i in range(count):
            one = slice(i, i + 1)
            # Another batch is cut into other parts for threads, and floats in another order may turn a rounding.
            assert relative(together[one], denoiser(x[one], int(t[i]))) < tolerance
            assert relative(together[one], program(x[one], t[one])) < tolerance


def assert_all_integer(report):
    # The products of its attention, which stand in no module of their own, are not told apart by the report.
    layers = [entry for entry in report.entries if entry.operator != "matmul"]
    assert [entry.name for entry in layers if entry.kernel == "float"] == ["enter", "leave"] and len(layers) > 8


@needs_kernels
def test_any_mix_of_timesteps_is_one_call_of_our_kernels(monkeypatch):
    program = unconditional()
    denoiser = tfmq_fx.lower(program, "inductor", precision="f32")
    assert_all_integer(denoiser.report)
    assert_item_by_item(denoiser, program)
    calls = []
    run = denoiser._call
    monkeypatch.setattr(denoiser, "_call", lambda call: calls.append(call.batch) or run(call))
    denoiser(*mixed(7))
    assert calls == [7]


@needs_kernels
def test_the_report_counts_every_layer_of_a_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(32, 48),
        norm_num_groups=8, attention_head_dim=16, **blocks,
    ).eval()  # fmt: skip
    calibration = [{"sample": torch.randn(4, 2, 8, 8), "timestep": t.expand(4)} for t in TIMESTEPS]
    config = QuantizationConfig(**MANY)
    program = tfmq_fx.quantize(model, config, calibration, timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program, "inductor")
    report = denoiser.report
    assert report.integer_kernels == report.eligible
    assert [entry.name for entry in report.entries if entry.kernel == "float"] == ["conv_in", "conv_out"]
    assert sum(entry.operator == "matmul" for entry in report.entries) == 8
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([900, 0, 400])
    assert relative(denoiser(x, t).sample, program(x, t).sample) < 0.05


@needs_kernels
def test_a_package_takes_any_mix_too(tmp_path):
    program, path = unconditional(), tmp_path / "denoiser.pt2"
    made = tfmq_fx.lower(program, "aot", path=path, precision="f32")
    assert_all_integer(made.report)
    loaded = tfmq_fx.load_denoiser(path)
    assert loaded.report == made.report
    assert_item_by_item(loaded, program)
    x, t = mixed(5)
    assert torch.equal(loaded(x, t), made(x, t))


def test_a_row_of_another_timestep_would_be_seen():
    """The tolerance above is far below what the ranges of other timesteps do to an item."""
    program, (x, t) = unconditional(), mixed(7)
    assert len(set(t.tolist())) > 3
    wrong = [relative(program(x[i : i + 1], other), program(x[i : i + 1], t[i : i + 1])) for i, other in
             enumerate(t.flip(0).split(1)) if other != t[i]]  # fmt: skip
    assert min(wrong) > 0.05


MIXED = (
    ((0, 1, 2, 0, 1), (0, 500, 900, 0, 300)),
    ((2, 2, 0), (900, 100, 900)),
    ((0, 1, 2, 0, 1), (100, 400, 900, 0, 300)),
    ((1,), (700,)),
    ((0, 0), (300, 300)),
)


def assert_prompts_are_right(denoiser, program, tolerance):
    """Mixed timesteps and prompts, again and again, so that what is kept from call to call is used."""
    for prompts, timesteps in (*MIXED, *MIXED):
        given = inputs(prompts, timesteps)
        single = [[tensor[i : i + 1] for tensor in given] for i in range(len(prompts))]
        wanted = torch.cat([program(*one) for one in single])
        assert relative(denoiser(*given), wanted) < tolerance
        assert relative(torch.cat([denoiser(*one) for one in single]), wanted) < tolerance


def test_what_crosses_stages_is_the_row_of_each_item_and_no_parameters():
    """Kernels take a table and rows: each stage gathers the parameters that its own quantizers read."""
    _, stages = cut(prompted(**MANY))
    assert len(stages.layout.stages) == 4
    assert not any(name.startswith("index_select") for stage in stages.layout.stages for name in stage.outputs)
    last = stages.graph_modules[-1]
    inputs_of_rows = [n for n in last.graph.nodes if n.op == "placeholder" and n.meta["val"].dtype == torch.int64]
    assert len(inputs_of_rows) == 1
    layers = [n for n in last.graph.nodes if n.target in (aten.conv2d.default, aten.linear.default)]
    assert sum(row_table(layer.args[0]) is not None for layer in layers) >= 6


def test_prompts_and_timesteps_on_the_reference():
    program = prompted(**MANY)
    denoiser = tfmq_fx.lower(program, "reference", reuse=True)
    assert_prompts_are_right(denoiser, program, 1e-5)


@needs_kernels
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("reuse", [True, False])
def test_prompts_and_timesteps_on_our_kernels(reuse, precision):
    program = prompted(**MANY)
    denoiser = tfmq_fx.lower(program, "inductor", reuse=reuse, precision=precision)
    report = denoiser.report
    assert ("reused from call to call" in report.conditioning) is reuse
    assert report.integer_kernels == report.eligible
    integer = {entry.name for entry in report.entries if entry.kernel == "integer"}
    assert integer >= {"down.conv1", "down.conv2", "down.embed", "qkv", "up.conv1", "up.shortcut", "up.embed"}
    (uncovered,) = [entry for entry in report.entries if entry.reason == ROWS_UNCOVERED]
    assert uncovered.name == "back" and uncovered.kernel == "float"
    assert_prompts_are_right(denoiser, program, 0.05)


@needs_kernels
def test_a_package_keeps_what_the_prompts_give(tmp_path):
    program, path = prompted(**MANY), tmp_path / "denoiser.pt2"
    tfmq_fx.lower(program, "aot", path=path, reuse=True)
    assert_prompts_are_right(tfmq_fx.load_denoiser(path), program, 0.05)


@pytest.mark.parametrize("reuse", [True, False])
def test_prompts_and_timesteps_on_onednn(on_onednn, reuse):
    """Its kernels take one scale a call: a batch is split by timestep group, and nothing is cut out."""
    program = prompted(**MANY)
    denoiser = tfmq_fx.lower(program, "inductor", reuse=reuse)
    report = denoiser.report
    assert "reused from call to call" not in report.conditioning and "tfmq_fx" not in report.kernels
    if report.kernels:
        assert report.integer_kernels == report.eligible > 7
    assert_prompts_are_right(denoiser, program, 0.02)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_engines_take_prompts_and_timesteps(name):
    pytest.importorskip(name)
    program = prompted(**MANY)
    denoiser = tfmq_fx.lower(program, name)
    assert on_integer_kernels(denoiser.report, 8)
    assert_prompts_are_right(denoiser, program, 0.02)
