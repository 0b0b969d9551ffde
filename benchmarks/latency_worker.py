"""One engine in one process: builds it, then answers requests. ``latency.py`` starts it; nobody calls it by hand.

Requests and answers are JSON lines on standard input and output. A request names what to ``do``:

- ``prepare``: write the engine's own files;
- ``load``: build it for a batch and run the test inputs once, whose result goes to the file ``output``;
- ``time``: ``calls`` steps, with the seconds of each;
- ``sample``: a whole DDIM run, with its seconds; the result goes to ``output``;
- ``stop``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_engines import ENGINES, Unavailable
from latency_engines.engine import Arrays, Step

__all__ = ["Worker"]


def memory() -> dict[str, int]:
    """Bytes that this process holds, and held at most since the peak was set back."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {key: value.split() for key, value in (line.split(":", 1) for line in lines)}
    return {"bytes": int(sizes["VmRSS"][0]) * 1024, "peak_bytes": int(sizes["VmHWM"][0]) * 1024}


def reset_peak() -> None:
    """Let the peak of memory start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def ddim(step: Step, inputs: Arrays, timesteps: list[int], alphas: list[float]) -> np.ndarray:
    """Deterministic DDIM (Song et al., 2021; eta 0) with the predicted image clipped to [-1, 1]."""
    x = inputs["sample"]
    further = {name: array for name, array in inputs.items() if name not in ("sample", "timestep")}
    for index, timestep in enumerate(timesteps):
        following = timesteps[index + 1] if index + 1 < len(timesteps) else 0
        now, then = np.float32(alphas[timestep]), np.float32(alphas[following])
        times = np.full(len(x), timestep, dtype=np.int64)
        noise = step({"sample": x, "timestep": times, **further})
        image = np.clip((x - np.sqrt(1 - now) * noise) / np.sqrt(now), -1, 1)
        x = np.sqrt(then) * image + np.sqrt(1 - then) * noise
    return x


class Worker:
    """Holds the engine between requests.

    Args:
        name: Of the engine.
        folder: Of the UNet.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.engine, self.folder = ENGINES[name], folder
        self.step: Step | None = None
        self.inputs: Arrays = {}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write the engine's own files."""
        began = time.perf_counter()
        self.engine.call("prepare", self.folder, self.engine.settings)
        return {"seconds": time.perf_counter() - began, **memory()}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build the engine and run it once."""
        began = time.perf_counter()
        self.inputs = dict(np.load(self.folder / f"inputs-b{request['batch']}.npz"))
        self.step = self.engine.call("load", self.folder, self.engine.settings, self.inputs)
        loaded = time.perf_counter()
        np.save(request["output"], self.step(self.inputs))
        files = self.engine.call("files", self.folder, self.engine.settings)
        return {
            "load_seconds": loaded - began,
            "first_step_seconds": time.perf_counter() - loaded,
            "file_bytes": sum(file.stat().st_size for file in files),
            **memory(),
        }

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time single steps."""
        assert self.step is not None
        reset_peak()
        seconds = []
        for _ in range(request["calls"]):
            began = time.perf_counter()
            self.step(self.inputs)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, **memory()}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time a whole sampling run."""
        assert self.step is not None
        about = json.loads((self.folder / "complete.json").read_text(encoding="utf-8"))
        began = time.perf_counter()
        result = ddim(self.step, self.inputs, about["timesteps"], about["alphas_cumprod"])
        seconds = time.perf_counter() - began
        np.save(request["output"], result)
        return {"seconds": seconds}


def main() -> None:
    """Answer requests until told to stop."""
    # Libraries print; what they print goes to standard error, and the answers keep the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], Path(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        try:
            answer = getattr(worker, request["do"])(request)
        except Unavailable as reason:
            answer = {"refused": str(reason)}
        except Exception as error:  # an engine that fails is a row of the table, not the end of the run
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"refused": f"{type(error).__name__}: {first}"}
            import traceback

            traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
