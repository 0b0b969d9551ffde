"""The machine's ceilings, measured: multiply-accumulates a second of oneDNN's kernels, and bytes a second of memory.

Each is the best of several shapes that suit the hardware, so that a real network stays below it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ceilings", "measure"]

#: Convolutions of 3 x 3: batch, channels in and out, side.
CONVOLUTIONS = ((4, 256, 16), (4, 128, 32), (1, 512, 32), (8, 512, 16))
#: Matrix products: rows, inner and outer size.
PRODUCTS = ((1024, 1024, 1024), (4096, 1024, 1024))
#: Values of an array that no cache holds.
LARGE = 1 << 26
SECONDS = 0.4


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of the calls that fit into the time."""
    for _ in range(3):
        call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def _float_convolution(batch: int, channels: int, side: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.randn(batch, channels, side, side).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).to(dtype)
    packed = torch.ops.mkldnn._reorder_convolution_weight(w, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
    arguments = (x, packed, None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")
    return lambda: torch.ops.mkldnn._convolution_pointwise(*arguments)


def _float_product(rows: int, inner: int, outer: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _integer_convolution(batch: int, channels: int, side: int) -> Callable[[], Tensor]:
    x = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
    w = _integers(channels, channels, 3, 3)
    packed = torch.ops.onednn.qconv_prepack(w, scales, 1.0, 0, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
    tail = ([1, 1], [1, 1], [1, 1], 1, 1.0, 0, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qconv_pointwise(x, 1.0, 0, packed, scales, zeros, None, *tail)


def _integer_product(rows: int, inner: int, outer: int) -> Callable[[], Tensor]:
    x = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
    scales, zeros = torch.ones(outer), torch.zeros(outer, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(_integers(outer, inner).t(), [rows, inner])
    tail = (None, 1.0, 0, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, zeros, *tail)


def _rate(name: str) -> float:
    """Multiply-accumulates a second of the best kernel in an arithmetic."""
    rates = []
    for batch, channels, side in CONVOLUTIONS:
        work = batch * side * side * channels * channels * 9
        convolution = (
            _integer_convolution(batch, channels, side)
            if name == "int8"
            else _float_convolution(batch, channels, side, getattr(torch, name))
        )
        rates.append(work / _best(convolution))
    for rows, inner, outer in PRODUCTS:
        product = (
            _integer_product(rows, inner, outer)
            if name == "int8"
            else _float_product(rows, inner, outer, getattr(torch, name))
        )
        rates.append(rows * inner * outer / _best(product))
    return max(rates)


def _bandwidth() -> float:
    """Bytes a second: the better of STREAM's copy and add, which also read what they write over (not counted)."""
    a, b, c = (torch.ones(LARGE) for _ in range(3))
    size = a.numel() * a.element_size()
    return max(2 * size / _best(lambda: b.copy_(a)), 3 * size / _best(lambda: torch.add(a, b, out=c)))


@torch.no_grad()
def ceilings() -> dict[str, float]:
    """Multiply-accumulates a second by arithmetic, and ``"bandwidth"`` in bytes a second, with torch's threads."""
    rates = {name: _rate(name) for name in ("float32", "bfloat16", "int8")}
    return {**rates, "bandwidth": _bandwidth()}


def measure(cores: list[int], threads: int) -> dict[str, float]:
    """:func:`ceilings` in a process of its own, pinned to ``cores``."""
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "timing.ceilings", str(threads)]
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(ceilings()))
