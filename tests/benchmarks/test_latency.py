"""The latency benchmark: turns, ratios, the wrong-output rule, the worker's protocol, and the counted floor."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tfmq_fx

# Appended, so that a benchmark never stands before a library of the same name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import latency
from latency_worker import ddim
from timing import rounds
from timing.graph_work import Product, floor_seconds, products, totals
from timing.process import WorkerProcess
from timing.rounds import Turn, ratios, run_rounds, spread
from timing.tables import HEADER, markdown


class FakeWorker:
    """Answers at once, and says how often it was asked."""

    def __init__(self, name, order, seconds=(1.0, 9.0, 2.0)):
        self.name, self.order, self.seconds = name, order, list(seconds)

    def own_seconds(self):
        return 0.0

    def ask(self, what, **values):
        self.order.append(self.name)
        return {"seconds": self.seconds, "peak_bytes": 7}


def test_engines_have_turns_in_order(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE", 0)
    monkeypatch.setattr(rounds, "processor_seconds", lambda: 0.0)
    order = []
    turns = run_rounds([FakeWorker("a", order), FakeWorker("b", order)], 3, {"what": "time"}, cores=2)
    assert order == ["a", "b"] * 3
    assert [turn.median for turn in turns["a"]] == [2.0] * 3
    assert turns["b"][0].peak_bytes == 7


def test_a_disturbed_turn_is_repeated(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE", 0)
    clock = iter(range(100))
    monkeypatch.setattr(rounds, "processor_seconds", lambda: float(next(clock)))
    order = []
    turns = run_rounds([FakeWorker("a", order)], 1, {"what": "time"}, cores=1)
    assert order == ["a"] * rounds.REPEATS
    assert turns["a"][0].others > rounds.DISTURBED


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    slow, fast = [Turn((s,), 0.0) for s in (2.0, 6.0, 30.0)], [Turn((s,), 0.0) for s in (1.0, 2.0, 5.0)]
    assert ratios(slow, fast) == {"median": 3.0, "low": 2.5, "high": 4.5}
    assert spread([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_infinitely_wrong(bad):
    right = np.ones((2, 3), dtype=np.float32)
    assert latency.relative_error(right * 1.1, right) == pytest.approx(0.1, rel=1e-4)
    assert latency.relative_error(np.where(np.eye(2, 3) > 0, bad, right), right) == float("inf")
    assert latency.relative_error(right[:1], right) == float("inf")


class Loaded:
    """A worker of a cell that loads nothing: its output lies in the file already."""

    def __init__(self, name):
        self.name, self.stopped = name, False

    def stop(self):
        self.stopped = True


def test_a_wrong_engine_gets_no_time(tmp_path, monkeypatch):
    cell = latency.Cell("bundled", 1, SimpleNamespace(threads=1))
    scales = {latency.EAGER: 1.0, "right": 1.05, "wrong": 2.0, "empty": np.nan}
    made, prepared = {}, []

    def prepare(name):
        assert not made, "quantizing beside loaded engines takes more memory than there may be"
        prepared.append(name)

    def load(name, output):
        cell.rows[name] = {}
        np.save(output, np.full((2, 2), scales[name], dtype=np.float32))
        made[name] = Loaded(name)
        return made[name]

    monkeypatch.setattr(cell, "prepare", prepare)
    monkeypatch.setattr(cell, "load", load)
    monkeypatch.setattr(latency, "ENGINES", dict.fromkeys(scales, latency.ENGINES[latency.EAGER]))
    workers = cell.loaded(["right", "wrong", "empty"], tmp_path)
    assert prepared == ["right", "wrong", "empty"]
    assert [worker.name for worker in workers] == ["right"]
    assert "relative error 1" in cell.rows["wrong"]["refused"]
    assert "refused" in cell.rows["empty"]
    assert made["wrong"].stopped and made[latency.EAGER].stopped and not made["right"].stopped


def test_ddim_finds_the_image_behind_known_noise():
    alphas = np.linspace(0.999, 0.01, 1000).tolist()
    timesteps = list(range(980, -1, -20))
    image = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 1, 4, 4)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=image.shape).astype(np.float32)
    first = np.float32(alphas[timesteps[0]])
    seen = []

    def step(inputs):
        seen.append(int(inputs["timestep"][0]))
        assert inputs["prompt"].shape == (2, 5)
        return noise

    start = np.sqrt(first) * image + np.sqrt(1 - first) * noise
    inputs = {"sample": start, "timestep": np.zeros(2, np.int64), "prompt": np.zeros((2, 5), np.float32)}
    last = ddim(step, inputs, timesteps, alphas)
    assert seen == timesteps and all(a > b for a, b in pairwise(seen))
    end = alphas[0]
    np.testing.assert_allclose(last, np.sqrt(end) * image + np.sqrt(1 - end) * noise, atol=2e-3)


def test_the_worker_answers_and_a_dead_one_is_refused(tmp_path):
    folder = tmp_path / "bundled"
    folder.mkdir()
    (folder / "model.pt2").write_bytes(b"12345")
    arrays = {"sample": np.zeros((1, 1, 32, 32), np.float32), "timestep": np.full(1, 500)}
    np.savez(folder / "inputs-b1.npz", **arrays)
    worker = WorkerProcess("eager fp32", folder, [0], 1, tmp_path / "cache")
    output = tmp_path / "output.npy"
    loaded = worker.ask("load", batch=1, output=str(output))
    assert loaded["file_bytes"] == 5 and loaded["peak_bytes"] > 1e7
    assert np.load(output).shape == (1, 1, 32, 32)
    timed = worker.ask("time", calls=2)
    assert len(timed["seconds"]) == 2 and min(timed["seconds"]) > 0
    assert worker.own_seconds() > 0
    missing = worker.ask("load", batch=3, output=str(output))
    assert "FileNotFoundError" in missing["refused"]
    worker.process.kill()
    worker.process.wait()
    assert "status -9" in worker.ask("time", calls=1)["refused"]


class Tiny(nn.Module):
    """A conv at each end, one between, three linears of the time path, and an attention over 16 places."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((1, 8), (8, 8), (8, 1)))
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))
        self.time = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))

    def forward(self, sample, timestep):
        angles = timestep[:, None].float() * self.frequencies[None]
        x = self.first(sample) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        x = self.middle(x)
        rows = x.flatten(2).transpose(1, 2)[:, None]
        attended = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        return self.last(x + attended[:, 0].transpose(1, 2).reshape(x.shape))


def test_work_is_counted_from_the_graph():
    example = {"sample": torch.zeros(2, 1, 4, 4), "timestep": torch.tensor([1, 2])}
    captured = tfmq_fx.capture(Tiny().eval(), example_kwargs=example, dynamic_batch=False)
    sums = totals(products(captured))
    assert {kind: row["operations"] for kind, row in sums.items()} == {
        "ends": 2 * 2 * 16 * 8 * 9,
        "temporal": 2 * (4 * 8 + 8 * 8 + 8 * 8),
        "conv": 2 * 16 * 8 * 8 * 9,
        "attention": 2 * (2 * 16 * 16 * 8),
    }
    assert sums["conv"]["weights"] == 8 * 8 * 9
    # Input, weight, bias, result.
    assert sums["conv"]["values"] == 2 * 8 * 16 + 8 * 8 * 9 + 8 + 2 * 8 * 16


def test_the_floor_is_bound_by_arithmetic_or_by_memory():
    ceilings = {"float32": 10.0, "bfloat16": 20.0, "int8": 40.0, "bandwidth": 8.0}
    heavy, wide = Product("conv", 400, 8, 4), Product("linear", 4, 80, 40)
    assert floor_seconds([heavy, wide], ceilings, "float32") == pytest.approx(40 + 40)
    assert floor_seconds([heavy, wide], ceilings, "int8") == pytest.approx(10 + 10)
    # No integer kernel computes attention, and the time block becomes a table.
    rest = [Product("attention", 400, 8, 0), Product("temporal", 400, 8, 8)]
    assert floor_seconds(rest, ceilings, "int8") == pytest.approx(20)
    assert floor_seconds(rest, ceilings, "bfloat16") == pytest.approx(40)


def timed_row(milliseconds, faster, arithmetic):
    quartiles = {"median": milliseconds / 1e3, "low": milliseconds / 1e3, "high": milliseconds / 1e3}
    ratio = {name: {"median": value, "low": value, "high": value} for name, value in faster.items()}
    numbers = ("others", "relative_error", "prepare_seconds")
    sizes = {"peak_bytes": 1_000_000, "file_bytes": 1_000_000}
    zeros = dict.fromkeys(numbers, 0.0)
    more = {"arithmetic": arithmetic, "starts": {"first": {"start_seconds": 60.0}}, **sizes, **zeros}
    return {"seconds": quartiles, "times_faster": ratio, **more}


def test_the_table_is_sorted_and_answers_what_is_faster():
    rows = {
        "compile fp32": timed_row(30, {"ours W8A8 inductor": 0.5}, "float32"),
        "ours W8A8 inductor": timed_row(15, {"compile fp32": 2.0}, "int8"),
        "OpenVINO fp32": {"refused": "the environment is missing"},
    }
    about = {"date": "2026-01-01", "processor": "P", "has": ["avx2"], "cores": 2, "threads": 2, "versions": {"a": "1"}}
    cells = {"cifar/1": {"unet": "cifar", "batch": 1, **about, "engines": rows}}
    roofline = {"floors": {"cifar/1": {"seconds": {"float32": 0.01, "bfloat16": 0.006, "int8": 0.003}}}}
    text = markdown(cells, "compile fp32", roofline)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| ours W8A8 inductor", "| compile fp32", "| OpenVINO fp32"]
    assert {line.count("|") for line in table} == {HEADER.count("|")}
    assert " | 5.0 | " in table[2] and " | 3.0 | " in table[3]
    assert "best of ours W8A8 (ours W8A8 inductor) is 2.00 (2.00–2.00) times as fast as compile fp32." in text
