"""The README's pictures of what reconstruction does to the sense of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import fx

import tfmq_fx
from tfmq_fx.diagnostics import Diagnosis, deviation_curve, diagnose, mismatch_heatmap

__all__ = ["draw_pictures"]

#: Labels and cells, all at W4A8 and of seed 0.
SHOWN = {
    "W4A8, rounded to nearest": "W4A8-nearest-s0",
    "W4A8, BRECQ": "W4A8-BRECQ-s0",
    "W4A8, TIAR + FSC + BRECQ": "W4A8-BRECQ+TIAR+FSC-s0",
}
SEED = 7
DPI = 160


def draw_pictures(captured: fx.GraphModule, work: Path, out: Path) -> None:
    """Diagnose the shown programs at all 1,000 timesteps and along 16 trajectories, and draw.

    Args:
        captured: The float graph.
        work: The folder of the benchmark; diagnoses are kept there.
        out: Where the pictures go.
    """
    diagnoses = {}
    for label, cell in SHOWN.items():
        file = work / "diagnoses" / f"{cell}.json"
        if not file.is_file():
            program = tfmq_fx.load(work / "programs" / cell)
            found = diagnose(captured, program, label=label, samples=16, timesteps=torch.arange(1000), seed=SEED)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        diagnoses[label] = Diagnosis.from_dict(content)
    for name, figure in (("mismatch", mismatch_heatmap(diagnoses)), ("deviation", deviation_curve(diagnoses))):
        figure.savefig(out / f"{name}.png", dpi=DPI)
