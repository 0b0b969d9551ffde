"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timing.process import interpreter

__all__ = ["machine"]

#: Distributions whose versions are recorded, by environment.
VERSIONS = {
    "project": ("torch", "torchao", "diffusers", "tfmq-fx"),
    "openvino": ("openvino", "nncf"),
    "onnxruntime": ("onnxruntime", "onnx"),
}
ISAS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def _processor() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    flags = fields.get("flags", "").split()
    return {"processor": fields.get("model name", platform.machine()), "has": [isa for isa in ISAS if isa in flags]}


def _versions(environment: str, names: tuple[str, ...]) -> dict[str, str]:
    code = "import sys, importlib.metadata as m\nfor n in sys.argv[1:]: print(n, m.version(n))"
    python = interpreter(environment)
    if not python.exists():
        return {}
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=False)
    return dict(line.split() for line in done.stdout.splitlines())


def machine(cores: list[int], threads: int) -> dict[str, Any]:
    """The processor, cores and threads, versions, date."""
    versions = {name: version for env, names in VERSIONS.items() for name, version in _versions(env, names).items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **_processor(),
        "cores": len(cores),
        "threads": threads,
        "memory_bytes": memory,
        "versions": versions,
    }
