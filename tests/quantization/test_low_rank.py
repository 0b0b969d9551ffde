"""Branches of low rank: which layers get one, of which rank, and what they are worth."""

import warnings

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, relative, small_denoiser
from tests.quantization.test_activation_groups import noisy
from tfmq_fx import ConfigError, QuantizationConfig
from tfmq_fx.lowering.report.reasons import BRANCH
from tfmq_fx.passes.layout.add_low_rank_branches import is_branch
from tfmq_fx.passes.support.predicates import is_weighted, module_path
from tfmq_fx.quantization.low_rank import MOST_WORK, branch_rank, low_rank_factors

FOUR = {"weight_bits": 4, "activation_bits": 4, "activation_groups": None}


def calibrated(**config):
    x, t = noisy(TIMESTEPS)[4]
    captured = tfmq_fx.capture(small_denoiser(), (x, t))
    prepared = tfmq_fx.prepare(captured, QuantizationConfig(**{**FOUR, **config}), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, noisy(TIMESTEPS), progress=False)
    return prepared


def quantized(**config):
    config = QuantizationConfig(**{**FOUR, "reconstruction": "nearest", **config})
    return tfmq_fx.quantize(small_denoiser(), config, noisy(TIMESTEPS), timesteps=TIMESTEPS, progress=False)


def error(program):
    x, t = noisy(TIMESTEPS)[4]
    with torch.no_grad():
        return relative(program(x, t), small_denoiser()(x, t))


def branches(graph_module):
    """The ranks by the module path of their layers; of a layer in parts, the last one's."""
    found = {}
    for node in graph_module.graph.nodes:
        if is_weighted(node) and is_branch(node) and is_branch(node.args[0]):
            found[module_path(node)] = int(node.args[0].meta["val"].shape[1 if node.meta["val"].ndim > 3 else -1])
    return found


def test_factors_are_the_nearest_of_their_rank_on_a_grid_of_8_bits():
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24), (16, 8, 3, 3), (32, 8, 1, 1)):
        weight = torch.randn(shape)
        factors = low_rank_factors(weight, 4)
        assert factors.up.shape == (shape[0], 4) and factors.down.shape == (4, *shape[1:])
        for factor in (factors.up, factors.down.flatten(1)):
            steps = factor / (factor.abs().amax(1, keepdim=True) / 127)
            assert torch.allclose(steps, steps.round(), atol=1e-3)
        left = torch.linalg.svdvals(weight.flatten(1))[4:].norm()
        assert float((weight - factors.product()).norm()) == pytest.approx(float(left), rel=1e-3)
    assert float((low_rank_factors(torch.zeros(8, 8), 4)).product().norm()) == 0.0
    assert len(low_rank_factors(torch.randn(3, 8), 4).down) == 3


def test_narrow_layers_get_a_lower_rank():
    assert branch_rank(torch.empty(320, 320, 3, 3), 32) == 32
    rank = branch_rank(torch.empty(32, 32, 3, 3), 32)
    assert rank == 14 and rank * (32 + 288) <= MOST_WORK * 32 * 288 < (rank + 1) * (32 + 288)
    assert branch_rank(torch.empty(1, 512), 8) == 0


def test_branches_leave_the_float_function_and_help_what_is_quantized():
    x, t = noisy(TIMESTEPS)[4]
    prepared = calibrated(low_rank=2)
    with torch.no_grad():
        assert relative(prepared(x, t), small_denoiser()(x, t)) < 1e-5
    found = branches(prepared)
    assert set(found) == {"qkv", "down.conv1", "down.conv2", "up.conv1", "up.conv2", "up.shortcut"}
    tfmq_fx.calibrate(prepared, noisy(TIMESTEPS)[:1], progress=False)
    assert branches(prepared) == found, "a layer has one branch however often it is calibrated"
    narrow = {"shortcut_bits": None}
    assert error(quantized(low_rank=4, **narrow)) < 0.9 * error(quantized(**narrow))


def test_overrides_say_which_layers_have_one():
    found = branches(calibrated(low_rank=3, overrides={"down.*": {"low_rank": 1}, "up.*": {"low_rank": None}}))
    assert found == {"qkv": 3, "down.conv1": 1, "down.conv2": 1}
    assert branches(calibrated(overrides={"qkv": {"low_rank": 2}})) == {"qkv": 2}
    assert branches(calibrated()) == {}
    with pytest.raises(ConfigError, match="low_rank"):
        QuantizationConfig(low_rank=0)
    config = QuantizationConfig(low_rank=16)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_a_branch_is_kept_in_a_file_rounded_with_the_rest_and_named_in_the_report(tmp_path):
    x, t = noisy(TIMESTEPS)[4]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none has wider weights than configured
        program = quantized(low_rank=2, reconstruction="gptq")
    tfmq_fx.save(program, tmp_path / "file")
    loaded = tfmq_fx.load(tmp_path / "file")
    with torch.no_grad():
        assert torch.equal(loaded(x, t), program(x, t))
    assert branches(loaded.graph_module) == branches(program.graph_module) != {}
    entries = [entry for entry in tfmq_fx.lower(loaded, "reference").report.entries if entry.reason == BRANCH]
    assert len(entries) == sum(is_weighted(node) and is_branch(node) for node in program.graph_module.graph.nodes) > 0
