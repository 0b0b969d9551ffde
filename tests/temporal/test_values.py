"""The timesteps of calibration batches, and a table that none of them is in."""

import math

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative
from tfmq_fx import CalibrationError, QuantizationConfig
from tfmq_fx.data import record_trajectories
from tfmq_fx.temporal.values import check_table_is_hit

WORDS = (
    r"none of the calibration timesteps \(first: 0\.9\d*\) is in the table \(nearest 0, 10 values from 900 to 0\): "
    r"pass the timesteps as the model sees them, timesteps=tfmq_fx\.recorded_timesteps\(batches\)"
)


class ThousandthsDenoiser(SmallDenoiser):
    """Sees timesteps from 0 to 1, as Flux's transformer does."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep * 1000)


class Pipe:
    """Divides the scheduler's timestep by 1,000, in the dtype of its model."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.transformer, self.dtype = ThousandthsDenoiser().eval(), dtype

    def __call__(self):
        generator = torch.Generator().manual_seed(0)
        for t in TIMESTEPS.flip(0):
            self.transformer(torch.randn(2, 1, 8, 8, generator=generator), t.expand(2).to(self.dtype) / 1000)


def recorded(dtype=torch.float32, keep=8):
    pipe = Pipe(dtype)
    return pipe.transformer, record_trajectories(pipe, lambda p: p(), component="transformer", keep=keep)


@pytest.mark.parametrize(
    "config", [{}, {"temporal": "shared"}, {"temporal": "cache"}, {"unknown_timestep": "nearest"}], ids=str
)
@pytest.mark.parametrize("lazy", [False, True], ids=["list", "generator"])
def test_a_table_on_another_scale_is_an_error(config, lazy):
    model, batches = recorded()
    prepared = tfmq_fx.prepare(
        tfmq_fx.capture(model, example_kwargs=batches[0]), QuantizationConfig(**config), timesteps=TIMESTEPS
    )
    batches.sort(key=lambda one: -float(one["timestep"][0]))
    words = "0.9.* is not in the table" if lazy and config in ({}, {"temporal": "cache"}) else WORDS
    with pytest.raises(CalibrationError, match=words) as caught:
        tfmq_fx.calibrate(prepared, iter(batches) if lazy else batches, progress=False)
    assert "\n" not in str(caught.value)


def test_quantize_says_so_too_for_positional_batches():
    model, batches = recorded()
    batches = [(one["sample"], one["timestep"]) for one in batches]
    with pytest.raises(CalibrationError, match="none of the calibration timesteps"):
        tfmq_fx.quantize(
            model, QuantizationConfig(unknown_timestep="nearest"), batches, timesteps=TIMESTEPS, progress=False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recorded_timesteps_are_the_table(dtype):
    model, batches = recorded(dtype)
    timesteps = tfmq_fx.recorded_timesteps(batches)
    assert timesteps.dtype == torch.float64 and len(timesteps) == 10
    assert timesteps.tolist() == sorted(timesteps.tolist(), reverse=True)
    program = tfmq_fx.quantize(model, None, batches, timesteps=timesteps, progress=False)
    denoiser = tfmq_fx.lower(program, "reference", unknown_timestep="error")
    for one in batches:
        with torch.no_grad():
            assert relative(denoiser(**one), model(**one)) < 0.06
    with pytest.raises(tfmq_fx.TimestepError, match="timestep 900 "):
        denoiser(batches[0]["sample"], 900)


def test_one_hit_is_enough_and_a_generator_is_asked_batch_by_batch():
    model, batches = recorded()
    prepared = tfmq_fx.prepare(
        tfmq_fx.capture(model, example_kwargs=batches[0]), QuantizationConfig(temporal="shared"), timesteps=[0.3, 77]
    )
    made = []

    def lazily():
        for one in batches:
            made.append(len(made))
            yield one

    assert tfmq_fx.calibrate(prepared, lazily(), progress=False) == len(batches) == len(made)


def test_timesteps_of_batches_in_any_form():
    batches = [
        {"sample": torch.ones(2), "t": torch.tensor([7, 3])},
        {"sample": torch.ones(2), "t": torch.tensor(7.0)},
        {"sample": torch.ones(2), "t": 0.5},
    ]
    assert tfmq_fx.recorded_timesteps(batches, "t").tolist() == [7.0, 3.0, 0.5]
    with pytest.raises(CalibrationError, match="batch 0 has no 'timestep' but sample, t: name the timestep"):
        tfmq_fx.recorded_timesteps(batches)
    with pytest.raises(CalibrationError, match="batch 0 has no 'timestep' but a tuple without names"):
        tfmq_fx.recorded_timesteps([batch()])
    with pytest.raises(CalibrationError, match="no batches"):
        tfmq_fx.recorded_timesteps([])


def test_the_check_alone():
    check_table_is_hit(TIMESTEPS, [torch.tensor([0.5]), torch.tensor([1, 100])])
    check_table_is_hit(TIMESTEPS, [])
    check_table_is_hit(TIMESTEPS, [torch.tensor([0]), torch.empty(0)])
    with pytest.raises(CalibrationError, match=r"first: 0\.5\)"):
        check_table_is_hit(TIMESTEPS, [torch.tensor([0.0]), torch.tensor([0.0, 0.5])])
    with pytest.raises(CalibrationError, match=r"recorded_timesteps\(batches, 't'\)"):
        check_table_is_hit(TIMESTEPS, [torch.tensor([0.5])], "t")
    with pytest.raises(CalibrationError, match=r"first: nan\) is in the table \(10 values"):
        check_table_is_hit(TIMESTEPS, [torch.tensor(math.nan)])


def test_a_model_without_a_table_is_not_asked():
    plain = QuantizationConfig(temporal="float", keep_float=())
    tfmq_fx.quantize(nn.Linear(3, 3), plain, [(torch.randn(2, 3),)], progress=False)
