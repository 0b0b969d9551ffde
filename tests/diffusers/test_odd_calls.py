"""Denoisers that are called in ways of their own: lists, None where it is required, a batch that is counted."""

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import tfmq_fx
from tests.diffusers.pipelines import CASES
from tests.diffusers.test_quantize_pipeline import FAST, QUIET
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative
from tfmq_fx.data.recorded_calls import CallRecorder
from tfmq_fx.diffusers import quantize_pipeline


class Listing(SmallDenoiser):
    """Its result is a list of images, as Z-Image's is."""

    def forward(self, sample, timestep, return_dict=True):
        images = list(super().forward(sample, timestep).unbind(0))
        return Transformer2DModelOutput(images) if return_dict else (images,)


def test_a_list_in_an_output_stays_one_field_of_the_tuple():
    torch.manual_seed(0)
    model = Listing().eval()
    batches = [batch(2, seed) for seed in range(4)]
    program = tfmq_fx.quantize(model, FAST, batches, timesteps=TIMESTEPS, dynamic_batch=False, progress=False)
    denoiser = tfmq_fx.lower(program, "reference")
    x, t = batches[0]
    wanted, found = model(x, t, return_dict=False), denoiser(x, t, return_dict=False)
    assert type(found) is tuple and len(found) == 1 and len(found[0]) == len(wanted[0]) == 2
    assert relative(torch.stack(list(found[0])), torch.stack(wanted[0])) < 0.1
    assert type(denoiser(x, t)) is Transformer2DModelOutput


class Requiring(torch.nn.Module):
    def forward(self, sample, timestep, hidden, mask=None, return_dict=True):
        return sample if hidden is None else sample + hidden


def test_none_is_recorded_where_an_argument_is_required():
    model = Requiring()
    with CallRecorder(model, "timestep") as recorder:
        model(torch.ones(2), 3, None, mask=None, return_dict=False)
    (call,) = recorder.calls
    assert list(call) == ["sample", "timestep", "hidden"] and call["hidden"] is None


class Counted(diffusers.UNet2DModel):
    """It counts its items in Python, which makes their number a constant of the graph; diffusers does not export it."""

    def forward(self, sample, timestep, **options):
        zeros = torch.tensor([0.0] * sample.shape[0])
        return super().forward(sample + zeros[:, None, None, None], timestep, **options)


def test_a_model_whose_batch_cannot_be_dynamic_serves_the_batch_that_was_recorded():
    case = CASES["ddpm"]
    pipeline = case.pipeline()
    model = Counted.from_config(pipeline.unet.config).eval()
    model.load_state_dict(pipeline.unet.state_dict())
    pipeline.unet = model
    wanted = case.sample(pipeline, batch_size=2)
    with pytest.warns(
        UserWarning, match=r"'unet' serves calls of the batch that was recorded alone.*cannot be dynamic"
    ):
        quantize_pipeline(pipeline, config=FAST, **QUIET, **{**case.arguments, "batch_size": 2})
    assert type(pipeline.unet) is Counted
    assert relative(case.sample(pipeline, batch_size=2).double(), wanted.double()) < 0.1
    with pytest.raises(tfmq_fx.InputError, match="captured with"):
        case.sample(pipeline, batch_size=3)
    pipeline.unet = model
    with pytest.raises(tfmq_fx.CaptureError, match="cannot be dynamic"):
        quantize_pipeline(pipeline, config=FAST, dynamic_batch=True, **QUIET, **case.arguments)
