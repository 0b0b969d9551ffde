"""Reconstruction is reproducible and resumable to the bit, in bounded memory, and no disk is left half-written."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS
from tests.reconstruction_cases import (
    BATCHES,
    KINDS,
    SCALAR_BATCHES,
    SHORT,
    calibrated,
    interrupt_after,
    rec,
    reconstructed,
    same,
    sentence,
    state,
)
from tfmq_fx.errors import ReconstructionError


@pytest.mark.parametrize("options", KINDS)
def test_one_seed_gives_the_same_bits_and_another_does_not(options):
    graph = calibrated(observers=True)
    torch.manual_seed(123)  # nothing outside may matter
    rec(graph, **options)
    torch.manual_seed(321)
    assert same(state(graph), reconstructed(**options))
    rec(graph, **options, seed=1)
    assert not same(state(graph), reconstructed(**options))


@pytest.mark.parametrize("options", KINDS)
def test_running_again_on_the_same_graph_starts_over(options):
    graph = calibrated()
    for _ in range(2):
        rec(graph, **options)
    assert same(state(graph), reconstructed(**options))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("options", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, options, fresh):
    expected = reconstructed(**options)
    graph = calibrated()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 2 * SHORT["iterations"] + 5)
        with pytest.raises(KeyboardInterrupt):
            rec(graph, directory=tmp_path / "state", **options)
    if fresh:
        graph = calibrated()
    report = rec(graph, directory=tmp_path / "state", **options)
    assert report.resumed == 2
    assert same(state(graph), expected)


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    report = rec(calibrated(), directory=tmp_path)
    expected = reconstructed()  # trained on its first use, which must not be below
    monkeypatch.setattr("tfmq_fx.reconstruction.unit.train", None)
    monkeypatch.setattr("tfmq_fx.reconstruction.domain_training.train", None)
    graph = calibrated()
    again = rec(graph, directory=tmp_path)
    assert same(state(graph), expected)
    assert report.resumed == 0 and again.resumed == 4 and again.units == report.units
    assert again.seconds >= sum(unit.seconds for unit in report.units)


CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from tests.reconstruction_cases import (
    BATCHES,
    KINDS,
    SCALAR_BATCHES,
    SHORT,
    calibrated,
    interrupt_after,
    rec,
    reconstructed,
    same,
    sentence,
    state,
)
from tests.reconstruction.test_reconstruct import rec
rec(calibrated(observers=True), directory=sys.argv[1], iterations=60)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    folder = tmp_path / "state"
    command = [sys.executable, "-c", CHILD, str(folder), str(torch.get_num_threads())]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while len(list(folder.glob("unit-*.safetensors"))) < 2:
            assert child.poll() is None, child.stderr.read().decode()
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    finished = len(list(folder.glob("unit-*.safetensors")))
    assert 2 <= finished < 4
    graph = calibrated()
    assert rec(graph, directory=folder, iterations=60).resumed == finished
    assert same(state(graph), reconstructed(iterations=60))


def test_a_run_that_was_killed_while_it_wrote_its_plan_can_start(tmp_path):
    (tmp_path / ".plan.json.abc123").write_text('{"finger')
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 0
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 1


@pytest.mark.parametrize(
    ("other", "batches", "parts"),
    [
        ({"seed": 1}, BATCHES, "configuration, calibration data"),
        ({"iterations": 13}, BATCHES, "configuration"),
        ({}, BATCHES[:1], "calibration data"),
    ],
)
def test_the_directory_of_another_run_is_refused(tmp_path, other, batches, parts):
    rec(calibrated(), directory=tmp_path / "state")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with pytest.raises(ReconstructionError, match=f"another reconstruction, which differs in its {parts};") as caught:
        rec(calibrated(), batches, directory=tmp_path / "state", **other)
    assert str(tmp_path / "state") in sentence(caught)
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == kept


def test_the_directory_of_other_code_is_refused(tmp_path, monkeypatch):
    """The version number is not raised with every change; what is written in the files is."""
    rec(calibrated(), granularity="none", directory=tmp_path / "state")
    monkeypatch.setattr(sys.modules["tfmq_fx.reconstruction.fingerprints"], "code_digest", lambda: "other")
    with pytest.raises(ReconstructionError, match="another reconstruction, which differs in its code;"):
        rec(calibrated(), granularity="none", directory=tmp_path / "state")


def test_the_directory_of_other_weights_or_another_width_is_refused(tmp_path):
    rec(calibrated(), granularity="none", directory=tmp_path)
    others = {
        r"weights or ranges;": {"model_seed": 1},
        r"configuration, weights or ranges;": {"weight_bits": 3},
        r"configuration, .*weights or ranges;": {"temporal": "shared"},
    }
    for parts, options in others.items():
        other = calibrated(**options)
        with pytest.raises(ReconstructionError, match=f"another reconstruction, which differs in its {parts}"):
            rec(other, granularity="none", directory=tmp_path)


def test_timesteps_of_whole_batches_are_part_of_the_run(tmp_path):
    rec(calibrated(scalar=True), SCALAR_BATCHES, directory=tmp_path)
    swapped = [(sample, TIMESTEPS[-1] - t) for sample, t in SCALAR_BATCHES]
    with pytest.raises(ReconstructionError, match="which differs in its calibration data;"):
        rec(calibrated(scalar=True), swapped, directory=tmp_path)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ReconstructionError, match="something else") as caught:
            rec(calibrated(), directory=path)
        sentence(caught)
    with pytest.raises(ReconstructionError, match="cannot be made") as caught:
        rec(calibrated(), directory=tmp_path / "thesis.txt" / "state")
    sentence(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_unit_file_is_named(tmp_path, damage):
    rec(calibrated(), granularity="none", directory=tmp_path)
    (unit,) = tmp_path.glob("unit-*.safetensors")
    unit.write_bytes(damage(unit.read_bytes()))
    with pytest.raises(ReconstructionError, match="remove that file to train the unit again") as caught:
        rec(calibrated(), granularity="none", directory=tmp_path)
    assert str(unit) in sentence(caught)
    unit.unlink()
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 0


@pytest.mark.parametrize("result", [None, "nonsense", '{"name": "x", "kind": "y", "colour": 3}'])
def test_a_unit_file_of_something_else_is_named(tmp_path, result):
    from safetensors.torch import save_file

    rec(calibrated(), granularity="none", directory=tmp_path)
    (unit,) = tmp_path.glob("unit-*.safetensors")
    save_file({"x": torch.zeros(1)}, unit, None if result is None else {"result": result})
    with pytest.raises(ReconstructionError, match="remove that file") as caught:
        rec(calibrated(), granularity="none", directory=tmp_path)
    sentence(caught)


def test_a_damaged_plan_is_refused(tmp_path):
    rec(calibrated(), granularity="none", directory=tmp_path)
    for content in ("", "[]", '{"fingerprints": 3}', '{"fingerprints": {}}'):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(ReconstructionError, match=r"plan\.json cannot be read; remove .* to start over"):
            rec(calibrated(), granularity="none", directory=tmp_path)


# --- memory and disk --------------------------------------------------------------------------------


def test_without_memory_activations_lie_in_files_that_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    roomy, tight, in_directory = calibrated(), calibrated(), calibrated()
    report = rec(roomy)
    assert report.spilled_bytes == 0 < report.peak_cache_bytes
    spilled = rec(tight, cache_bytes=0)
    assert spilled.spilled_bytes == spilled.peak_cache_bytes == report.peak_cache_bytes
    assert not list((tmp_path / "temporary").iterdir())
    rec(in_directory, cache_bytes=0, directory=tmp_path / "state")
    assert all(path.name == "plan.json" or path.name.startswith("unit-") for path in (tmp_path / "state").iterdir())
    assert same(state(tight), state(roomy)) and same(state(in_directory), state(roomy))


def test_some_memory_is_used_before_files():
    full = rec(calibrated()).peak_cache_bytes
    report = rec(calibrated(), cache_bytes=full // 2)
    assert 0 < report.spilled_bytes <= report.peak_cache_bytes - full // 4


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_for_activations_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tfmq_fx.reconstruction.store.reserve", no_room)
    graph = calibrated()
    with pytest.raises(ReconstructionError, match="raise cache_bytes") as caught:
        rec(graph, cache_bytes=0, directory=tmp_path)
    assert "No space left" in sentence(caught) and str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("activations-*"))
    tfmq_fx.convert(graph)


def test_a_full_disk_for_the_state_is_one_sentence_and_leaves_no_parts(tmp_path, monkeypatch):
    rec(calibrated(), granularity="none", directory=tmp_path)
    next(tmp_path.glob("unit-*")).unlink()
    monkeypatch.setattr("os.fsync", no_room)
    graph = calibrated()
    with pytest.raises(ReconstructionError, match="could not be written") as caught:
        rec(graph, granularity="none", directory=tmp_path)
    assert "No space left" in sentence(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    tfmq_fx.convert(graph)
