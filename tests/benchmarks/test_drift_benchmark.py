"""The benchmark of the correction of drift: a cell of a small model, and the table."""

import json
import sys
from functools import partial
from pathlib import Path

import diffusers
import pytest

import tfmq_fx
from tests.models import tiny_unet

# Appended, so that a benchmark never stands before a library of the same name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import drift
from quality_models import MODELS, QualityModel


@pytest.mark.filterwarnings("ignore:the drift correction is worth")
def test_a_cell_and_its_table(monkeypatch, tmp_path, capsys):
    model = QualityModel(
        lambda: (tiny_unet().eval(), diffusers.DDPMScheduler()), (1, 8, 8), steps=4, calibrated=8, batch_size=8
    )
    monkeypatch.setitem(MODELS, "bundled", model)
    monkeypatch.setattr(drift, "RESULTS", tmp_path / "drift.json")
    monkeypatch.setattr(drift, "IMAGES", 3)
    monkeypatch.setattr(drift, "FITTED", 4)
    monkeypatch.setattr(tfmq_fx, "lower", partial(tfmq_fx.lower, backend="reference"))
    drift.run([0], ["W4A8, nearest"], ["bundled"])
    (cell,) = json.loads((tmp_path / "drift.json").read_text())["cells"]
    assert {name: len(psnr) for name, psnr in cell["psnr"].items()} == {"plain": 3, "PTQD": 3, "drift": 3}
    monkeypatch.setattr(drift, "measure", None)
    drift.run([0], ["W4A8, nearest"], ["bundled"])  # it is there
    capsys.readouterr()
    drift.report()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["plain", "PTQD", "drift"]
    assert "±" in rows[2] and "±" not in rows[0]
