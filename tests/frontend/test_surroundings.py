"""What a caller has switched on around a call, and what others put around a model, changes no number."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import CaptureError, QuantizationConfig, ReconstructionConfig


@contextlib.contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}
around = pytest.mark.parametrize("name", SURROUNDINGS)


@pytest.fixture(scope="module")
def program():
    return tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS, progress=False)


@around
def test_a_model_is_quantized_and_lowered_as_without_them(program, name, tmp_path):
    model, (x, t) = small_denoiser(), batch()
    with SURROUNDINGS[name]():
        found = tfmq_fx.quantize(model, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
        tfmq_fx.save(found, tmp_path / "artefact")
        denoiser = tfmq_fx.lower(tfmq_fx.load(tmp_path / "artefact"), "reference")
        inside = found(x, t), denoiser(x, t)
    outside = found(x, t), denoiser(x, t)
    wanted = program(x, t)
    for value in (*inside, *outside):
        assert value.dtype is torch.float32 and value.device.type == "cpu" and not value.is_inference()
        assert torch.allclose(value, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["inference mode", "autocast", "float64"])
def test_reconstruction_is_the_same_too(name):
    config = QuantizationConfig(weight_bits=4, reconstruction=ReconstructionConfig(iterations=4, temporal_iterations=4))
    made = []
    for surroundings in (contextlib.nullcontext, SURROUNDINGS[name]):
        model, batches = small_denoiser(), [batch()]
        with surroundings():
            made.append(tfmq_fx.quantize(model, config, batches, timesteps=TIMESTEPS, progress=False))
    assert torch.equal(made[0](*batch()), made[1](*batch()))


def test_they_are_as_they_were_afterwards_also_behind_an_error(program):
    with torch.inference_mode(), default(torch.float64), pytest.raises(CaptureError):
        tfmq_fx.capture(small_denoiser(), (torch.randn(2, 3),))
    with torch.inference_mode(), default(torch.float64):
        program(*(value.float() if value.is_floating_point() else value for value in batch()))
        assert torch.is_inference_mode_enabled() and torch.get_default_dtype() is torch.float64


def test_weights_and_batches_that_were_made_in_inference_mode():
    with torch.inference_mode():
        model, batches = small_denoiser(), [batch()]
    config = QuantizationConfig(weight_bits=4, reconstruction=ReconstructionConfig(iterations=4, temporal_iterations=4))
    found = tfmq_fx.quantize(model, config, batches, timesteps=TIMESTEPS, progress=False)
    wanted = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    assert torch.equal(found(*batch()), wanted(*batch()))


# -- what stands around a model -------------------------------------------------------------------------------------


def whole(model):
    return torch.compile(model)


def parallel(model):
    return nn.DataParallel(model)


def submodule(model):
    model.down = torch.compile(model.down)
    return model


def in_place(model):
    model.compile()
    model.up.compile()
    return model


def method(model):
    model.denoise = torch.compile(model.denoise)
    return model


@pytest.mark.parametrize("wrap", [whole, parallel, submodule, in_place, method])
def test_a_compiled_model_is_the_model(wrap):
    model, (x, t) = small_denoiser(), batch()
    wrapped = wrap(model)
    children = dict(model.named_modules())
    program = tfmq_fx.capture(wrapped, (x, t))
    with torch.no_grad():
        assert torch.equal(program(x, t), small_denoiser()(x, t))
    assert set(program.state_dict()) == set(small_denoiser().state_dict())
    assert program.meta["tfmq_fx.interface"].model_class == "SmallDenoiser"
    assert [str(node.target) for node in program.graph.nodes if node.op == "placeholder"] == ["sample", "timestep"]
    assert dict(model.named_modules()) == children
    assert (model._compiled_call_impl is not None) == (wrap is in_place)


def trained(model):
    return model.train()


def frozen(model):
    return model.requires_grad_(False)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.down.conv1)
    return model


def hooked(model):
    model.down.register_forward_hook(lambda module, args, output: output * 2)
    model.up.register_forward_pre_hook(lambda module, args: (args[0] / 2, args[1]))
    return model


def tied(model):
    model.up.embed.weight = model.down.embed.weight
    model.down.conv2.weight = model.down.conv1.weight
    return model


@pytest.mark.parametrize("change", [trained, frozen, weight_norm, hooked, tied])
def test_what_a_model_carries_is_captured(change, tmp_path):
    model, (x, t) = change(small_denoiser()), batch()
    like = copy.deepcopy(model).eval()
    program = tfmq_fx.quantize(model, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
    tfmq_fx.save(program, tmp_path / "artefact")
    with torch.no_grad():
        assert torch.equal(tfmq_fx.capture(model, (x, t))(x, t), like(x, t))
        assert relative(program(x, t), like(x, t)) < 0.05
    assert torch.equal(tfmq_fx.load(tmp_path / "artefact")(x, t), program(x, t))


def test_weights_elsewhere_are_refused_by_name():
    model = small_denoiser()
    model.down.to("meta")
    with pytest.raises(CaptureError, match=r"weight 'down.norm.weight' is on 'meta'.*low_cpu_mem_usage") as caught:
        tfmq_fx.capture(model, batch())
    assert "\n" not in str(caught.value)


def test_a_script_is_refused():
    traced = torch.jit.trace(small_denoiser(), batch())
    with pytest.raises(CaptureError, match=r"cannot capture a \w+: pass a torch.nn.Module"):
        tfmq_fx.capture(traced, batch())
