"""A backend that breaks what backends promise is refused in one sentence, when it is registered or when it lowers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import LoweringError
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend
from tfmq_fx.lowering.backends.registry import available_backends, backend_names, register_backend, unregister_backend
from tfmq_fx.lowering.report.matching import NoKernels


class Sound(CompilerBackend):
    """The graph in eager mode."""

    name, title, summary = "sound", "Sound", "runs the graph as it is"

    def compile_graphs(self, graphs, plan):
        return CompiledGraphs(tuple(graph.graph_module for graph in graphs), NoKernels("none"))


@pytest.fixture(scope="module")
def program():
    return tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS, progress=False)


class Nameless(CompilerBackend):
    title, summary = "Nameless", "has no name"
    compile_graphs = Sound.compile_graphs


REFUSED = [
    (Nameless, r"Nameless\.name must be a string that is not empty, not None"),
    *((type("Odd", (Sound,), {"name": value}), r"Odd\.name must be a string") for value in (None, "", 3)),
    (type("Odd", (Sound,), {"title": None}), r"Odd\.title must be a string"),
    (type("Odd", (Sound,), {"summary": ""}), r"Odd\.summary must be a string"),
    *(
        (type("Odd", (Sound,), {"requires": value}), r"Odd\.requires must be a tuple of package names")
        for value in ("onnx", None, (None,), ("",))
    ),
]


@pytest.mark.parametrize(("kind", "words"), REFUSED)
def test_what_could_not_be_asked_for_is_refused_when_it_is_registered(kind, words):
    before = backend_names()
    with pytest.raises(LoweringError, match=f"register_backend: {words}") as caught:
        register_backend(kind())
    assert "\n" not in str(caught.value) and backend_names() == before


def test_a_module_in_a_package_may_be_required(program):
    for name in ("no_such_package.module", "json.no_such_module", "json.decoder.more"):
        register_backend(type("Needy", (Sound,), {"requires": (name,)})())
        try:
            assert "sound" not in available_backends()
            with pytest.raises(LoweringError, match=f"backend='sound' needs {name}"):
                tfmq_fx.lower(program, "sound")
        finally:
            unregister_backend("sound")


COMPILED = {
    "nothing": (lambda runs: None, "a NoneType instead of CompiledGraphs"),
    "runs alone": (lambda runs: runs, "a tuple instead of CompiledGraphs"),
    "too few": (lambda runs: CompiledGraphs((), NoKernels("none")), "0 runs for 1 graphs"),
    "too many": (lambda runs: CompiledGraphs((*runs, *runs), NoKernels("none")), "2 runs for 1 graphs"),
    "no tuple": (lambda runs: CompiledGraphs(runs[0], NoKernels("none")), "as runs instead of a tuple"),
    "not callable": (lambda runs: CompiledGraphs((3,), NoKernels("none")), "one callable for each"),
    "no kernels": (lambda runs: CompiledGraphs(runs, None), r"None as kernels; .* NoKernels\(reason\)"),
}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("case", COMPILED)
def test_what_was_compiled_is_checked(program, case, reuse):
    result, words = COMPILED[case]

    def compile_graphs(self, graphs, plan):
        return result(tuple(graph.graph_module for graph in graphs))

    register_backend(type("Faulty", (Sound,), {"compile_graphs": compile_graphs})())
    try:
        with pytest.raises(LoweringError, match=f"backend='sound': its compile_graphs returned .*{words}") as caught:
            tfmq_fx.lower(program, "sound", reuse=reuse, tabulate=reuse)
        assert "\n" not in str(caught.value)
    finally:
        unregister_backend("sound")


def test_a_result_of_another_type_is_refused(program):
    def compile_graphs(self, graphs, plan):
        def doubled(graph_module):
            return lambda *args: graph_module(*args).double()

        return CompiledGraphs(tuple(doubled(graph.graph_module) for graph in graphs), NoKernels("none"))

    register_backend(type("Doubled", (Sound,), {"compile_graphs": compile_graphs})())
    try:
        with pytest.raises(LoweringError, match="returns float64 where the quantized program returns float32"):
            tfmq_fx.lower(program, "sound", tabulate=False)
    finally:
        unregister_backend("sound")


def test_a_helper_beside_the_backends_is_none_and_a_broken_one_harms_no_other(tmp_path):
    checkout = Path(tfmq_fx.__file__).parents[1]
    for folder in ("tfmq_fx", "passes"):
        shutil.copytree(checkout / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "models"))
    backends = tmp_path / "tfmq_fx" / "lowering" / "backends"
    (backends / "helper.py").write_text("SIZE = 3\n")
    (backends / "shared").mkdir()
    (backends / "shared" / "__init__.py").write_text("")
    (backends / "unfinished.py").write_text("# BACKEND = later\n")
    (backends / "broken.py").write_text("import no_such_module\nBACKEND = 1\n")
    script = (
        "from tfmq_fx.lowering.backends.registry import available_backends, backend_names, find_backend\n"
        "print(*available_backends()); print(*backend_names())\n"
        "for name in ('unfinished', 'broken'):\n"
        "    try: find_backend(name)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "from tfmq_fx.cli import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", script, "backends"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    available, names, unfinished, broken, *table = shown.stdout.splitlines()
    assert "reference" in available and not {"helper", "shared", "unfinished", "broken", "checks"} & {
        *available.split()
    }
    assert not {"helper", "shared", "checks"} & {*names.split()} and {"unfinished", "broken"} <= {*names.split()}
    assert unfinished.startswith("LoweringError backend='unfinished' cannot be imported from tfmq_fx.lowering.backends")
    assert broken.startswith("LoweringError backend='broken' cannot be imported") and "no_such_module" in broken
    assert "unfinished" in "".join(table)
