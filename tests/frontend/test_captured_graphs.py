"""A graph that is captured already goes on from there, and what ``capture`` is given is checked."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import CaptureError

# -- what is captured already -----------------------------------------------------------------------------------------


def test_a_captured_graph_is_captured_and_quantized():
    model = small_denoiser()
    graph = tfmq_fx.capture(model, batch())
    code = graph.code
    assert tfmq_fx.capture(graph) is graph and tfmq_fx.capture(graph, batch(3)) is graph
    found = tfmq_fx.quantize(graph, None, [batch()], timesteps=TIMESTEPS, progress=False)
    wanted = tfmq_fx.quantize(model, None, [batch()], timesteps=TIMESTEPS, progress=False)
    assert torch.equal(found(*batch()), wanted(*batch()))
    assert found.interface.model_class == "SmallDenoiser" and graph.code == code


def test_a_captured_graph_without_its_meta_is_known_by_its_notes():
    graph = tfmq_fx.capture(small_denoiser(), batch())
    graph.meta.clear()
    assert tfmq_fx.capture(graph, batch()) is graph


@pytest.mark.parametrize(
    "inputs, more, part",
    [
        ((torch.randn(2, 3, 8, 8), torch.tensor([1, 2])), {}, "captured already: argument 'sample'"),
        (batch(), {"batched": ("sample",)}, "leave dynamic_batch="),
        (batch(), {"dynamic_batch": False}, "leave dynamic_batch="),
    ],
)
def test_what_a_captured_graph_cannot_become(inputs, more, part):
    graph = tfmq_fx.capture(small_denoiser(), batch())
    with pytest.raises(CaptureError, match=part):
        tfmq_fx.capture(graph, inputs, **more)


def test_the_graph_of_an_exported_program_is_a_model_like_others():
    model = small_denoiser()
    graph = torch.export.export(model, batch()).module()
    with torch.no_grad():
        assert torch.equal(tfmq_fx.capture(graph, batch(), dynamic_batch=False)(*batch()), model(*batch()))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"example_inputs": None}, "do not fit SmallDenoiser.forward"),
        ({"example_inputs": 3}, "example_inputs= is a int"),
        ({"example_inputs": {"sample": 1}}, "those by name as example_kwargs="),
        ({"example_kwargs": [1]}, "example_kwargs= is a list"),
        ({"batched": 3}, "batched=3 must be names"),
        ({"batched": [3]}, "must be names"),
        ({"batched": {"sample": "0"}}, "must be names"),
        ({"batched": "nope"}, "axis 0 of 'nope'"),
    ],
)
def test_arguments_of_another_kind(arguments, part):
    with pytest.raises(CaptureError, match=part):
        tfmq_fx.capture(small_denoiser(), **{"example_inputs": batch(), **arguments})


def test_a_single_name_and_a_single_tensor():
    x, t = batch()
    graph = tfmq_fx.capture(small_denoiser(), (x, t), batched=("sample", "timestep"))
    assert graph(x, t).shape == x.shape
    model = torch.nn.Conv2d(1, 1, 3).eval()
    with torch.no_grad():
        assert torch.equal(tfmq_fx.capture(model, x, batched="input")(x), model(x))
