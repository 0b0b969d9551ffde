"""Sizes and places of files."""

import ast

import pytest

from tests.house.sources import ROOT, sources

TOP = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
MOST_LINES, MOST_FUNCTION_LINES = 250, 80


def test_nothing_else_stands_at_the_top_of_the_package():
    assert {path.name for path in (ROOT / "tfmq_fx").iterdir() if path.is_file()} <= TOP


@pytest.mark.parametrize("name", [n for n, s in sources().items() if s.room in ("quantization", "lowering")])
def test_a_stage_fits_the_eye(name):
    """The quantizer, the stages and ``lower`` stay within a file of 250 lines and functions of 80."""
    source = sources()[name]
    lines = len(source.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
    }
    assert not long
