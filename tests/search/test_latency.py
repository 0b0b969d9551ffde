"""What is timed of a layer; nothing here is compiled, and no time is asserted."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS
from tests.search.conftest import CONFIG
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.search import latency
from tfmq_fx.search.latency import StepTimer, layer_times


@pytest.fixture
def timed(monkeypatch):
    """What is timed, in order; by the reference backend, and a time that says which widths it had."""
    programs = []

    def lower(program):
        programs.append(program)
        return tfmq_fx.lower(program, "reference")

    def measured(calls, rounds):
        for call in calls.values():
            call()
        return {name: [2.0 if name == "True" else 3.0] * 3 for name in calls}

    monkeypatch.setattr(latency, "lower", lower)
    monkeypatch.setattr(latency, "interleaved_latency", measured)
    return programs


def test_each_form_is_timed_once_on_both_kinds_of_kernels(calibrated, timed):
    block = find_temporal_block(calibrated.prepared, "timestep")
    times = layer_times(calibrated.layers, block, progress=False)
    seconds = dict(zip((layer.name for layer in calibrated.layers), times.seconds, strict=True))
    # The temporal block runs once a timestep, so its layers cost a step nothing.
    assert all(seconds[name].tolist() == [0, 0, 0] for name in ("time.one", "time.two", "down.embed", "up.embed"))
    # W4 runs on the kernels of W8, and float does not; a convolution in two parts is two.
    assert seconds["down.conv1"].tolist() == [2, 2, 3] and seconds["up.shortcut"].tolist() == [4, 4, 6]
    # down.conv1, down.conv2 and up.conv2 are one form; the parts of the shortcut differ in their bias.
    widths = [(program.config.weight_bits, len(program.interface.names)) for program in timed]
    assert widths == [(8, 1), (32, 1)] * 5
    assert times.untimed == ("matmul_default", "matmul_default_1")  # each is a layer of its own without module names


def test_attention_is_timed_whole(timed):
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 5, 4)
    denoiser = latency._lowered(latency._Attention(), (query, key, key), latency.BASE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert float((denoiser(query, key, key) - expected).norm() / expected.norm()) < 0.05
    assert len(timed) == 1 and timed[0].config.keep_float == ()


def test_programs_are_timed_in_turns(calibrated, timed):
    program = tfmq_fx.quantize(calibrated.program, CONFIG, calibrated.rest, timesteps=TIMESTEPS, progress=False)
    args, kwargs = calibrated.probes[0].call.arguments()
    timer = StepTimer(args, kwargs)
    timer.add("one", program)
    assert set(timer.seconds()) == {"one"}
    timer.add("other", program)
    assert set(timer.seconds()) == {"one", "other"}
    assert all(each is program for each in timed) and len(timed) == 2
