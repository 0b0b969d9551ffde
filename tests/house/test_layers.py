"""Rooms import lower rooms only, and no modules import one another in a circle."""

import ast
import re

import pytest

from tests.house.sources import ROOT, Source, imported, is_type_checking, sources


def layers() -> list[str]:
    """The rooms from low to high, as CONTRIBUTING.md lists them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## Layers\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def imports(node: ast.AST, source: Source, *, top: bool) -> list[tuple[int, str]]:
    """Line and module of what a module imports, what only a type checker imports left out.

    Args:
        node: Where to look.
        source: The module.
        top: Leave out what functions import when they run.
    """
    found = []
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) or (top and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            # What stands beside ``if TYPE_CHECKING`` runs.
            for other in child.orelse if isinstance(child, ast.If) else ():
                found += imports(ast.Module([other], []), source, top=top)
            continue
        found += [(child.lineno, name) for name in imported(child, source)] if isinstance(child, ast.stmt) else []
        found += imports(child, source, top=top)
    return found


def upward(source: Source, order: list[str]) -> list[str]:
    """The imports of a module from a higher room, those in its functions included."""
    found = []
    for line, name in imports(source.tree, source, top=False):
        room = sources()[name].room
        if room and order.index(room) > order.index(source.room):
            found.append(f"{source.path.relative_to(ROOT)}:{line}: {source.room} imports {name}")
    return found


def test_every_room_is_a_layer():
    order = layers()
    assert len(order) == len(set(order))
    assert set(order) == {source.room for source in sources().values()} - {""}


def test_a_room_imports_lower_rooms_only():
    order = layers()
    found = [line for source in sources().values() if source.room for line in upward(source, order)]
    assert not found, "imports from a higher room:\n" + "\n".join(found)


def test_rooms_take_nothing_but_the_version_from_the_package_itself():
    """The command line is outside: it uses the package as a user does."""
    found = []
    for source in sources().values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and node.module == "tfmq_fx" and source.room not in ("", "cli"):
                public = [alias.name for alias in node.names if f"tfmq_fx.{alias.name}" not in sources()]
                found += [f"{source.name}: {name}" for name in public if name != "__version__"]
    assert not found


def circles() -> list[list[str]]:
    """The groups of modules that import one another (strongly connected components), by Tarjan's algorithm."""
    graph = {name: {m for _, m in imports(source.tree, source, top=True)} for name, source in sources().items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            found.append(stack[at:])
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return [sorted(group) for group in found if len(group) > 1]


def test_no_modules_import_one_another_in_a_circle():
    assert not circles()


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("from tfmq_fx.cli.app import main", ["tfmq_fx.cli.app"]),
        ("from tfmq_fx.cli import app", ["tfmq_fx.cli.app"]),
        ("import tfmq_fx.errors", ["tfmq_fx.errors"]),
        ("from ..errors import TfmqError", ["tfmq_fx.errors"]),
        ("from . import base", ["tfmq_fx.passes.base"]),
        ("def f():\n    from tfmq_fx import errors", ["tfmq_fx.errors"]),
        (
            "if TYPE_CHECKING:\n    from tfmq_fx import errors\nelse:\n    from tfmq_fx import passes",
            ["tfmq_fx.passes"],
        ),
        ("from torch import nn", []),
    ],
)
def test_every_form_of_an_import_is_read(code, seen):
    base = sources()["tfmq_fx.passes.base"]
    source = Source(base.name, base.path, ast.parse(code))
    assert [name for _, name in imports(source.tree, source, top=False)] == seen


def test_an_import_from_a_higher_room_is_found():
    base = sources()["tfmq_fx.passes.base"]
    source = Source(base.name, base.path, ast.parse("def f():\n    from tfmq_fx.cli.app import main"))
    assert upward(source, layers()) == ["passes/base.py:2: passes imports tfmq_fx.cli.app"]
