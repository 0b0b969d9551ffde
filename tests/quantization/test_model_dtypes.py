"""Models in bfloat16, float16 and float64: quantized in float32, called in their own type."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative, small_denoiser, tiny_unet
from tests.processor import multiplies_bytes, on_integer_kernels
from tfmq_fx import CaptureError, QuantizationConfig, ReconstructionConfig

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
#: What the type's own rounding of inputs, weights and results adds to an error.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-6}


class Mixed(nn.Module):
    """Layers of one type behind a time path in float32, with the casts that models write out by hand."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.inner = SmallDenoiser()
        self.dtype = dtype
        for name in ("enter", "down", "qkv", "up", "leave"):
            getattr(self.inner, name).to(dtype)
        self.eval()

    def forward(self, sample, timestep):
        emb = self.inner.time(timestep).to(self.dtype)
        return self.inner.denoise(sample.to(self.dtype) * 1.0, emb)


def float32_of(model):
    plain = small_denoiser()
    plain.load_state_dict({name: value.float() for name, value in model.inner.state_dict().items()})
    return plain


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def case(request):
    """The type, a model in it, its program, a batch, and what the float32 model and program make of that."""
    model, (x, t) = Mixed(request.param), batch()
    kept = copy.deepcopy(model.state_dict())
    plain = float32_of(model)
    like = tfmq_fx.quantize(plain, None, [(x.to(request.param).float(), t)], timesteps=TIMESTEPS, progress=False)
    program = tfmq_fx.quantize(model, None, [(x.to(request.param), t)], timesteps=TIMESTEPS, progress=False)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in kept.items())
    with torch.no_grad():
        return request.param, model, program, (x, t), plain(x, t), relative(like(x, t), plain(x, t))


def test_a_captured_graph_computes_in_float32_between_the_models_own_types(case):
    dtype, model, _, (x, t), _, _ = case
    for given in (model, torch.export.export(model, (x.to(dtype), t))):
        graph = tfmq_fx.capture(given, (x.to(dtype), t))
        layers = [
            n for n in graph.graph.nodes if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
        ]
        assert len(layers) >= 10 and all(node.meta["val"].dtype is torch.float32 for node in layers)
        with torch.no_grad():
            found, wanted = graph(x.to(dtype), t), float32_of(model)(x.to(dtype).float(), t)
        assert found.dtype is dtype and relative(found.float(), wanted) < ROUNDING[dtype]


def test_the_error_is_that_of_float32_and_the_rounding(case):
    dtype, _, program, (x, t), wanted, like = case
    found = program(x.to(dtype), t)
    assert found.dtype is dtype and relative(found.float(), wanted) < like + ROUNDING[dtype]


def test_a_program_is_saved_and_loaded(case, tmp_path):
    dtype, _, program, (x, t), _, _ = case
    tfmq_fx.save(program, tmp_path / "artefact")
    assert torch.equal(tfmq_fx.load(tmp_path / "artefact")(x.to(dtype), t), program(x.to(dtype), t))


@pytest.mark.parametrize("backend", ["reference", "openvino", "onnxruntime"])
def test_a_denoiser_has_the_models_type(case, backend):
    if backend != "reference":
        pytest.importorskip(backend)
    dtype, _, program, (x, t), wanted, like = case
    denoiser = tfmq_fx.lower(program, backend)
    assert denoiser.dtype is dtype
    for size in (4, 1):
        found = denoiser(x[:size].to(dtype), t[:size])
        assert found.dtype is dtype and found.shape == x[:size].shape
        assert relative(found.float(), program(x.to(dtype), t)[:size].float()) < 0.02 + ROUNDING[dtype]
    assert relative(denoiser(x.to(dtype), t).float(), wanted) < like + 0.01 + ROUNDING[dtype]
    assert not multiplies_bytes(backend) or denoiser.report.integer_kernels >= 5


def test_inductor_and_a_package_have_the_models_type(tmp_path):
    model, (x, t) = Mixed(torch.bfloat16), batch()
    x = x.to(torch.bfloat16)
    # With more groups, layers this narrow are integers on AMX alone.
    config = QuantizationConfig(activation_groups=1, shortcut_bits=None)
    program = tfmq_fx.quantize(model, config, [(x, t)], timesteps=TIMESTEPS, progress=False)
    tfmq_fx.lower(program, "aot", path=tmp_path / "denoiser.pt2")
    denoiser = tfmq_fx.load_denoiser(tmp_path / "denoiser.pt2")
    found = denoiser(x, t)
    assert denoiser.dtype is found.dtype is torch.bfloat16
    assert denoiser.report.eligible == 7 and on_integer_kernels(denoiser.report, 7)
    assert relative(found.float(), program(x, t).float()) < 0.04


def test_reconstruction_and_a_quantized_result():
    model, (x, t) = Mixed(torch.bfloat16), batch()
    batches = [(x.to(torch.bfloat16), t)]
    config = QuantizationConfig(
        weight_bits=4, output_bits=8, reconstruction=ReconstructionConfig(iterations=4, temporal_iterations=4)
    )
    program = tfmq_fx.quantize(model, config, batches, timesteps=TIMESTEPS, progress=False)
    with torch.no_grad():
        found, wanted = program(*batches[0]), float32_of(model)(x, t)
    assert found.dtype is torch.bfloat16 and relative(found.float(), wanted) < 0.25
    assert len(torch.unique(found)) <= 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_diffusers_model_and_its_pipeline(dtype):
    model, scheduler = tiny_unet().eval().to(dtype), DDIMScheduler()
    scheduler.set_timesteps(4)
    x, t = torch.randn(2, 1, 8, 8), scheduler.timesteps[:2]
    program = tfmq_fx.quantize(model, None, [(x.to(dtype), t)], timesteps=scheduler.timesteps, progress=False)
    denoiser = tfmq_fx.lower(program, "reference")
    with torch.no_grad():
        wanted = copy.deepcopy(model).float()(x, t).sample
    found = denoiser(x.to(dtype), t).sample
    assert found.dtype is denoiser.dtype is dtype and relative(found.float(), wanted) < 0.05
    if dtype is torch.bfloat16:  # this pipeline turns its images into numpy's types, which bfloat16 is none of
        return
    pipeline = DDIMPipeline(unet=model, scheduler=scheduler)
    pipeline.unet = denoiser
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and bool((abs(images) <= 1).all())


def test_the_stock_workflow_with_a_model_in_bfloat16():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, (x, t) = Mixed(torch.bfloat16), batch()
    x = x.to(torch.bfloat16)
    prepared = prepare_pt2e(torch.export.export(model, (x, t)).module(), tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS))
    with torch.no_grad():
        prepared(x, t)
    denoiser = tfmq_fx.lower(convert_pt2e(prepared), "reference")
    assert relative(denoiser(x, t).float(), float32_of(model)(x.float(), t).detach()) < 0.05


def test_weights_that_float32_cannot_hold_are_refused():
    model = Mixed(torch.float64)
    with torch.no_grad():
        model.inner.down.conv1.weight[0] = 1e300
    with pytest.raises(CaptureError, match=r"weight 'inner.down.conv1.weight' holds NaN or infinite"):
        tfmq_fx.capture(model, (batch()[0].double(), batch()[1]))
