"""What a package says of itself is checked before any of its code is loaded."""

import copy
import dataclasses
import json
import zipfile

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.artefact.test_crafted import SPECS
from tests.artefact.test_mutated import VALUES, changed, parent, positions, without
from tests.artefact.watch import watched
from tfmq_fx import ArtefactError, LoweringError, load_denoiser
from tfmq_fx.frontend.interface import ConstantInput, Interface, Parameter, TensorInput
from tfmq_fx.frontend.interface_json import interface_to_json
from tfmq_fx.frontend.sizes import BatchSize
from tfmq_fx.lowering.backends.aot import package as package_file
from tfmq_fx.lowering.backends.aot.machine import Machine
from tfmq_fx.lowering.backends.aot.manifest import PackageManifest
from tfmq_fx.lowering.backends.aot.package import ABOUT, check_package_path, describe_package, staged_package
from tfmq_fx.lowering.report.report import LoweringReport, ReportEntry
from tfmq_fx.lowering.stages import Layout, Stage


def description():
    inputs = (
        TensorInput("sample", (BatchSize(), 1, 4, 4), torch.float32),
        TensorInput("timestep", (BatchSize(),), torch.int64),
        ConstantInput("x", None),
    )
    spec = pytree.tree_structure(((0, 0), {"x": None}))
    parameters = (Parameter("sample"), Parameter("timestep"), Parameter("x", required=False, plain=True))
    interface = Interface(
        ("sample", "timestep", "x"), spec, inputs, parameters, (0, None), "UNet", {"sample_size": 4}, 64, "export"
    )
    stages = (Stage(("timestep",), ("emb",), True, "timestep"), Stage(("sample", "emb"), ("out",), False))
    return {
        "interface": interface_to_json(interface),
        "timestep": "timestep",
        "result": pytree.treespec_dumps(pytree.tree_structure({"sample": 0})),
        "stages": Layout(("sample", "timestep"), stages, ("out", None)).to_dict(),
        "temporal": None,
        "report": LoweringReport("aot", (ReportEntry("conv", "conv2d", "integer", eligible=True),)).to_dict(),
        "timesteps": [0.0, 1.5],
        "finite": {"guidance": [3.5]},
        "groups": [0, 1],
        "unknown_timestep": "error",
    }


#: What is said of a temporal program.
TEMPORAL = {
    "names": ["timestep"],
    "layers": ["time.two"],
    "inputs": [{"name": "emb", "outputs": [0], "matrix": True}],
    "storage": "float32",
    "parameters": ["weight"],
    "expanded": 100,
    "digests": {"graph.json.gz": "0" * 64, "tensors.safetensors": "1" * 64},
    "sizes": {"graph.json.gz": 50, "tensors.safetensors": 200},
}


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "package.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/version", "0")
    describe_package(path, description(), {})
    return path


def rewrite(path, change):
    """Change what a package says of itself."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith(ABOUT))
    entries[name] = change if isinstance(change, bytes) else json.dumps(change(json.loads(entries[name]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


@pytest.fixture
def loaded(monkeypatch):
    """Whether its code was loaded."""
    calls = []
    monkeypatch.setattr(
        package_file, "load_models", lambda path: calls.append(path) or {"model": None, "stage0": 0, "stage1": 0}
    )
    return calls


def test_the_round_trip(package, loaded):
    found = package_file.load_package(package)
    about = found.manifest.to_json()
    assert loaded == [package] and found.temporal is None
    wanted = json.loads(json.dumps(description()))
    assert {name: about[name] for name in wanted} == wanted
    assert Machine.from_json(about["machine"]) == Machine.here()


def test_every_field(package, loaded):
    """Another type, no value, another name: a sentence, before anything runs; or it says the same."""
    values = json.loads(zipfile.ZipFile(package).read(f"package/{ABOUT}"))
    values["temporal"] = TEMPORAL
    refused = total = 0
    for path in positions(values):
        old = parent(values, path)[path[-1]]
        cases = [changed(values, path, value) for value in VALUES if (type(value), value) != (type(old), old)]
        for case in [*cases, without(values, path)]:
            total += 1
            try:
                again = PackageManifest.from_bytes(json.dumps(case).encode()).to_json()
            except ArtefactError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                # Equal as numbers, or as texts, which a NaN in the model's configuration is.
                assert again == case or json.dumps(again, sort_keys=True) == json.dumps(case, sort_keys=True), path
    assert total > 500 and refused > total * 0.6


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("where", ["result", "spec"])
def test_structures(package, loaded, kind, where):
    def change(values):
        (values if where == "result" else values["interface"])[where] = SPECS[kind]
        return values

    rewrite(package, change)
    with watched(package.parent) as seen, pytest.raises(ArtefactError, match="not a package of tfmq_fx"):
        load_denoiser(package)
    assert not [event for event in seen if event.startswith("import tfmq_canary")] and not loaded


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("system", "Plan9", "compiled for Plan9, and this is"),
        ("processor", "vax", "compiled for vax, and this is"),
        ("torch", "1.0.0", "compiled for torch 1.0.0, and this is torch"),
        ("instructions", ["avx9000", "amx_tile_9"], "a processor with avx9000, amx_tile_9, which this one lacks"),
    ],
)
def test_what_it_was_compiled_for(package, loaded, field, value, words):
    def change(values):
        values["machine"][field] = value
        return values

    rewrite(package, change)
    with pytest.raises(ArtefactError, match=words):
        load_denoiser(package)
    assert not loaded


def test_machines():
    here = Machine("Linux", "x86_64", "AVX512", ("avx2", "avx512f"), "2.13.0")
    other = dataclasses.replace
    assert here.lacks(here) is None
    assert here.lacks(other(here, instructions=("avx2",), capability="AVX2")) is None
    assert "avx512f" in other(here, instructions=("avx2",)).lacks(here)
    # Where no list of instructions is known, what torch says of the processor counts.
    unknown = other(here, instructions=())
    assert unknown.lacks(unknown) is None
    assert "AVX2" in unknown.lacks(other(unknown, capability="AVX2"))
    assert Machine.from_json(here.to_json()) == here
    for name in here.to_json():
        broken = copy.copy(here.to_json())
        del broken[name]
        with pytest.raises(ArtefactError, match=name):
            Machine.from_json(broken)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("inputs", [{"name": "features", "outputs": [0], "matrix": True}], "what the first of the 'stages' returns"),
        ("inputs", [{"name": "emb", "outputs": [1], "matrix": True}], "'outputs' is 1, outside 0 to 0"),
        ("inputs", [{"name": "emb", "outputs": [0, 0], "matrix": False}], "several that are no matrix"),
        ("names", [], "'names' of the temporal program is empty"),
        ("storage", "int4", "'storage' of the temporal program is none of float32"),
    ],
)
def test_what_is_said_of_a_temporal_program(package, loaded, field, value, words):
    rewrite(package, lambda values: {**values, "temporal": {**TEMPORAL, field: value}})
    with pytest.raises(ArtefactError, match=words):
        load_denoiser(package)
    rewrite(package, lambda values: {**values, "temporal": TEMPORAL})
    with pytest.raises(ArtefactError, match=r"0 files temporal/graph\.json\.gz instead of one"):
        load_denoiser(package)
    assert not loaded


def test_files_that_are_no_package(package, loaded, tmp_path):
    rewrite(package, b"[" * 10**6)
    with pytest.raises(ArtefactError, match="nested deeper"):
        load_denoiser(package)
    rewrite(package, b" " * (2**26 + 10))
    with pytest.raises(ArtefactError, match="more than any"):
        load_denoiser(package)
    data = package.read_bytes()
    for part in (b"", data[: len(data) // 2], b"x" * 100):
        package.write_bytes(part)
        with pytest.raises(ArtefactError, match="not a package of tfmq_fx"):
            load_denoiser(package)
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("package/version", "0")
    with pytest.raises(ArtefactError, match="0 descriptions instead of one"):
        load_denoiser(package)
    assert not loaded


def rebuilt(path, change):
    """Change the files of a package, and leave what it says of itself."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries):
            archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: [(name, b"1" if name.endswith("version") else data) for name, data in entries], "checksum of"),
        (lambda entries: [e for e in entries if not e[0].endswith("version")], "lacks the file 'package/version'"),
        (lambda entries: [*entries, ("package/more", b"")], "not written with, such as 'package/more'"),
        (lambda entries: [("package/version", b"1"), *entries], "not written with, such as 'package/version'"),
    ],
)
def test_every_file_is_held_against_its_checksum(package, loaded, change, words):
    rebuilt(package, change)
    with pytest.raises(ArtefactError, match=rf"package\.pt2 is damaged: .*{words}.*; copy it again or"):
        load_denoiser(package)
    assert not loaded


def test_any_damaged_byte_is_one_sentence_or_none_at_all(package, loaded):
    """Bytes that nothing reads may differ; whatever is read is what was written."""
    data, wanted = package.read_bytes(), package_file.load_package(package).manifest
    refused = 0
    for position in range(len(data)):
        package.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        loaded.clear()
        try:
            again = package_file.load_package(package).manifest
        except ArtefactError as error:
            refused += 1
            assert "\n" not in str(error) and not loaded
        else:
            assert again == wanted
    assert refused > len(data) * 0.7


def test_a_package_without_the_record_is_refused(package, loaded):
    def older(values):
        del values["members"]
        return {**values, "format_version": 2}

    rewrite(package, older)
    with pytest.raises(ArtefactError, match="of version 3; compile it again with this version"):
        load_denoiser(package)
    assert not loaded


def test_only_a_package_of_ours_is_written_over(package, tmp_path):
    check_package_path(package)
    check_package_path(tmp_path / "new" / "a.pt2")
    (tmp_path / "empty.pt2").touch()
    check_package_path(tmp_path / "empty.pt2")
    foreign = tmp_path / "foreign.pt2"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("foreign/version", "0")
    with pytest.raises(LoweringError, match="is not a package of tfmq_fx; choose another path or remove it first"):
        check_package_path(foreign)
    with pytest.raises(LoweringError, match="a folder is there"):
        check_package_path(tmp_path / "new")


def test_what_was_there_stays_until_the_new_package_is_complete(package, tmp_path):
    before = package.read_bytes()
    with pytest.raises(ZeroDivisionError), staged_package(package) as part:
        part.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert package.read_bytes() == before
    (tmp_path / "link.pt2").symlink_to(package)
    with staged_package(tmp_path / "link.pt2") as part:
        part.write_bytes(b"whole")
    assert package.read_bytes() == b"whole" and (tmp_path / "link.pt2").is_symlink()
    with pytest.raises(LoweringError, match="is not a package"), staged_package(tmp_path / "late.pt2") as part:
        part.write_bytes(b"whole")
        (tmp_path / "late.pt2").write_bytes(b"somebody else's")
    assert (tmp_path / "late.pt2").read_bytes() == b"somebody else's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.pt2", "link.pt2", "package.pt2"]
