"""The parent's side of a worker process: start it, ask it, watch how much of the processor it and others take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from latency_engines import ENGINES

__all__ = ["BENCHMARKS", "WorkerProcess", "interpreter", "processor_seconds"]

BENCHMARKS = Path(__file__).resolve().parent.parent
PEERS = BENCHMARKS.parent / ".peers"


def interpreter(environment: str) -> Path:
    """The Python of an environment: this one for ``"project"``, else one that ``make bench-peers`` made."""
    return Path(sys.executable) if environment == "project" else PEERS / environment / "bin" / "python"


def processor_seconds() -> float:
    """Seconds that all cores together were busy since the machine started, in steps of 10 ms."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class WorkerProcess:
    """One worker.

    Args:
        name: Of the engine.
        folder: Of the UNet.
        cores: The cores that it may use.
        threads: Threads of a kernel.
        cache: Where Inductor keeps what it compiles.
    """

    def __init__(self, name: str, folder: Path, cores: list[int], threads: int, cache: Path) -> None:
        self.name = name
        self.started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "logs" / f"{name.replace(' ', '-').replace(',', '')}.log"
        log.parent.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(interpreter(ENGINES[name].environment)), str(BENCHMARKS / "latency_worker.py"), name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        self.log = log

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; a worker that died answers ``{"refused": why}``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"refused": f"the process ended with status {self.process.wait()}; its log is {self.log.name}"}

    def own_seconds(self) -> float:
        """Seconds of the processor that the worker has taken."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        nanoseconds = 0
        for task in tasks.iterdir():
            try:
                nanoseconds += int((task / "schedstat").read_text(encoding="utf-8").split()[0])
            except FileNotFoundError:  # a thread that ended meanwhile
                continue
        return nanoseconds / 1e9

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.ask("stop")
        self.process.wait()
