import dataclasses
import sys

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig
from tfmq_fx.config.prepared_state import PreparedState

decomposed = torch.ops.quantized_decomposed


def program(config=None, **kwargs):
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False, **kwargs)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.03), (4, 0.2)])
def test_weights_are_integers_with_zero_point_zero_and_the_float_ones_are_gone(bits, limit):
    model, (x, t) = small_denoiser(), batch()
    quantized = program(QuantizationConfig(weight_bits=bits, scale_channels=False))
    graph_module = quantized.graph_module
    graph_module.graph.lint()
    weights = [n for n in graph_module.graph.nodes if n.target is decomposed.dequantize_per_channel.default]
    constants = [n for n in weights if n.args[0].op == "get_attr"]
    assert len(constants) == 11
    for node in constants:
        assert getattr(graph_module, node.args[0].target).dtype == torch.int8
        assert not getattr(graph_module, node.args[2].target).any()
    left = [n for n, v in graph_module.state_dict().items() if v.is_floating_point() and v.ndim > 1]
    assert sorted(left) == ["enter.weight", "leave.weight"]
    assert relative(quantized(x, t), model(x, t).detach()) < limit
    assert set(quantized.kept_float) == {"enter", "leave"}


def test_every_node_knows_its_value():
    for node in program().graph_module.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node


def test_neither_the_model_nor_the_prepared_graph_changes():
    model, data = small_denoiser(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    captured = tfmq_fx.capture(model, data)
    text = captured.code
    prepared = tfmq_fx.prepare(captured, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [data], progress=False)
    prepared_text = prepared.code
    first = tfmq_fx.convert(prepared)
    second = tfmq_fx.convert(prepared)
    assert captured.code == text and prepared.code == prepared_text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(first(*data), second(*data))


def test_converting_without_calibration_says_so():
    prepared = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    with pytest.raises(tfmq_fx.CalibrationError, match="calibrate with at least one batch"):
        tfmq_fx.convert(prepared)


def test_a_foreign_graph_is_refused():
    with pytest.raises(tfmq_fx.ConfigError, match="TFMQQuantizer"):
        tfmq_fx.convert(tfmq_fx.capture(small_denoiser(), batch()))


def test_mixed_batches_equal_single_ones():
    quantized, (x, t) = program(), batch(6, seed=3)
    mixed = quantized(x, t)
    single = torch.cat([quantized(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    assert relative(mixed, single) < 1e-2  # a convolution's sums may round another way in another batch


@pytest.mark.parametrize("bits", [(16, 16), (8, 32), (32, 8), (2, 2)])
def test_other_widths_run(bits):
    quantized = program(QuantizationConfig(weight_bits=bits[0], activation_bits=bits[1]))
    assert torch.isfinite(quantized(*batch())).all()


def test_a_model_without_a_temporal_block_is_refused_with_a_sentence():
    with pytest.raises(tfmq_fx.CaptureError, match="no temporal block: the model has no input named 'timestep'"):
        tfmq_fx.quantize(torch.nn.Linear(3, 3), None, [(torch.randn(2, 3),)], progress=False)
    plain = QuantizationConfig(temporal="float", keep_float=())
    quantized = tfmq_fx.quantize(torch.nn.Linear(3, 3), plain, [(torch.randn(2, 3),)], progress=False)
    assert quantized.timesteps is None


def test_unknown_timesteps():
    x, t = batch()
    with pytest.raises(tfmq_fx.TimestepError, match="timestep 101 is not in the table"):
        program(QuantizationConfig(unknown_timestep="error"))(x, t * 0 + 101)
    nearest = program(QuantizationConfig(unknown_timestep="nearest"))
    assert relative(nearest(x, t * 0 + 101), nearest(x, t * 0 + 100)) < 0.1
    lowered = tfmq_fx.lower(nearest, "reference")
    assert torch.equal(lowered(x, 101), lowered(x, 100))


def test_weights_are_not_copied_to_be_quantized_and_the_program_has_its_own(monkeypatch):
    captured = tfmq_fx.capture(small_denoiser(), batch())
    prepared = tfmq_fx.prepare(captured, QuantizationConfig(scale_channels=False), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [batch()], progress=False)
    # The observers of weights remember them, too.
    weights = {name: v for name, v in prepared.state_dict().items() if name.endswith("weight")}
    assert any(name.startswith("activation_post_process") for name in weights)
    places = {name: value.data_ptr() for name, value in weights.items()}
    room = sys.modules["tfmq_fx.quantization.convert"]
    seen, stock = {}, room.convert_pt2e

    def convert_pt2e(graph_module):
        seen.update((name, graph_module.state_dict()[name].data_ptr()) for name in places)
        return stock(graph_module)

    monkeypatch.setattr(room, "convert_pt2e", convert_pt2e)
    quantized = tfmq_fx.convert(prepared)
    assert seen == places
    left = {value.data_ptr() for value in quantized.graph_module.state_dict().values()}
    assert left and not left & set(places.values())


def test_weights_that_another_tool_made_wider_are_named():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    prepared = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [batch()], progress=False)
    state = PreparedState.of(prepared)
    dataclasses.replace(state, config=dataclasses.replace(state.config, weight_bits=4)).attach(prepared)
    with pytest.warns(UserWarning, match=r"layers have wider weights than configured .* for 4 bits"):
        tfmq_fx.program_from_graph(convert_pt2e(prepared))
