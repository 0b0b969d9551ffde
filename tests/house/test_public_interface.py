"""The public interface is whole: all that is announced is there, documented, and what documents name is announced."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types

import pytest

import tfmq_fx
from tests.house.sources import ROOT, is_type_checking, sources

PUBLIC = (
    "tfmq_fx", "tfmq_fx.diagnostics", "tfmq_fx.diffusers", "tfmq_fx.lowering.backends", "tfmq_fx.passes",
    "tfmq_fx.passes.analysis", "tfmq_fx.schedulers", "tfmq_fx.testing",
)  # fmt: skip
ROLE = re.compile(r":(?:func|class|data|mod|meth|attr):`~?(tfmq_fx\.[\w.]+)`")
MENTION = re.compile(r"(?<![\w/.])tfmq_fx((?:\.[A-Za-z]\w*)+)")
#: Files and keys that begin like the package.
#: A group of entry points is called like a module, and is none.
ENTRY_POINTS = "tfmq_fx.backends"
NO_NAMES = ("json", "toml", "git")


def public_names():
    return [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]


def resolve(path):
    """The object called ``path``; raises where there is none."""
    module, *rest = path.split(".")
    found = importlib.import_module(module)
    for index, part in enumerate(rest):
        if not hasattr(found, part) and isinstance(found, types.ModuleType):
            importlib.import_module(".".join((module, *rest[: index + 1])))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("module", "name"), public_names())
def test_every_public_name_is_there_and_says_what_it_is(module, name):
    value = resolve(f"{module}.{name}")
    assert name in dir(importlib.import_module(module))
    if isinstance(value, type | types.FunctionType | types.ModuleType):
        text = inspect.getdoc(value) or ""
        assert len(text.split()) >= 3, f"{module}.{name} has no docstring"
        # A dataclass without one of its own gets its signature from the standard library.
        assert not text.startswith(f"{name}("), f"{module}.{name} has no docstring"


def test_the_public_names_are_written_alike_in_all_their_places():
    """For type checkers, for readers, and for the import on first use."""
    tree = sources()["tfmq_fx"].tree
    lazy = {}
    for node in ast.walk(tree):
        if is_type_checking(node):
            for statement in node.body:
                lazy |= {alias.name: statement.module for alias in statement.names}
    rooms = {name for name, module in lazy.items() if module == "tfmq_fx"}
    assert rooms == set(tfmq_fx._ROOMS)
    assert {name: module for name, module in lazy.items() if name not in rooms} == tfmq_fx._MODULE_OF
    assert set(tfmq_fx.__all__) == {*lazy, *importlib.import_module("tfmq_fx.errors").__all__}


def test_the_backends_names_are_written_alike_in_all_their_places():
    lazy = {}
    for node in ast.walk(sources()["tfmq_fx.lowering.backends"].tree):
        if is_type_checking(node):
            for statement in node.body:
                lazy |= {alias.name: statement.module for alias in statement.names}
    backends = importlib.import_module("tfmq_fx.lowering.backends")
    assert lazy == backends._MODULE_OF and sorted(lazy) == sorted(backends.__all__)


def test_every_module_of_the_reference_is_an_attribute_after_one_import():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    modules = {name for page in pages for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.M)}
    assert {"tfmq_fx.config.quantization", "tfmq_fx.data", "tfmq_fx.errors"} <= modules
    lines = [f"assert {name}.__name__ == {name!r}" for name in sorted(modules)]
    script = "\n".join(["import tfmq_fx, sys", "assert 'torch' not in sys.modules", *lines])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_package_lists_its_public_names_alone():
    assert {name for name in dir(tfmq_fx) if not name.startswith("__")} == set(tfmq_fx.__all__)
    assert {"__version__", "__doc__"} <= set(dir(tfmq_fx))


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'tfmq_fx' has no attribute 'quantise'"):
        _ = tfmq_fx.quantise


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_every_name_in_the_documents_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = {f"tfmq_fx{path}" for path in MENTION.findall(text) if path.rpartition(".")[2] not in NO_NAMES}
    missing = [path for path in sorted(paths - {ENTRY_POINTS}) if not exists(path)]
    assert not missing


def test_every_name_in_the_docstrings_is_there():
    paths = {}
    for source in sources().values():
        for path in ROLE.findall(source.path.read_text(encoding="utf-8")):
            paths.setdefault(path, source.name)
    assert paths
    missing = [f"{source}: {path}" for path, source in sorted(paths.items()) if not exists(path)]
    assert not missing


def exists(path):
    try:
        resolve(path)
    except (AttributeError, ImportError):
        return False
    return True


def test_names_at_the_top_are_public():
    """``tfmq_fx.something`` in a docstring is a name that a user can write."""
    named = set()
    for source in sources().values():
        named |= {path.split(".")[1] for path in ROLE.findall(source.path.read_text(encoding="utf-8"))}
    rooms = {source.room for source in sources().values()}
    assert not named - set(tfmq_fx.__all__) - rooms


def test_calibration_batches_are_a_required_argument():
    """Without them the call always fails."""
    assert inspect.signature(tfmq_fx.quantize).parameters["batches"].default is inspect.Parameter.empty


def test_the_version_stands_in_one_place():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'attr = "tfmq_fx.__version__"' in settings
    assert not re.search(r'^version = "', settings, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", tfmq_fx.__version__)
