"""The whole diagnosis: its parts put together, through JSON and back, as tables."""

import functools
import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

import tfmq_fx
from tests.diagnostics_cases import LAYERS, WEIGHTED, captured, float_program, program
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig, TimestepError, diagnostics
from tfmq_fx.diagnostics import Diagnosis
from tfmq_fx.passes.analysis import find_temporal_block

# --- the whole diagnosis ----------------------------------------------------------------------------


@functools.cache
def diagnosis(label="W4A8", **changes):
    return diagnostics.diagnose(captured(), program(**(changes or {"weight_bits": 4})), label=label, samples=3)


def test_the_float_model_lost_nothing():
    found = diagnostics.diagnose(captured(), float_program(), samples=2)
    assert found.skipped == {}
    assert found.features.overall == 0
    assert (found.features.cosine == 1).all()
    assert not found.features.relative.any()
    for mismatch in (found.mismatch, found.nearest):
        assert (mismatch.share_right, mismatch.mean_shift) == (1, 0)
    for deviation in (found.trajectory, found.temporal_trajectory):
        assert not deviation.relative.any()
        assert deviation.psnr.tolist() == [math.inf] * 2
    for layers in (found.layers, found.local_layers):
        assert len(layers.layers) == WEIGHTED
        assert all(layer.error == 0 for layer in layers.layers)


def test_a_diagnosis_holds_what_its_parts_measure():
    found = diagnosis()
    quantized = program(weight_bits=4)
    assert found.skipped == {}
    expected = diagnostics.temporal_mismatch(captured(), quantized)
    assert torch.equal(found.mismatch.matched, expected.matched)
    assert found.trajectory.relative.shape == (10, 3)  # as many steps as the table has rows
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoisers = [diagnostics.graph_denoiser(g) for g in (captured(), quantized.graph_module)]
    alone = diagnostics.compare_trajectories(*denoisers, DDPMScheduler(), steps=10, noise=noise)
    assert torch.equal(found.trajectory.relative, alone.relative)
    assert 0 < found.temporal_trajectory.mean[-1] < found.trajectory.mean[-1]
    assert found.layers.rows == 5 * 3
    assert found.config["weight_bits"] == 4


def test_more_bits_lose_less():
    eight = diagnosis("W8A8", weight_bits=8)
    assert eight.features.overall < diagnosis().features.overall
    assert eight.trajectory.mean[-1] < diagnosis().trajectory.mean[-1]


def test_a_diagnosis_goes_through_json_and_back():
    for found in (diagnosis(), diagnostics.diagnose(captured(), float_program(), samples=1, steps=2)):
        text = found.to_json()
        again = Diagnosis.from_json(text)
        assert again.to_json() == text
        assert torch.equal(again.mismatch.margin, found.mismatch.margin)
        assert torch.equal(again.trajectory.psnr, found.trajectory.psnr)
        assert again.layers == found.layers
        assert str(again) == str(found)
    assert json.loads(text)["trajectory"]["psnr"] == ["inf"]


def test_what_is_no_diagnosis_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        Diagnosis.from_json("{")
    with pytest.raises(ConfigError, match="not those of a diagnosis"):
        Diagnosis.from_dict({"label": "x"})


def test_the_tables_say_what_was_lost_and_what_was_left_out():
    text = str(diagnosis())
    assert "right timestep, by cosine" in text
    assert f"{diagnosis().features.overall:.2%}" in text
    assert diagnosis().layers.worst(1)[0].name in text
    assert "left out" not in text
    together = diagnostics.comparison_table([diagnosis(), diagnosis("W8A8", weight_bits=8)])
    assert [column.header for column in together.columns] == ["", "W4A8", "W8A8"]


def test_a_model_without_a_temporal_block_is_diagnosed_without_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    x = torch.randn(4, 4)
    config = QuantizationConfig(keep_float=(), temporal="float")
    quantized = tfmq_fx.quantize(model, config, [(x,)], progress=False)
    found = diagnostics.diagnose(tfmq_fx.capture(model, (x,)), quantized, batch=(x,), scheduler=DDPMScheduler())
    assert "no temporal block: the model has no input named 'timestep'" in found.skipped["mismatch"]
    assert "not a sample and 'timestep'" in found.skipped["trajectory"]
    assert found.features is found.mismatch is found.nearest is found.trajectory is None
    assert [layer.name for layer in found.layers.layers] == ["0", "2"]
    assert "left out" in str(found)
    assert Diagnosis.from_json(found.to_json()).skipped == found.skipped
    nothing = diagnostics.diagnose(tfmq_fx.capture(model, (x,)), quantized)
    assert "pass batch or a scheduler" in nothing.skipped["layers"]
    assert "pass scheduler" in nothing.skipped["trajectory"]


def test_a_program_whose_block_is_gone_is_diagnosed_without_it():
    from tfmq_fx.passes import IndexTimesteps, StripDeadState, TabulateTemporalBlock

    tabulated = float_program()
    for rewrite in (IndexTimesteps(TIMESTEPS), TabulateTemporalBlock(), StripDeadState()):
        rewrite(tabulated.graph_module)
    assert not find_temporal_block(tabulated.graph_module).linears
    found = diagnostics.diagnose(captured(), tabulated, samples=1)
    assert "the program has no temporal block" in found.skipped["features"]
    assert "the program has no temporal block" in found.skipped["temporal_trajectory"]
    assert found.trajectory.relative.max() < 1e-5
    assert set(found.layers.unmatched) == {"time.one", "time.two", *LAYERS}


def test_progress_counts_every_section_to_its_end():
    seen = {}

    def note(section, done, total):
        seen[section] = done, total

    diagnostics.diagnose(captured(), float_program(), samples=1, steps=2, progress=note)
    assert all(done == total > 0 for done, total in seen.values())
    assert set(seen) == {
        "temporal features", "sampling, float", "sampling, quantized", "sampling, temporal block",
        "layers, as the net runs", "layers, each alone",
    }  # fmt: skip


def test_another_model_and_bad_numbers_are_refused():
    other = tfmq_fx.capture(UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])))  # fmt: skip
    with pytest.raises(ConfigError, match="mine was made from another model: they have no layer in common"):
        diagnostics.diagnose(other, program(), label="mine")
    wider = small_denoiser()
    wider.leave = nn.Conv2d(8, 2, 3, padding=1)
    with pytest.raises(ConfigError, match="its layer leave has 1 outputs, this model's 2"):
        diagnostics.diagnose(tfmq_fx.capture(wider, batch()), program())
    for samples in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"samples={samples}"):
            diagnostics.diagnose(captured(), program(), samples=samples)
    with pytest.raises(ConfigError, match="0 sampling steps are not possible"):
        diagnostics.diagnose(captured(), program(), steps=0)
    with pytest.raises(TimestepError, match="is not in the table"):
        diagnostics.diagnose(captured(), program(), steps=3, samples=1)


def test_nothing_given_is_changed():
    graph, quantized = captured(), program()
    before = [(g.code, {k: v.clone() for k, v in g.state_dict().items()}) for g in (graph, quantized.graph_module)]
    diagnostics.diagnose(graph, quantized, samples=1, timesteps=[0, 100, 150])
    for g, (code, state) in zip((graph, quantized.graph_module), before, strict=True):
        assert g.code == code
        assert all(torch.equal(value, state[name]) for name, value in g.state_dict().items())
