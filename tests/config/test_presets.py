"""Published methods as configurations: each one runs, and is what its name says."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tests.reconstruction_cases import SHORT
from tfmq_fx import ConfigError, QuantizationConfig
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.presets import PRESETS, find_preset
from tfmq_fx.data.timestep_samplers import SAMPLERS
from tfmq_fx.fake_quantizers import ActivationQuantizer


def short(config):
    """With a reconstruction of a second."""
    if config.resolved_reconstruction is None:
        return config
    return dataclasses.replace(config, reconstruction=dataclasses.replace(config.resolved_reconstruction, **SHORT))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_quantizes_and_survives_json(name, bits):
    config = short(QuantizationConfig.preset(name, weight_bits=bits))
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    model, data = small_denoiser(), batch(24)
    program = tfmq_fx.quantize(model, config, [data], timesteps=TIMESTEPS, progress=False)
    with torch.no_grad():
        error = relative(program.graph_module(*data), model(*data))
    assert 0 < error < (0.05 if bits == 8 else 0.25)


def test_a_preset_says_what_it_is():
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.summary.endswith(".") and preset.source
        assert preset.sampler in SAMPLERS
    assert [name for name, preset in PRESETS.items() if preset.corrects_noise] == ["ptqd"]
    assert [name for name, preset in PRESETS.items() if preset.quantizes_sample] == ["ptq4dm"]
    with pytest.raises(TypeError):
        find_preset("ptqd").fields["weight_bits"] = 4


def test_the_interface_table_lists_every_preset():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "index.md").read_text()
    (row,) = (line for line in page.splitlines() if "`QuantizationConfig.preset(name)`" in line)
    listed = re.findall("`([^`]+)`", row.partition("same passes:")[2].partition(";")[0])
    assert listed == list(PRESETS), "list it in docs/reference/index.md"


def test_values_go_on_top():
    assert QuantizationConfig.preset("tfmq-dm").reconstruction.temporal == "tiar"
    config = QuantizationConfig.preset("tfmq-dm", weight_bits=4, reconstruction=None)
    assert config.reconstruction is None and config.weight_bits == 4 and config.temporal == "fsc"
    nearest = [
        name for name in PRESETS if QuantizationConfig.preset(name, weight_bits=4).resolved_reconstruction is None
    ]
    assert nearest == ["ptq4dm", "tdq", "adp-dm"], "these methods round to nearest at any width"
    plain = {"activation_groups": 1, "scale_channels": False, "defer_softmax": False, "shortcut_bits": None}
    assert QuantizationConfig.preset("shared") == QuantizationConfig(temporal="shared", **plain)
    scaled = [name for name in PRESETS if QuantizationConfig.preset(name).scale_channels]
    assert scaled == ["dmq"], "the only published method here that scales channels"


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"preset='nope' is not supported: use one of .*'tfmq-dm', 'tfmq-dm-r"):
        QuantizationConfig.preset("nope")


def test_ptqd_is_what_its_code_quantizes():
    config = QuantizationConfig.preset("ptqd", weight_bits=4, activation_bits=6)
    ends = frozenset({"input"}), frozenset({"output"})
    for layer in (*(config.for_layer("x", roles) for roles in ends), config.for_layer("unet.time_embed.0")):
        assert (layer.weight_bits, layer.activation_bits) == (8, 8)
    assert config.for_layer("unet.time_embed.2").weight_bits == 4
    assert config.keeps_float("input_blocks.3.0.op", frozenset()) and not config.quantizes_attention
    assert not config.split_concatenations and config.activation_range == "mse" and config.softmax_bits is None
    learned = config.reconstruction
    assert (learned.learned_steps, learned.iterations, learned.step_iterations(learned.iterations)) == (
        "after", 10_000, 5_000,
    )  # fmt: skip


def test_q_diffusion_quantizes_everything_at_one_width():
    config = QuantizationConfig.preset("q-diffusion", weight_bits=4)
    assert not config.keep_float and not config.overrides and config.softmax_bits == 8 and config.split_concatenations
    learned = config.reconstruction
    assert (learned.learned_steps, learned.step_iterations(learned.iterations)) == ("after", 5_000)


@pytest.mark.parametrize(("given", "widths"), [({}, (8, 8)), ({"weight_bits": 4, "activation_bits": 32}, (8, 32)),
                                               ({"weight_bits": 16, "activation_bits": 6}, (16, 8))])  # fmt: skip
def test_layers_with_widths_of_their_own_do_not_get_fewer_bits_than_the_others(given, widths):
    layer = QuantizationConfig.preset("ptqd", **given).for_layer("x", frozenset({"output"}))
    assert (layer.weight_bits, layer.activation_bits) == widths
    plain = QuantizationConfig.preset("ptqd", overrides={"a": {"weight_bits": 3}}, **given)
    assert dict(plain.overrides) == {"a": {"weight_bits": 3}}
    with pytest.raises(ConfigError, match="weight_bits='many'"):
        QuantizationConfig.preset("ptqd", weight_bits="many")


def test_every_method_of_the_papers_says_what_it_lacks():
    published = {name for name, preset in PRESETS.items() if preset.source != "this package"}
    assert {name for name in published if not PRESETS[name].limitations} == {"tfmq-dm"}
    observed = [name for name in PRESETS if QuantizationConfig.preset(name).temporal == "observed"]
    assert observed == ["brecq", "q-diffusion", "ptqd", "ptq4dm"], "what knows nothing of time"


def prepared(**options):
    data = batch(16)
    graph = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), data), QuantizationConfig(**options), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, [data], progress=False)
    return graph, data


def test_the_released_code_leaves_out_what_its_names_hit():
    program = tfmq_fx.prepare(
        tfmq_fx.capture(small_denoiser(), batch()),
        QuantizationConfig.preset("tfmq-dm-released"),
        timesteps=TIMESTEPS,
    )
    kept = PreparedState.of(program).kept_float
    assert kept["up.shortcut"] == "keep_float has '*shortcut*'"
    unet_names = {
        "down_blocks.0.downsamplers.0.conv": True,
        "up_blocks.1.resnets.0.conv_shortcut": True,
        "time_embedding.linear_1": True,
        "time_embedding.linear_2": False,
        "input_blocks.3.0.op": True,
        "input_blocks.4.0.skip_connection": True,
        "upsampler.operator": False,
    }
    config = QuantizationConfig.preset("tfmq-dm-released")
    assert {n: config.keeps_float(n, frozenset()) is not None for n in unet_names} == unet_names
    assert config.for_layer("time_embedding.linear_2").activation_bits == 32


def quantize_nodes(program):
    q = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return [node for node in program.graph_module.graph.nodes if node.target is q]


@pytest.mark.parametrize("range_", ["ema", "minmax", "mse"])
def test_symmetric_activations_have_their_zero_in_the_middle(range_):
    eight = {"defer_softmax": False, "shortcut_bits": None}
    graph, data = prepared(symmetric_activations=True, activation_range=range_, temporal="shared", **eight)
    softmax = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    program = tfmq_fx.convert(graph)
    zeros = {node: node.args[2] for node in quantize_nodes(program)}
    after_softmax = [zero for node, zero in zeros.items() if node.args[0].name == softmax.name]
    assert after_softmax == [0]
    assert [zero for node, zero in zeros.items() if node.args[0].name != softmax.name] == [128] * (len(zeros) - 1)
    with torch.no_grad():
        assert relative(program.graph_module(*data), small_denoiser()(*data)) < 0.05
    report = tfmq_fx.lower(program, backend="reference").report
    assert report.eligible == 7  # as many as asymmetric ones: uint8 with a zero point is what the kernels take


@pytest.mark.parametrize("bits", [8, 16])
def test_the_softmax_has_its_own_width(bits):
    graph, _ = prepared(softmax_bits=bits, activation_bits=6, symmetric_activations=True, defer_softmax=False)
    softmax = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    program = tfmq_fx.convert(graph)
    widths = {node.args[0].name == softmax.name: (node.args[2:5]) for node in quantize_nodes(program)}
    assert widths[True] == (0, 0, 2**bits - 1) and widths[False][2] == 63
    reasons = [e.reason for e in tfmq_fx.lower(program, backend="reference").report.entries if e.operator == "matmul"]
    assert [("wider than 8 bits" in reason) for reason in reasons] == [False, bits == 16]


def test_the_result_is_rounded_to_its_width():
    for keep in (("input", "output"), ()):
        graph, data = prepared(output_bits=4, keep_float=keep, symmetric_activations=True)
        with torch.no_grad():
            result = tfmq_fx.convert(graph).graph_module(*data)
        assert len(result.unique()) <= 16
        plain, _ = prepared(keep_float=keep)
        with torch.no_grad():
            assert len(tfmq_fx.convert(plain).graph_module(*data).unique()) > 500


def test_the_result_stays_rounded_through_reconstruction_and_on_disk(tmp_path):
    model, data = small_denoiser(), batch(24)
    config = short(QuantizationConfig.preset("brecq", output_bits=4, weight_bits=4))
    program = tfmq_fx.quantize(model, config, [data], timesteps=TIMESTEPS, progress=False)
    again = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "artefact"))
    with torch.no_grad():
        result = again.graph_module(*data)
    assert len(result.unique()) <= 16 and torch.equal(result, program.graph_module(*data))


def test_a_symmetric_range_stays_symmetric_when_it_is_observed_again():
    graph, _ = prepared(symmetric_activations=True, temporal="shared")
    observer = next(m for m in graph.modules() if getattr(m, "qscheme", None) == torch.per_tensor_symmetric)
    quantizer = ActivationQuantizer(observer)
    quantizer.observing = True
    quantizer(torch.tensor([0.0, 2.54]))
    assert int(quantizer.zero_point) == 128 and float(quantizer.scale) == pytest.approx(0.02)
