"""What diagnoses are shown as: pictures, and the command ``diagnose``."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import tfmq_fx
from tests.cli.test_cli import refused, save_pipeline, tfmq
from tests.diagnostics.test_diagnostics import diagnosis
from tests.models import TIMESTEPS
from tfmq_fx import ConfigError, diagnostics
from tfmq_fx.diagnostics import Diagnosis
from tfmq_fx.diagnostics.plot_parts import PALETTE, classes, percent, share, some_percent

PICTURES = ("mismatch", "nearest", "feature-error", "deviation", "layers")


@functools.cache
def two():
    return {"four bits": diagnosis(), "eight bits": diagnosis("W8A8", weight_bits=8)}


def drawn(figure, tmp_path):
    """The picture as pixels: drawing is what finds a wrong scale or label."""
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "picture.png", dpi=60)
    return np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))


def shifted(by):
    """A diagnosis whose first layer speaks of other timesteps."""
    found = diagnosis()
    timesteps = found.mismatch.timesteps
    matched = timesteps[:, None].expand(-1, 2).clone()
    matched[:, 0] += torch.tensor(by, dtype=torch.float64)
    return dataclasses.replace(found, mismatch=dataclasses.replace(found.mismatch, matched=matched))


# --- pictures ---------------------------------------------------------------------------------------


def test_heat_maps_have_a_panel_per_program_with_layers_and_timesteps(tmp_path):
    for figure in (
        diagnostics.mismatch_heatmap(two()),
        diagnostics.mismatch_heatmap(two(), measure="distance"),
        diagnostics.feature_error_plot(two()),
    ):
        drawn(figure, tmp_path)
        first, second, scale = figure.axes
        assert [axes.get_title("left") for axes in (first, second)] == list(two())
        assert [label.get_text() for label in first.get_yticklabels()] == ["down", "up"]  # all end with .embed
        assert first.get_ylim()[0] > first.get_ylim()[1]  # the first layer is on top
        assert second.get_xlim() == (-50, 950)
        assert "timestep" in second.get_xlabel()
        assert scale.get_ylabel()


def test_the_mismatch_shows_its_numbers_and_classes(tmp_path):
    by = [0, 0, 0, 0, 0, 100, -100, 300, -700, 900]  # of timesteps that are 100 apart
    found = {"moved": shifted(by)}
    figure = diagnostics.mismatch_heatmap(found)
    drawn(figure, tmp_path)
    panel, scale = figure.axes
    assert panel.get_title("right") == "75.0 % right, mean |δ| 105.00 timesteps"
    assert [label.get_text() for label in scale.get_yticklabels()] == [
        "−800 and beyond", "−400 to −700", "−200 to −300", "−100", "0: right",
        "+100", "+200 to 300", "+400 to 700", "+800 and beyond",
    ]  # fmt: skip
    mesh = panel.collections[0]
    mesh.update_scalarmappable()
    colours = [to_hex(colour) for colour in mesh.get_facecolors()]
    # Timesteps ascend from left to right, and the classes are distinct.
    assert TIMESTEPS.tolist() == sorted(TIMESTEPS.tolist())
    right = colours[0]
    assert colours[10:] == [right] * 10  # the second layer
    assert [colour == right for colour in colours[:10]] == [shift == 0 for shift in by]
    assert len(set(colours[5:10])) == 5


def test_timesteps_in_any_order_are_drawn_in_ascending_order():
    found = shifted([0, 0, 0, 0, 0, 0, 0, 0, 0, 100])
    mismatch = found.mismatch
    back = dataclasses.replace(mismatch, timesteps=mismatch.timesteps.flip(0), matched=mismatch.matched.flip(0))
    meshes = [
        diagnostics.mismatch_heatmap({"x": dataclasses.replace(found, mismatch=m)}).axes[0].collections[0]
        for m in (mismatch, back)
    ]
    assert np.array_equal(meshes[0].get_array(), meshes[1].get_array())
    assert meshes[0].get_array().reshape(2, 10)[0].tolist() == [0] * 9 + [100]


def test_classes_are_multiples_of_the_spacing():
    bounds, names = classes(1)
    assert bounds[1:-1] == [-7.5, -3.5, -1.5, -0.5, 0.5, 1.5, 3.5, 7.5]
    assert names[4:] == ["0: right", "+1", "+2 to 3", "+4 to 7", "+8 and beyond"]


def test_the_feature_error_is_on_a_log_scale_that_all_panels_share(tmp_path):
    figure = diagnostics.feature_error_plot(two())
    norms = [axes.collections[0].norm for axes in figure.axes[:2]]
    values = torch.cat([found.features.relative.flatten() for found in two().values()])
    for norm in norms:
        assert type(norm).__name__ == "LogNorm"
        assert (norm.vmin, norm.vmax) == (values.min().item(), values.max().item())
    exact = dataclasses.replace(diagnosis().features, relative=torch.zeros(10, 2, dtype=torch.float64), overall=0.0)
    none = diagnostics.feature_error_plot({"float": dataclasses.replace(diagnosis(), features=exact)})
    pixels = drawn(none, tmp_path)
    assert (pixels[60:120, 150:400] > 250).all()  # white: nothing was lost
    assert "white: none" in none.axes[-1].get_ylabel()


def test_curves_show_median_band_and_psnr(tmp_path):
    figure = diagnostics.deviation_curve(two())
    drawn(figure, tmp_path)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "‖x̂ − x‖ / ‖x‖" in axes.get_ylabel()
    assert "step" in axes.get_xlabel()
    assert "Median of 3" in axes.get_title("left")
    found = two()["four bits"]
    first, _, alone, _ = axes.lines
    assert np.allclose(first.get_ydata(), found.trajectory.quantile(0.5))
    assert np.allclose(alone.get_ydata(), found.temporal_trajectory.quantile(0.5))
    assert (first.get_color(), alone.get_color()) == (PALETTE[0], PALETTE[0])
    assert (first.get_linestyle(), alone.get_linestyle()) == ("-", "--")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == f"four bits: mean PSNR {found.trajectory.psnr.mean():.1f} dB"
    assert labels[2].startswith("four bits, temporal block alone: mean PSNR")
    assert len(diagnostics.deviation_curve(two(), temporal=False).axes[0].lines) == 2
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(found.trajectory.quantile(0.9).max().item())
    assert heights.min() == pytest.approx(found.trajectory.quantile(0.1).min().item())


def test_the_layers_are_drawn_in_their_order_under_the_names_of_their_blocks(tmp_path):
    figure = diagnostics.layer_error_plot(two())
    drawn(figure, tmp_path)
    axes = figure.axes[0]
    found = two()["four bits"].layers
    expected = [layer.sqnr if np.isfinite(layer.sqnr) else np.nan for layer in found.layers]
    assert np.array_equal(axes.lines[0].get_ydata(), expected, equal_nan=True)
    assert "dB" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["time", "enter", "down", "qkv", "up", "leave"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "four bits, each layer alone" in texts
    fewer = dataclasses.replace(diagnosis(), layers=dataclasses.replace(found, layers=found.layers[1:]))
    with pytest.raises(ConfigError, match="second has other layers than first"):
        diagnostics.layer_error_plot({"first": diagnosis(), "second": fewer})


def test_pictures_leave_out_what_is_not_there_and_say_so_when_nothing_is():
    empty = Diagnosis("empty", skipped={"mismatch": "it has no temporal block"})
    assert len(diagnostics.mismatch_heatmap({"some": diagnosis(), "empty": empty}).axes) == 2
    with pytest.raises(ConfigError, match="'mismatch' to draw: it has no temporal block"):
        diagnostics.mismatch_heatmap({"empty": empty})
    for draw in (diagnostics.feature_error_plot, diagnostics.deviation_curve, diagnostics.layer_error_plot):
        with pytest.raises(ConfigError, match="no diagnosis has the section"):
            draw({"empty": empty})
    with pytest.raises(ConfigError, match="measure='angle'"):
        diagnostics.mismatch_heatmap(two(), measure="angle")


def test_pictures_need_no_pyplot():
    diagnostics.deviation_curve(two())
    assert "matplotlib.pyplot" not in sys.modules


def test_numbers_are_written_for_people():
    assert [percent(x) for x in (0.1, 0.002)] == ["10 %", "0.2 %"]
    assert [some_percent(x) for x in (0.02, 0.03, 0.0005)] == ["2 %", "", "0.05 %"]
    assert [share(x) for x in (1.0, 0.99999, 0.5)] == ["100.0 %", "> 99.9 %", "50.0 %"]


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def artefacts(model, tmp_path_factory):
    """Two programs of one model."""
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(model / "unet")
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(4)
    batches = tfmq_fx.sample_trajectories(unet, scheduler, steps=4, samples=2, keep=2, progress=False)
    folder = tmp_path_factory.mktemp("artefacts")
    for bits in (8, 4):
        # GPTQ makes up for four bits at so few timesteps.
        config = tfmq_fx.QuantizationConfig(weight_bits=bits, reconstruction="nearest")
        program = tfmq_fx.quantize(unet, config, batches, timesteps=scheduler.timesteps, progress=False)
        program.scheduler = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        tfmq_fx.save(program, folder / f"w{bits}")
    return folder / "w8", folder / "w4"


def test_diagnose_writes_json_and_pictures_for_several_artefacts(model, artefacts, tmp_path):
    out = tmp_path / "new" / "report"
    options = [word for path in artefacts for word in ("--artefact", path)]
    result = tfmq("diagnose", model, *options, "--out", out, "--samples", 2)
    assert result.exit_code == 0, result.output
    written = json.loads((out / "diagnosis.json").read_text())
    assert (written["samples"], written["seed"]) == (2, 0)
    eight, four = (Diagnosis.from_dict(values) for values in written["diagnoses"])
    assert (eight.label, four.label) == ("w8", "w4")
    assert eight.mismatch.timesteps.tolist() == [750, 500, 250, 0]
    assert eight.trajectory.relative.shape == (4, 2)
    assert eight.features.overall < four.features.overall
    names = ["diagnosis.html", "diagnosis.json", *(f"{p}.png" for p in PICTURES)]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert (out / "diagnosis.html").read_text().count("data:image/png;base64,") == len(PICTURES)
    for name in PICTURES:
        assert Image.open(out / f"{name}.png").size[0] == 1600
    assert "diagnosing w4" in result.stderr
    for words in ("w8", "w4", "right timestep, by cosine", four.layers.worst(1)[0].name, str(out / "mismatch.png")):
        assert words in result.stdout


def test_diagnose_at_every_training_timestep(model, artefacts, tmp_path):
    result = tfmq("diagnose", model, "--artefact", artefacts[0], "--out", tmp_path / "r", "--samples", 1,
                  "--steps", 2, "--every-timestep")  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "r" / "diagnosis.json").read_text())["diagnoses"][0]
    assert values["mismatch"]["timesteps"] == list(range(1000))
    assert values["trajectory"]["timesteps"] == [500, 0]


def test_diagnose_refuses_bad_input_before_the_work(model, artefacts, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(diagnostics, "diagnose", never)
    common = ("diagnose", model, "--artefact", artefacts[0], "--out")
    out = tmp_path / "report"
    refused(tfmq(*common, artefacts[1]), "is an artefact; choose another folder")
    refused(tfmq(*common, out, "--artefact", artefacts[0]), "is named twice")
    refused(tfmq(*common, out, "--artefact", tmp_path), "is not an artefact")
    refused(tfmq(*common, out, "--steps", 3, "--unknown-timestep", "error"), "is not in the table")
    other = save_pipeline(tmp_path / "other", block_out_channels=(8, 24))
    result = tfmq("diagnose", other, "--artefact", artefacts[0], "--out", out)
    refused(result, "its block_out_channels is [8, 16], this model's [8, 24]")
    assert str(artefacts[0]) in result.stderr
    assert not out.exists()
    assert tfmq("diagnose", "--out", out).exit_code == 2


def test_artefacts_of_one_name_are_told_apart_by_their_paths(artefacts, tmp_path):
    from tfmq_fx.cli.diagnose import _labels

    assert _labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == [str(tmp_path / "a/x"), str(tmp_path / "b/x")]
    assert _labels(list(artefacts)) == ["w8", "w4"]


def test_diagnose_has_help():
    result = tfmq("diagnose", "--help")
    assert result.exit_code == 0
    for words in ("--artefact", "MODEL", "--every-timestep", "--out"):
        assert words in result.stdout
