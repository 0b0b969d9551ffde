"""``temporal="cache"`` and ``"auto"``: features of the float block as stored rows, and the closer of two."""

import copy

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig, ReconstructionConfig
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.passes import TabulateTemporalBlock
from tfmq_fx.passes.precision.compress_temporal_table import find_feature_tables
from tfmq_fx.quantization.convert import program_from_graph


def quantized(**changes):
    config = QuantizationConfig(**{"weight_bits": 4, "activation_groups": 1, **changes})
    return tfmq_fx.quantize(small_denoiser(), config, [batch(16)], timesteps=TIMESTEPS, progress=False)


def rows(graph_module):
    """The float features of the model, ``[K, C]``, by the table of its captured graph."""
    return torch.cat([graph_module.get_buffer(str(g.args[0].target)) for g in find_feature_tables(graph_module)], 1)


def float_rows():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    tfmq_fx.passes.IndexTimesteps(TIMESTEPS)(captured)
    TabulateTemporalBlock()(captured)
    return rows(captured)


@pytest.mark.parametrize(("table", "most"), [("float32", 0.0), ("float16", 1e-2), ("int8", 2e-2)])
def test_cached_rows_are_those_of_the_float_block(table, most):
    program = quantized(temporal="cache", table=table)
    assert not any("embed" in name or "time." in name for name, _ in program.graph_module.named_parameters())
    exact = quantized(temporal="float")
    x, t = batch(16)
    assert relative(program(x, t), exact(x, t)) <= most + 1e-6
    if table == "float32":
        assert torch.allclose(rows(program.graph_module), float_rows(), atol=1e-6)


def test_eight_bit_rows_are_the_default_and_a_quarter_of_the_size():
    stored = {n: b for n, b in quantized(temporal="cache").graph_module.named_buffers() if "temporal_features" in n}
    integers = next(b for b in stored.values() if b.dtype == torch.uint8 and b.shape == float_rows().shape)
    assert integers.numel() * 4 == float_rows().numel() * 4
    assert QuantizationConfig(temporal="auto").resolved_table == "int8"
    assert QuantizationConfig().resolved_table == "float32"


@pytest.mark.parametrize("temporal", ["cache", "auto"])
def test_it_saves_loads_and_lowers(tmp_path, temporal):
    program = quantized(temporal=temporal)
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "program"))
    x, t = batch(16)
    assert torch.equal(loaded(x, t), program(x, t))
    denoiser = tfmq_fx.lower(loaded, backend="reference")
    assert torch.allclose(denoiser(x, t), program(x, t), atol=1e-5)
    assert denoiser.report.temporal_layers == 0 and denoiser.report.table_rows == len(TIMESTEPS)


def test_auto_takes_whatever_is_closer_to_float_layer_by_layer():
    """Rows of the quantized block are worse than float rows; a feature that is exact stays as it is."""
    config = QuantizationConfig(
        weight_bits=2, temporal="auto", table="float32", overrides={"up.embed": {"weight_bits": 16}}
    )
    prepared = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [batch(16)], progress=False)
    assert torch.allclose(rows(tfmq_fx.convert(prepared).graph_module), float_rows(), atol=1e-6)


def test_auto_says_what_it_chose_and_why(tmp_path):
    changes = {"weight_bits": 2, "table": "float16", "reconstruction": "nearest"}
    program = quantized(temporal="auto", **changes)
    block = quantized(temporal="fsc", **changes).graph_module
    TabulateTemporalBlock()(block)
    wanted, ours = float_rows(), rows(block)
    halves = [slice(0, 8), slice(8, 16)]
    for choice, columns in zip(program.temporal_choices, halves, strict=True):
        float_rows_stored, block_rows_stored = (t[:, columns].half().float() for t in (wanted, ours))
        assert choice.cached_error == pytest.approx(relative(float_rows_stored, wanted[:, columns]), rel=1e-3)
        assert choice.quantized_error == pytest.approx(relative(block_rows_stored, wanted[:, columns]), rel=1e-3)
        assert choice.kept == "cached" and choice.quantized_error > 0.05
    assert {choice.layer for choice in program.temporal_choices} == {"down.embed", "up.embed"}
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "program"))
    assert loaded.temporal_choices == program.temporal_choices
    report = tfmq_fx.lower(loaded, backend="reference").report
    assert report.temporal_choices == program.temporal_choices
    assert LoweringReport.from_dict(report.to_dict()) == report
    assert f"  table: {program.temporal_choices[0]}\n" in str(report)
    assert ": cached rows (error cached " in str(program.temporal_choices[0])
    assert quantized(temporal="cache").temporal_choices == ()


def test_auto_keeps_the_block_where_its_rows_are_as_close(monkeypatch):
    """Stored so badly that the rows of both are zero, neither is closer, and nothing is replaced."""
    monkeypatch.setattr("tfmq_fx.temporal.table.stored_rows", lambda rows, storage: torch.zeros_like(rows))
    program = quantized(temporal="auto", table="float32")
    assert [choice.kept for choice in program.temporal_choices] == ["quantized", "quantized"]
    assert not torch.allclose(rows(program.graph_module), float_rows(), atol=1e-3)


def test_auto_after_reconstruction_still_knows_the_float_block():
    learning = ReconstructionConfig(granularity="none", temporal_iterations=3)
    program = quantized(temporal="auto", table="float32", reconstruction=learning)
    assert torch.allclose(rows(program.graph_module), float_rows(), atol=1e-6)


def test_auto_needs_the_prepared_graph():
    prepared = tfmq_fx.prepare(
        tfmq_fx.capture(small_denoiser(), batch()), QuantizationConfig(temporal="auto"), timesteps=TIMESTEPS
    )
    tfmq_fx.calibrate(prepared, [batch(16)], progress=False)
    with pytest.raises(tfmq_fx.ConfigError, match=r"convert with tfmq_fx\.convert"):
        program_from_graph(convert_pt2e(copy.deepcopy(prepared)))


@pytest.mark.parametrize("table", ["float16", "int8"])
def test_the_table_of_a_quantized_block_can_be_stored_small_too(table):
    plain, small = quantized(), quantized(table=table)
    x, t = batch(16)
    assert torch.equal(plain(x, t), small(x, t))  # the block itself is in the program
    lowered = tfmq_fx.lower(small, backend="reference")
    assert 0 < relative(lowered(x, t), plain(x, t)) < 1e-2


@pytest.mark.parametrize("temporal", ["cache", "auto"])
def test_timesteps_are_needed_and_cannot_be_added(temporal):
    with pytest.raises(tfmq_fx.ConfigError, match=r"pass timesteps=scheduler\.timesteps"):
        tfmq_fx.quantize(small_denoiser(), QuantizationConfig(temporal=temporal), [batch()], progress=False)
    with pytest.raises(tfmq_fx.ConfigError, match=r"features of 10 timesteps .* quantize again with all timesteps"):
        tfmq_fx.add_timesteps(quantized(temporal=temporal), [5])
    x, _ = batch(2)
    with pytest.raises(tfmq_fx.TimestepError, match="timestep 8 is not in the table"):
        quantized(temporal=temporal)(x, torch.tensor([8, 8]))


def test_wrong_storage_is_named():
    with pytest.raises(tfmq_fx.ConfigError, match="table"):
        QuantizationConfig(table="int4")
