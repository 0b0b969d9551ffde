"""What no rule quantizes is listed with its share of the work, and what export hides is inlined or refused."""

import json

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import SmallDenoiser, relative
from tests.processor import multiplies_bytes
from tfmq_fx import CaptureError, QuantizationConfig
from tfmq_fx.lowering.report.reasons import FUSED_ATTENTION, NO_RULE
from tfmq_fx.lowering.report.report import LoweringReport

PLAIN = QuantizationConfig(temporal="float")


def lowered(model, *inputs, backend="reference", config=PLAIN):
    program = tfmq_fx.quantize(model.eval(), config, [inputs], progress=False)
    return tfmq_fx.lower(program, backend)


class Between(nn.Module):
    """Convolutions around something else, so that roles keep neither of two of them float."""

    def __init__(self, inner, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 4)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.inner = inner

    def forward(self, x):
        h = self.inner(self.one(self.enter(x)).relu())
        return self.leave(self.two(h).relu())


class Function(nn.Module):
    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.weights)


def attention(**options):
    return lambda x: nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], **options)[:, 0]


def masked(x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


UNKNOWN = {
    "conv_transpose1d": Function(lambda x, w: nn.functional.conv_transpose1d(x.mT, w, padding=1).mT, (16, 16, 3)),
    "bilinear": Function(lambda x, w: nn.functional.bilinear(x, x, w), (16, 16, 16)),
    "einsum": Function(lambda x, w: torch.einsum("blc,oc->blo", x, w), (16, 16)),
    "baddbmm": Function(lambda x, w: torch.baddbmm(x, x, w.expand(x.shape[0], 16, 16)), (1, 16, 16)),
    "tensordot": Function(lambda x, w: torch.tensordot(x, w, dims=1), (16, 16)),
}  # fmt: skip
FUSED = {"causal": attention(is_causal=True), "boolean mask": masked}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_weighted_operator_without_a_rule_is_listed_with_its_share(name):
    report = lowered(Between(UNKNOWN[name]), torch.randn(3, 8, 4)).report
    entry = next(e for e in report.entries if e.operator == name)
    assert entry.kernel == "float" and entry.reason and entry.multiply_adds > 0
    assert entry.reason == NO_RULE or name == "conv_transpose1d"
    total = sum(e.multiply_adds for e in report.entries)
    assert f"({name}, {100 * entry.multiply_adds / total:.1f} %): {entry.reason}" in str(report)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_listed(layer):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(16, 16, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    report = lowered(Between(First()), torch.randn(3, 8, 4)).report
    entry = next(e for e in report.entries if e.operator == layer.__name__.lower())
    assert entry.name == "inner.layer" and entry.reason == NO_RULE
    assert entry.multiply_adds == 8 * 2 * 16 * 16 * (4 if layer is nn.LSTM else 3)


def test_an_embedding_bag_is_listed():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = nn.EmbeddingBag(10, 16)

        def forward(self, x):
            return x + self.bags((x.sum(-1) > 0).long())[:, None]

    report = lowered(Between(Bags()), torch.randn(3, 8, 4)).report
    assert next(e for e in report.entries if "embedding_bag" in e.operator).multiply_adds == 8 * 16


@pytest.mark.parametrize("name", FUSED)
def test_attention_that_is_left_fused_is_listed(name):
    report = lowered(Between(Function(FUSED[name])), torch.randn(3, 8, 4)).report
    entry = next(e for e in report.entries if e.operator == "scaled_dot_product_attention")
    assert entry.reason == FUSED_ATTENTION and entry.multiply_adds == 2 * 8 * 8 * 16


def test_attention_that_is_kept_float_says_so():
    config = QuantizationConfig(temporal="float", keep_float=("input", "output", "attention"))
    report = lowered(Between(Function(attention())), torch.randn(3, 8, 4), config=config).report
    entry = next(e for e in report.entries if e.operator == "scaled_dot_product_attention")
    assert entry.reason == "keep_float has 'attention'"


def test_the_first_line_of_the_report_says_how_much_of_the_work_is_on_integer_kernels():
    pytest.importorskip("onnxruntime")
    report = lowered(Between(nn.Identity(), 64), torch.randn(3, 8, 4), backend="onnxruntime").report
    share = 2 * 64 * 64 / (2 * 64 * 64 + 2 * 4 * 64)
    assert report.integer_share == pytest.approx(share)
    assert "2 of 2 eligible layers on integer kernels" in str(report).splitlines()[0]
    assert f"{100 * share:.1f} % of the multiply-adds" in str(report).splitlines()[0]
    assert LoweringReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    older = report.to_dict()
    older["entries"] = [{k: v for k, v in e.items() if k != "multiply_adds"} for e in older["entries"]]
    again = LoweringReport.from_dict(older)
    assert again.integer_share is None and "multiply-adds" not in str(again)


# -- regions -------------------------------------------------------------------------------------------------------


class InRegion(SmallDenoiser):
    """The denoiser with all but its time path inside a region."""

    def __init__(self, region):
        super().__init__()
        self.region = region

    def denoise(self, sample, emb):
        with self.region():
            return super().denoise(sample, emb)


def small(region):
    torch.manual_seed(0)
    return InRegion(region).eval()


REGIONS = {
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast elsewhere": lambda: torch.autocast("cuda", dtype=torch.float16),
    "gradients": torch.enable_grad,
    "gradients set": lambda: torch.set_grad_enabled(True),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}
TIMESTEPS = torch.arange(0, 1000, 100)


def example():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)), TIMESTEPS[:4]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("route", ["module", "exported", "exported with gradients"])
@pytest.mark.parametrize("name", REGIONS)
def test_layers_in_a_region_are_quantized(name, route):
    model, (x, t) = small(REGIONS[name]), example()
    if route != "module":
        with torch.set_grad_enabled(route == "exported with gradients"):
            given = torch.export.export(model, (x, t))
    else:
        given = model
    program = tfmq_fx.quantize(given, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
    report = tfmq_fx.lower(program, "reference").report
    assert report.annotated == 9 and {e.name for e in report.entries} >= {"down.conv1", "qkv", "up.conv2"}
    with torch.no_grad():
        assert relative(program(x, t), model(x, t)) < 0.05


def test_autocast_that_is_on_is_refused_by_name():
    with pytest.raises(CaptureError, match="switches autocast to bfloat16 on inside itself") as caught:
        tfmq_fx.capture(small(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), example())
    assert "\n" not in str(caught.value)


def test_layers_in_a_branch_are_refused_by_name():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.one, self.two, (x,))

    with pytest.raises(CaptureError, match=r"layers inside torch\.cond \(node 'cond'\)") as caught:
        tfmq_fx.capture(Branches(), (torch.randn(3, 4),))
    assert "\n" not in str(caught.value)


# -- paddings -------------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    def __init__(self, kernel, **options):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(2, 16, 1), nn.Conv2d(16, 2, 1)
        self.one = nn.Conv2d(16, 16, kernel, **options)
        self.two = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.leave(self.two(self.one(self.enter(x)).relu()))


BACKENDS = ["reference", "inductor", "openvino", "onnxruntime"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolution_with_a_named_padding_runs_on_an_integer_kernel(backend):
    if backend in ("openvino", "onnxruntime"):
        pytest.importorskip(backend)
    model, x = Padded((4, 3), padding="same").eval(), torch.randn(3, 2, 8, 8)
    program = tfmq_fx.quantize(model, PLAIN, [(x,)], progress=False)
    denoiser = tfmq_fx.lower(program, backend)
    entry = next(e for e in denoiser.report.entries if e.name == "one")
    assert entry.operator == "conv2d" and (entry.kernel == "integer" or not multiplies_bytes(backend))
    with torch.no_grad():
        assert relative(denoiser(x), model(x)) < 0.05 and relative(denoiser(x), program(x)) < 0.04


@pytest.mark.parametrize(
    "options", [{"padding": "valid", "stride": 2}, {"padding": "same", "dilation": 2, "groups": 2}]
)
def test_other_named_paddings_are_right(options):
    model, x = Padded(3, **options).eval(), torch.randn(3, 2, 8, 8)
    denoiser = lowered(model, x)
    assert denoiser.report.annotated == 2
    with torch.no_grad():
        assert relative(denoiser(x), model(x)) < 0.05


def test_a_layer_whose_sums_could_wrap_is_computed_in_float():
    """65,793 products of a byte and a signed byte can pass an int32; oneDNN's kernels would wrap in silence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(66_000, 16), nn.SiLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x = torch.ones(2, 66_000)
    config = QuantizationConfig(temporal="float", keep_float=())
    program = tfmq_fx.quantize(model, config, [(x,)], progress=False)
    denoiser = tfmq_fx.lower(program, "inductor")
    deep = denoiser.report.entries[0]
    assert deep.kernel == "float" and "32-bit" in deep.reason
    assert relative(denoiser(x), model(x).detach()) < 0.02
