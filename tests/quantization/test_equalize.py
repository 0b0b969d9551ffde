"""Channels that do not share a range: what is scaled, and what it is worth."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, SmallDenoiser, relative
from tests.passes.helpers import calls
from tests.quantization.test_activation_groups import noisy
from tfmq_fx import QuantizationConfig
from tfmq_fx.observers.channel_statistics import MOST_ROWS, ChannelStatistics
from tfmq_fx.passes.pipelines import NATIVE_KERNELS
from tfmq_fx.quantization import equalize
from tfmq_fx.quantization.equalize import factors_of

FACTORS = torch.tensor([1.0, 100.0, 1.0, 30.0, 1.0, 3.0, 1.0, 0.1])


class Inverse(nn.Module):
    """A reader that takes its channels back before it does what it did."""

    def __init__(self, inner, factors):
        super().__init__()
        self.inner = inner
        self.register_buffer("factors", factors[:, None, None])

    def forward(self, x):
        return self.inner(x / self.factors)


def denoiser():
    torch.manual_seed(1)
    return SmallDenoiser().eval()


def with_outliers(model, factors=FACTORS):
    """The same function, its residual stream (what ``enter`` returns) with channels of very unlike size."""
    model = copy.deepcopy(model)
    skip = torch.cat([torch.ones(8), factors])
    with torch.no_grad():
        model.enter.weight.mul_(factors[:, None, None, None])
        model.enter.bias.mul_(factors)
        model.up.shortcut.weight.div_(skip[:, None, None])
    model.down.norm = Inverse(model.down.norm, factors)
    model.down.shortcut = Inverse(nn.Identity(), factors)
    model.up.norm = Inverse(model.up.norm, skip)
    return model


def quantized(model, **config):
    config = QuantizationConfig(**{"split_concatenations": False, "activation_groups": None, **config})
    return tfmq_fx.quantize(model, config, noisy(TIMESTEPS), timesteps=TIMESTEPS, progress=False)


def error(program, model, x, t):
    with torch.no_grad():
        return relative(program(x, t), model(x, t))


def scaled_activations(program):
    return [name for name, _ in program.graph_module.named_buffers() if name.endswith("inverse_factors")]


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_a_residual_stream_with_outliers_is_as_good_as_one_without(weight_bits):
    model = denoiser()
    wide = with_outliers(model)
    x, t = noisy(TIMESTEPS)[4]
    with torch.no_grad():
        assert relative(wide(x, t), model(x, t)) < 1e-6
    settings = {"weight_bits": weight_bits, "reconstruction": "nearest"}
    plain, helped = (error(quantized(m, **settings), model, x, t) for m in (model, wide))
    alone = error(quantized(wide, **settings, scale_channels=False), model, x, t)
    assert helped < 1.12 * plain  # one decibel
    assert alone > 2 * helped


def test_what_is_scaled_and_that_the_float_graph_stays():
    wide, model = with_outliers(denoiser()), denoiser()
    assert len(scaled_activations(quantized(wide))) >= 1
    assert scaled_activations(quantized(wide, scale_channels=False)) == []
    assert scaled_activations(quantized(wide, activation_groups=1)) == []
    assert scaled_activations(quantized(wide, activation_range="mse")) == []
    x, t = noisy(TIMESTEPS)[2]
    captured = tfmq_fx.capture(wide, (x, t))
    prepared = tfmq_fx.prepare(
        captured, QuantizationConfig(split_concatenations=False, activation_groups=None), timesteps=TIMESTEPS
    )
    before = copy.deepcopy(prepared)(x, t)
    tfmq_fx.calibrate(prepared, noisy(TIMESTEPS), progress=False)
    assert relative(prepared(x, t), before) < 1e-6
    observers = {str(node.target) for node in prepared.graph.find_nodes(op="call_module")}
    # What was calibrated goes on where it stopped: further batches widen ranges, factors stay.
    tfmq_fx.calibrate(prepared, [(3 * x, t)], progress=False)
    assert {str(node.target) for node in prepared.graph.find_nodes(op="call_module")} == observers
    assert error(tfmq_fx.convert(prepared), model, x, t) < 0.1


def test_statistics_are_those_of_each_channel_and_row():
    statistics = ChannelStatistics(2 * MOST_ROWS, 3, 1)
    x = torch.randn(4, 3, 5, 5)
    groups = torch.tensor([0, 1, 2, 127])
    statistics.add(x, groups)
    assert torch.equal(statistics.low[0], x[:2].amin((0, 2, 3))) and torch.equal(statistics.high[1], x[2].amax((1, 2)))
    assert torch.allclose(statistics.squares[63].float(), x[3].square().sum((1, 2)))
    assert statistics.values.tolist() == [50, 25, *[0] * 61, 25]
    rows = ChannelStatistics(4, 3, -1)
    rows.add(x[:, :, 0, :3], torch.tensor([0, 0, 1, 3]))
    assert torch.equal(rows.high[1], x[2, :, 0, :3].amax(0).clamp_min(0))


def statistics_of(reach):
    statistics = ChannelStatistics(1, len(reach), 1)
    statistics.add(torch.randn(8, len(reach), 4, 4).clamp(-3, 3) * reach[:, None, None], torch.zeros(8).long())
    return statistics


def test_factors_even_channels_out_and_there_are_none_where_channels_share_a_range():
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 9)
    assert factors_of(statistics_of(torch.ones(8)), weight, 255, 255) is None
    found = factors_of(statistics_of(FACTORS), weight / FACTORS[None, :, None], 255, 255)
    assert found is not None and 50 < float(found[1] / found[0]) < 200
    dead = FACTORS.clone()
    dead[2] = 0.0
    found = factors_of(statistics_of(dead), weight / FACTORS[None, :, None], 255, 255)
    assert found is not None and float(found[2]) == 1.0
    assert factors_of(statistics_of(torch.zeros(8)), weight, 255, 255) is None


def test_kernels_take_the_factors_of_every_image_along(monkeypatch):
    monkeypatch.setattr(equalize, "WORTH", float("inf"))  # all that can be scaled
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    batches = [(torch.randn(2, 1, 8, 8), t.expand(2)) for t in TIMESTEPS]
    program = tfmq_fx.quantize(model, QuantizationConfig(), batches, timesteps=TIMESTEPS, progress=False)
    graph_module = copy.deepcopy(program.graph_module)
    factors = [node for node in graph_module.graph.find_nodes(op="get_attr") if "inverse_factors" in str(node.target)]
    assert len(factors) > 10
    for rewrite in NATIVE_KERNELS.passes:
        rewrite()(graph_module)
    left = [node for node in calls(graph_module, torch.ops.aten.mul.Tensor) if node.args[1] in factors]
    assert not [node for node in left if node.meta["val"].ndim > 2]
