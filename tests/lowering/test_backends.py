"""Backends are values: a toy one is found, lowered to, reported, compared, and named, wherever it comes from."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, PromptDenoiser, batch, relative, small_denoiser
from tfmq_fx import ArtefactError, LoweringError, QuantizationConfig
from tfmq_fx.lowering.backends import auto
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend
from tfmq_fx.lowering.backends.registry import (
    available_backends,
    backend_names,
    find_backend,
    register_backend,
    unregister_backend,
)
from tfmq_fx.lowering.options import BackendSupport, LoweringOptions
from tfmq_fx.lowering.plan import make_plan
from tfmq_fx.lowering.report.matching import KernelsByNode
from tfmq_fx.lowering.run.denoiser import Denoiser

#: What another package has to write, all of it.
TOY = """
    from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend
    from tfmq_fx.lowering.report.matching import NoKernels


    class ToyBackend(CompilerBackend):
        name, title, summary = "toy", "Toy", "runs the graph as it is"

        def compile_graphs(self, graphs, plan):
            return CompiledGraphs(tuple(graph.graph_module for graph in graphs), NoKernels("toys have none"))


    BACKEND = ToyBackend()
"""


class ToyBackend(CompilerBackend):
    """The graph in eager mode; its integer kernels are those of the first node."""

    name, title, summary = "toy", "Toy", "runs the graph as it is"
    factor = 1.0

    def compile_graphs(self, graphs, plan):
        self.plan, self.names = plan, [graph.name for graph in graphs]
        runs = tuple(self.scaled(graph.graph_module) for graph in graphs)
        eligible = [node for entry, node in zip(plan.entries, plan.nodes, strict=True) if entry.eligible]
        return CompiledGraphs(runs, KernelsByNode(frozenset(eligible[:1])))

    def scaled(self, graph_module):
        return graph_module if self.factor == 1.0 else lambda *args: graph_module(*args) * self.factor


@pytest.fixture
def toy():
    backend = ToyBackend()
    register_backend(backend)
    yield backend
    unregister_backend("toy")


@pytest.fixture(scope="module")
def program():
    config = QuantizationConfig(activation_groups=1, shortcut_bits=None)
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)


# --- the registry ---------------------------------------------------------------------------------------------------


def test_the_modules_beside_the_registry_are_the_backends():
    assert {"aot", "auto", "inductor", "onnxruntime", "openvino", "reference"} <= set(backend_names())
    for name in backend_names():
        backend = find_backend(name)
        assert backend.name == name and backend.title and backend.summary
        assert find_backend(name) is backend


def test_listing_names_imports_no_backend():
    code = (
        "import sys, types; package = types.ModuleType('tfmq_fx'); "
        f"package.__path__ = {list(tfmq_fx.__path__)!r}; sys.modules['tfmq_fx'] = package; "
        "from tfmq_fx.lowering.backends.registry import backend_names; "
        "assert 'inductor' in backend_names() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_is_taken_once(toy):
    with pytest.raises(LoweringError, match="there is a backend 'toy' already"):
        register_backend(ToyBackend())
    other = ToyBackend()
    register_backend(other, override=True)
    assert find_backend("toy") is other
    with pytest.raises(LoweringError, match="register_backend is the class ToyBackend instead of a Backend object"):
        register_backend(ToyBackend)
    with pytest.raises(LoweringError, match="no backend 'inductor' was registered"):
        unregister_backend("inductor")


# --- one that was registered by a call --------------------------------------------------------------------------------


def test_a_toy_lowers_reports_and_is_compared(toy, program):
    denoiser = tfmq_fx.lower(program, backend="toy")
    report = denoiser.report
    assert report.backend == "toy" and report.integer_kernels == 1 and report.eligible == 7
    assert 0.0 <= report.parity_error < 1e-3 and report.parity_floor >= 0.0 and report.temporal_layers == 0
    x, t = batch(3)
    assert relative(denoiser(x, t), program(x, t)) < 1e-3
    assert toy.names == ["stage_1"]  # stage_0 is the temporal program, which runs by itself
    toy.factor = 1.5
    with pytest.raises(LoweringError, match="parts from its reference"):
        tfmq_fx.lower(program, backend="toy")


def test_a_toy_is_named_where_backends_are_listed(toy, program):
    assert "toy" in backend_names() and "toy" in available_backends()
    with pytest.raises(LoweringError, match="'reference', 'toy'"):
        tfmq_fx.lower(program, backend="tuy")
    with pytest.raises(LoweringError, match="backend='toy': it takes none"):
        tfmq_fx.lower(program, backend="toy", precision="bf16")


def test_a_toy_is_tried_by_auto(toy, program, monkeypatch):
    assert ("toy", None) in auto.candidates()
    toys = [candidate for candidate in auto.candidates() if candidate[0] == "toy"]
    monkeypatch.setattr(auto, "candidates", lambda: toys)
    monkeypatch.setattr(auto, "SECONDS", 0.0)
    assert tfmq_fx.lower(program, "auto").report.measured[0].backend == "toy"


def test_what_a_toy_requires_is_asked_for(toy, program, monkeypatch):
    monkeypatch.setattr(ToyBackend, "requires", ("no_such_package",))
    assert "toy" not in available_backends()
    with pytest.raises(LoweringError, match="backend='toy' needs no_such_package: pip install no_such_package"):
        tfmq_fx.lower(program, "toy")


def test_the_plan_fits_what_a_backend_supports(toy, monkeypatch):
    config = QuantizationConfig(activation_groups=2)
    grouped = tfmq_fx.quantize(small_denoiser(), config, [batch(16)], timesteps=TIMESTEPS, progress=False)
    x, t = batch(4)
    one_group = tfmq_fx.lower(grouped, "toy")
    assert toy.plan.groups is not None and sorted(set(toy.plan.groups.tolist())) == [0, 1]
    monkeypatch.setattr(ToyBackend, "support", BackendSupport(mixed_groups=True))
    mixed = tfmq_fx.lower(grouped, "toy")
    assert toy.plan.groups is None
    assert relative(one_group(x, t), mixed(x, t)) < 1e-3


def prompted():
    torch.manual_seed(0)
    tokens, pooled = torch.randn(9, 5, 12), torch.randn(9, 6)
    sample, timesteps = batch(9)
    example = (sample, timesteps, tokens, pooled)
    config = QuantizationConfig(activation_groups=1)
    return tfmq_fx.quantize(PromptDenoiser().eval(), config, [example], timesteps=TIMESTEPS, progress=False), example


def test_stages_are_compiled_where_they_are_supported(toy, monkeypatch):
    conditional, example = prompted()
    whole = tfmq_fx.lower(conditional, "toy")
    assert toy.names == ["stage_1"] and len(toy.plan.staged.graph_modules) == 2  # the temporal program, and the rest
    monkeypatch.setattr(ToyBackend, "support", BackendSupport(stages=True))
    staged = tfmq_fx.lower(conditional, "toy")
    assert toy.names == ["stage_1", "stage_2", "stage_3"]
    tfmq_fx.lower(conditional, "toy", reuse=False)
    assert toy.names == ["stage_1"]
    assert relative(staged(*example), whole(*example)) < 1e-3


def test_a_stage_that_runs_by_itself_is_not_compiled(toy, monkeypatch):
    """So may a program of timesteps stand in front of any backend's."""
    conditional, example = prompted()
    monkeypatch.setattr(ToyBackend, "support", BackendSupport(stages=True))
    plan = make_plan(conditional, toy.check(LoweringOptions()), toy.support, toy.rewrite)
    calls = []

    def run(*inputs):
        calls.append(inputs)
        return plan.staged.graph_modules[0](*inputs)

    own = dataclasses.replace(plan, staged=dataclasses.replace(plan.staged, runs={0: run}))
    compiled, _ = toy.compile(own)
    assert (
        toy.names == ["stage_1", "stage_2", "stage_3"] and len(calls) == 1
    )  # once, for what the next stages are compiled with
    expected = conditional(*example)
    for count in (2, 3):
        assert relative(compiled(*example), expected) < 1e-3
        assert len(calls) == count  # what it keeps is its own business


# --- one that another package brings, and one in a file of its own beside ours ----------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``install(name, source)``: a package with a backend, as pip leaves one."""

    def install(name, source, value="BACKEND"):
        (tmp_path / f"{name}_package.py").write_text(textwrap.dedent(source))
        folder = tmp_path / f"{name}_package-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_package\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[tfmq_fx.backends]\n{name} = {name}_package:{value}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for name in [name for name in sys.modules if name.endswith("_package")]:
        del sys.modules[name]


def test_an_installed_package_brings_a_backend(installed, program):
    installed("toy", TOY)
    denoiser = tfmq_fx.lower(program, backend="toy")
    assert denoiser.report.backend == "toy" and denoiser.report.parity_error < 1e-3
    assert {entry.reason for entry in denoiser.report.entries if entry.eligible} == {"toys have none"}
    assert "toy" in available_backends()
    with pytest.raises(LoweringError, match="'reference', 'toy'"):
        tfmq_fx.lower(program, backend="tuy")


def test_the_command_line_takes_an_installed_backend(installed, tmp_path):
    """In a process of its own, as a user has it."""
    installed("toy", TOY)

    def command(*arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "COLUMNS": "200"}
        script = "from tfmq_fx.cli import main; main()"
        call = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(call, capture_output=True, text=True, env=environment)

    listed = command("backends")
    assert "runs the graph as it is" in listed.stdout, listed.stderr
    assert "|toy>" in command("sample", "--help").stdout
    refused = command("sample", "--artefact", tmp_path, "--backend", "tuy")
    assert refused.returncode == 2 and "'toy'" in refused.stderr


@pytest.mark.parametrize(
    ("source", "value", "words"),
    [
        ("import no_such_module", "BACKEND", "backend='toy' of another package cannot be imported from toy_package"),
        ("BACKEND = 1", "BACKEND", "toy_package:BACKEND is a int instead of a Backend object"),
        (TOY, "ToyBackend", "toy_package:ToyBackend is the class ToyBackend instead of a Backend object"),
        (TOY.replace('"toy", "Toy"', '"other", "Toy"'), "BACKEND", "declared as 'toy', but its name is 'other'"),
    ],
)
def test_a_broken_package_breaks_nothing_else(installed, program, source, value, words):
    installed("toy", source, value)
    with pytest.raises(LoweringError, match=words) as caught:
        tfmq_fx.lower(program, "toy")
    assert "\n" not in str(caught.value)
    assert "toy" not in available_backends() and "inductor" in available_backends()


def test_two_packages_with_one_name_are_refused(installed, program):
    installed("reference", TOY)
    with pytest.raises(
        LoweringError, match=r"several packages have a backend 'reference' \(tfmq_fx, reference_package"
    ):
        tfmq_fx.lower(program, "reference")


def test_one_new_file_beside_ours_is_a_backend(program, tmp_path):
    """A copy of the package with one file more: no list anywhere knows of it."""
    checkout = Path(tfmq_fx.__file__).parents[1]
    for folder in ("tfmq_fx", "passes"):
        shutil.copytree(checkout / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "models"))
    (tmp_path / "tfmq_fx" / "lowering" / "backends" / "toy.py").write_text(textwrap.dedent(TOY))
    tfmq_fx.save(program, tmp_path / "program")
    script = (
        "import sys, torch, tfmq_fx; from pathlib import Path; assert Path.cwd() in Path(tfmq_fx.__file__).parents; "
        "denoiser = tfmq_fx.lower(tfmq_fx.load('program'), 'toy'); assert denoiser.report.parity_error < 1e-3; "
        "denoiser(torch.zeros(1, 1, 8, 8), 100); print(denoiser.report.backend); "
        "from tfmq_fx.cli.registered_names import backends; print(*backends())"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("toy\n") and "reference toy" in shown.stdout


# --- arguments ------------------------------------------------------------------------------------------------------


class PackagingToy(ToyBackend):
    """One that writes files of its own and loads them."""

    name, package_suffix = "packaging", ".toy"

    def finish(self, plan, report):
        self.report, self.program = report, plan.program
        plan.options.path.write_text(json.dumps({"toy": report.to_dict()}))

    def recognizes(self, path):
        return path.is_file() and path.read_bytes().startswith(b'{"toy"')

    def load(self, path, unknown_timestep):
        return Denoiser(
            self.program.graph_module, self.program.interface, timestep=self.program.timestep,
            timesteps=self.program.timesteps, unknown=unknown_timestep or "error", report=self.report,
        )  # fmt: skip


def test_a_backend_loads_what_it_wrote(program, tmp_path):
    path = tmp_path / "program.toy"
    register_backend(PackagingToy())
    try:
        with pytest.raises(LoweringError, match=r"backend='packaging' needs path=, the \.toy package to write"):
            tfmq_fx.lower(program, "packaging")
        with pytest.raises(LoweringError, match=r"backend='packaging' needs path=.*a\.zip' does not end in \.toy"):
            tfmq_fx.lower(program, "packaging", path=tmp_path / "a.zip")
        made = tfmq_fx.lower(program, "packaging", path=path)
        loaded = tfmq_fx.load_denoiser(path)
        x, t = batch(2)
        assert loaded.report == made.report and relative(loaded(x, t), made(x, t)) < 1e-3
        assert "packaging" not in [name for name, _ in auto.candidates()]
    finally:
        unregister_backend("packaging")
    with pytest.raises(ArtefactError, match="not a package of tfmq_fx"):
        tfmq_fx.load_denoiser(path)


@pytest.mark.parametrize("backend", ["inductor", "reference", "auto", "openvino"])
def test_a_path_is_refused_where_no_file_is_written(backend, program, tmp_path):
    with pytest.raises(LoweringError, match=f"backend='{backend}' writes no package: leave path='") as caught:
        tfmq_fx.lower(program, backend, path=tmp_path / "a.pt2")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tabulate", "reuse"])
@pytest.mark.parametrize("value", [0, 1, None, "no", torch.tensor(True)])
def test_switches_are_bools(name, value, program):
    with pytest.raises(LoweringError, match=f"{name}=.* must be True or False"):
        tfmq_fx.lower(program, "reference", **{name: value})
