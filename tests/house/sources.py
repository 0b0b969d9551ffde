"""The package's modules, parsed: what the tests of the house read."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Where the modules lie in a checkout, by the name they are imported under.
FOLDERS = {"tfmq_fx": ROOT / "tfmq_fx", "tfmq_fx.passes": ROOT / "passes"}


@dataclass(frozen=True)
class Source:
    """One module."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        """The room it lies in: ``passes`` for ``tfmq_fx.passes.base``; empty for the package's own two files."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


@cache
def sources() -> dict[str, Source]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = Source(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(statement: ast.AST, source: Source) -> list[str]:
    """The modules of this package that a statement imports."""
    known = sources()
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names if alias.name in known]
    if not isinstance(statement, ast.ImportFrom):
        return []
    module = statement.module or ""
    if statement.level:  # relative: counted from the package that holds the module
        parts = source.name.split(".")
        package = parts if source.is_package else parts[:-1]
        module = ".".join((*package[: len(package) - statement.level + 1], *([module] if module else [])))
    names = [f"{module}.{alias.name}" for alias in statement.names]
    # ``from package import module`` imports that module, ``from package import name`` the package.
    return [name if name in known else module for name in names if name in known or module in known]
