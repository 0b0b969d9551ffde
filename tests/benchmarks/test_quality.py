"""The quality benchmark: its models, its cells, what is recorded of them, and the tables."""

import argparse
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from tests.models import ClassDenoiser, small_denoiser
from tfmq_fx.diagnostics import record_trajectory

# Appended, so that a benchmark never stands before a library of the same name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality
import quality_measure
import quality_models
import quality_report
from quality_cells import ROOT, has_cell, write_json
from quality_methods import BITS, CACHED, METHODS
from quality_models import MODELS, QualityModel

RECORDED = ROOT / "benchmarks" / "results" / "quality.json"


def cell(method, psnr, *, model="bundled", bits="W4A8", seed=0, **other):
    about = {
        "model": model, "method": method, "bits": bits, "seed": seed, "samples": len(psnr), "psnr": psnr,
        "psnr_time_only": None, "feature_error": 0.25, "mismatch": {"right": 1.0, "mean": 0.0}, "deviation": [0.1, 0.5],
        "seconds": {"cpu": 2.0}, "peak_bytes": 3e9,
    }  # fmt: skip
    return {**about, **other}


def test_recorded_cells_say_their_model_and_are_whole():
    content = json.loads(RECORDED.read_text(encoding="utf-8"))
    keys = [(c["model"], c["bits"], c["method"], c["seed"]) for c in content["cells"]]
    assert len(set(keys)) == len(keys) and len([key for key in keys if key[0] == "bundled"]) == 72
    for found in content["cells"]:
        assert found["model"] in MODELS and found["bits"] in BITS and found["date"]
        assert found["method"] in (*METHODS, *CACHED.values())
        assert found["samples"] == quality_report.SAMPLES == len(found["psnr"])
    assert {(f["model"], f["seed"]) for f in content["float"]} == {("bundled", seed) for seed in (0, 1, 2)}


def test_recorded_cells_make_tables_as_they_are(tmp_path, capsys):
    file = tmp_path / "quality.json"
    file.write_bytes(RECORDED.read_bytes())
    quality_report.write_report(tmp_path / "nothing", file, ["bundled"])
    assert "| W4A8 | BRECQ + TIAR + FSC | 3 | 35.6 ± 0.5 | 35.4 | 25.7 |" in capsys.readouterr().out
    assert file.read_bytes() == RECORDED.read_bytes()


def test_differences_are_paired_by_seed_and_image():
    own = [cell("a", [30.0, 20.0], seed=0), cell("a", [31.0, 23.0], seed=1), cell("a", [99.0, 99.0], seed=2)]
    reference = [cell("BRECQ", [29.0, 18.0], seed=0), cell("BRECQ", [28.0, 19.0], seed=1)]
    mean, error = quality_report.paired(own, reference)
    assert mean == pytest.approx(2.5)  # of 1, 2, 3 and 4
    assert error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert quality_report.paired(own, []) is None


def test_a_table_has_the_worst_seed_and_image_and_no_empty_columns():
    cells = [
        cell("nearest", [20.0, 22.0]),
        cell("nearest", [15.0, 29.0], seed=1),
        cell("BRECQ", [30.0, 31.0]),
        cell("BRECQ", [32.0, 33.0], seed=1),
        cell("nearest", [40.0, 41.0], bits="W8A8"),
    ]
    eight, best, nearest = quality_report.rows(cells)
    assert (eight["bits"], best["method"], nearest["method"]) == ("W8A8", "BRECQ", "nearest")
    assert (nearest["PSNR, dB"], nearest["worst seed"], nearest["worst image"]) == ("21.5 ± 0.5", "21.0", "15.0")
    assert nearest["to BRECQ, paired"].startswith("-10.00 ± ")
    assert best["to BRECQ, paired"] == eight["to BRECQ, paired"] == ""
    assert "feature cosine" not in nearest and nearest["final deviation"] == "0.500"


def test_what_was_measured_since_takes_the_place_of_what_is_recorded(tmp_path, capsys):
    file, whole = tmp_path / "quality.json", quality_report.SAMPLES
    old = [cell("BRECQ", [30.0] * whole), cell("BRECQ", [25.0] * whole, model="emoji")]
    write_json(file, {"float": [], "cells": old})
    new = {
        "emoji": cell("BRECQ", [27.0] * whole, model="emoji", units=["long"]),
        "sigma": cell("BRECQ", [24.0] * 2, model="sigma"),
    }
    for model, made in new.items():
        write_json(tmp_path / "work" / model / "cells" / "W4A8-BRECQ-s0.json", made)
    quality_report.write_report(tmp_path / "work", file, ["emoji", "sigma"])
    shown = capsys.readouterr().out
    assert "### emoji" in shown and "### bundled" not in shown and "nothing is measured of sigma" in shown
    assert f"1 cells of other than {whole} images are not recorded" in shown
    kept = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert [(c["model"], c["psnr"][0]) for c in kept] == [("bundled", 30.0), ("emoji", 27.0)]
    assert "units" not in kept[1]
    assert has_cell(tmp_path / "work" / "sigma", "BRECQ", "W4A8", 0, 2)
    assert not has_cell(tmp_path / "work" / "sigma", "BRECQ", "W4A8", 0, whole)


def test_a_model_that_is_not_there_is_left_out_with_a_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality_models, "EMOJI_MODEL", tmp_path / "nowhere")
    assert quality.parsed(["run"]).model == ["bundled", "sigma"]
    assert "nowhere: it is left out" in capsys.readouterr().out
    assert quality.parsed(["run", "--model", "sigma"]).model == ["sigma"]
    assert quality.parsed(["images"]).model == ["bundled"]
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        quality.parsed(["images", "--model", "sigma"])
    assert "images is of the bundled model alone: leave --model out" in capsys.readouterr().err


def test_models_with_ddim_are_walked_as_diagnostics_walk():
    model, made = small_denoiser(), QualityModel(lambda: None, (1, 8, 8), steps=4)
    scheduler = diffusers.DDPMScheduler()
    noise = made.noise(2, seed=3)
    ours = made.trajectory(lambda x, t: model(x, t.expand(len(x))), scheduler, noise)
    theirs = record_trajectory(lambda x, t: model(x, t.expand(len(x))), scheduler, steps=4, noise=noise)
    assert torch.equal(ours.states, theirs.states) and torch.equal(ours.timesteps, theirs.timesteps)
    assert not torch.equal(noise, made.noise(2, seed=4))


def test_the_sigma_conditioned_model_is_walked_by_its_own_solver():
    """A network that knows the one picture there is: the walk ends at it."""
    picture = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    made = QualityModel(lambda: None, (1, 8, 8), steps=6, ddim=False, classes=3)
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)

    def network(scaled, timestep):
        sigma = (4 * timestep).exp()
        total = sigma**2 + 0.25
        return (picture - 0.25 / total * scaled * total.sqrt()) * total.sqrt() / (sigma * 0.5)

    walked = made.trajectory(network, scheduler, made.noise(2, seed=0))
    assert walked.states.shape == (7, 2, 1, 8, 8)
    assert float(walked.states[0].std()) == pytest.approx(80, rel=0.2)
    assert torch.allclose(walked.states[-1], picture.expand(2, 1, 8, 8), atol=1e-4)
    assert made.extra(5)["class_labels"].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_cell_of_either_kind_of_model(monkeypatch, tmp_path, conditional):
    def load():
        torch.manual_seed(0)
        if conditional:
            return ClassDenoiser().eval(), diffusers.EDMEulerScheduler()
        return small_denoiser(), diffusers.DDPMScheduler()

    shared = {"steps": 4, "calibrated": 8, "batch_size": 8}
    own = {"ddim": False, "classes": 4} if conditional else {"every": torch.arange(0, 1000, 50)}
    monkeypatch.setitem(MODELS, "small", QualityModel(load, (1, 8, 8), **shared, **own))
    monkeypatch.setattr(quality_measure, "WORK", tmp_path)
    options = argparse.Namespace(iterations=2, temporal_iterations=2, samples=3)
    quality_measure.measure_cell("small", "BRECQ, time float", "W4A8", 0, options)
    files = sorted((tmp_path / "small" / "cells").glob("*.json"))
    assert [file.stem for file in files] == ["W4A8-BRECQ-time-cached-s0", "W4A8-BRECQ-time-float-s0"]
    cached, exact = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert (exact["model"], exact["samples"], len(exact["psnr"])) == ("small", 3, 3)
    assert exact["feature_error"] == 0.0 < cached["feature_error"] and exact["psnr_time_only"] is None
    assert len(cached["psnr_time_only"]) == 3
    assert (exact["mismatch_every_timestep"] is None) == conditional
    assert quality_report.rows([exact, cached])
