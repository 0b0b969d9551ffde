"""The floor under each engine's time: the work of a UNet, counted from its graph, at the ceilings of this machine.

    python benchmarks/roofline.py                          # every UNet but sd15, batches 1, 4, 16
    python benchmarks/roofline.py --unets cifar --batches 4

The ceilings (multiply-accumulates a second in float32, bfloat16 and int8, bytes a second of memory) are measured first,
with the cores and threads that ``latency.py`` uses. What is written is read by ``latency.py --report``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from timing.ceilings import measure
from timing.graph_work import BYTES, count, floor_seconds, totals
from timing.machine import machine
from timing.process import BENCHMARKS
from timing.unets import UNETS

RESULTS = BENCHMARKS / "results" / "roofline.json"


def markdown(result: dict[str, Any]) -> str:
    """The ceilings in a line, and a row of work and floors for each UNet and batch."""
    found = result["ceilings"]
    rates = ", ".join(f"{name} {found[name] / 1e9:.0f} GMAC/s" for name in BYTES)
    lines = [
        f"Ceilings measured: {rates}, memory {found['bandwidth'] / 1e9:.1f} GB/s.",
        "",
        "| UNet/batch | GMAC | conv | linear | attention | first, last | time block | floor fp32, ms | bf16 | int8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["floors"].items():
        work = {kind: sums["operations"] for kind, sums in row["work"].items()}
        whole = sum(work.values())
        shares = (f"{work.get(kind, 0) / whole:.2%}" for kind in ("conv", "linear", "attention", "ends", "temporal"))
        floors = (f"{row['seconds'][arithmetic] * 1e3:.1f}" for arithmetic in BYTES)
        lines.append(f"| {name} | {whole / 1e9:.2f} | {' | '.join(shares)} | {' | '.join(floors)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the ceilings, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unets", nargs="+", choices=list(UNETS), default=["bundled", "cifar"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    found = measure(cores, options.threads)
    floors: dict[str, Any] = {}
    for unet in options.unets:
        for batch in options.batches:
            work = count(unet, batch)
            seconds = {arithmetic: floor_seconds(work, found, arithmetic) for arithmetic in BYTES}
            floors[f"{unet}/{batch}"] = {"seconds": seconds, "work": totals(work)}
    result = {**machine(cores, options.threads), "ceilings": found, "floors": floors}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
