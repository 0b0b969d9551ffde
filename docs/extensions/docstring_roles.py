"""Docstrings are written as Sphinx reads them: roles such as ``:func:`~package.name``` and ``::`` before a block."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([^`]+)`")
BLOCK = re.compile(r"::$", re.M)


def without_role(match: re.Match[str]) -> str:
    """The name of a role in single backticks; with ``~`` its last part alone."""
    shortened, name = match.groups()
    return f"`{name.rpartition('.')[2] if shortened else name}`"


class DocstringRoles(griffe.Extension):
    """Writes every docstring as Markdown, when its object has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring in place, before its sections are parsed."""
        if obj.docstring:
            obj.docstring.value = BLOCK.sub(":", ROLE.sub(without_role, obj.docstring.value))
