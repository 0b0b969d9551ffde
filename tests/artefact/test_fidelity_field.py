"""What an artefact says of its distance from the float model: an optional field, checked like the others."""

import dataclasses
import math

import pytest

import tfmq_fx
from tests.artefact.artefacts import change_manifest, inputs, read_manifest
from tests.artefact.watch import load_guarded
from tfmq_fx import ArtefactError, Fidelity
from tfmq_fx.quantization.fidelity import TimestepFidelity

ENTRY = {"timestep": 750.0, "signal": 2.0, "difference": 0.5, "peak": 1.0, "numbers": 16}


def test_it_is_what_was_measured(program, artefact):
    assert program.fidelity is not None
    assert tfmq_fx.load(artefact).fidelity == program.fidelity


def test_an_artefact_from_before_has_none(artefact, wanted):
    change_manifest(artefact, lambda manifest: manifest.pop("fidelity"))
    loaded = load_guarded(artefact)
    assert loaded.fidelity is None and loaded(*inputs()).equal(wanted)


def test_a_program_that_was_not_measured_writes_none(program, tmp_path):
    unmeasured = dataclasses.replace(program, fidelity=None)
    assert "fidelity" not in read_manifest(tfmq_fx.save(unmeasured, tmp_path / "q"))


def test_infinite_errors_and_no_timestep_are_kept(program, tmp_path):
    fidelity = Fidelity((TimestepFidelity(None, 0.0, math.inf, 0.0, 3),))
    path = tfmq_fx.save(dataclasses.replace(program, fidelity=fidelity), tmp_path / "q")
    assert "Infinity" not in (path / "manifest.json").read_text()
    assert tfmq_fx.load(path).fidelity == fidelity


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timestep", "750"),
        ("timestep", math.nan),
        ("timestep", True),
        ("signal", -1.0),
        ("signal", None),
        ("signal", math.inf),
        ("difference", math.nan),
        ("difference", 1e300),
        ("peak", []),
        ("numbers", 0),
        ("numbers", 1.5),
        ("numbers", 2**70),
        ("extra", 1),
    ],
)
def test_fields_that_are_wrong_are_named(artefact, field, value):
    change_manifest(artefact, lambda manifest: manifest.update(fidelity={"timesteps": [{**ENTRY, field: value}]}))
    error = load_guarded(artefact)
    assert isinstance(error, ArtefactError) and "'fidelity'" in str(error) and field in str(error)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"timesteps": {}},
        {"timesteps": []},
        {"timesteps": [ENTRY, ENTRY]},
        {"timesteps": [{}]},
        {"timesteps": [ENTRY], "error": 0.0},
        {"timesteps": [{**ENTRY, "timestep": float(n)} for n in range(1001)]},
    ],
    ids=range(9),
)
def test_what_is_no_fidelity_is_refused(artefact, value):
    change_manifest(artefact, lambda manifest: manifest.update(fidelity=value))
    error = load_guarded(artefact)
    assert isinstance(error, ArtefactError) and "fidelity" in str(error)
