"""The rules that CONTRIBUTING has for passes."""

import re
from pathlib import Path

import pytest

import tfmq_fx.passes
from tests.passes import helpers
from tfmq_fx.passes import PIPELINES, Numerics, pass_registry

PASSES = {pass_id: kind for pass_id, kind in pass_registry().items() if pass_id.startswith("tfmq::")}
ROOMS = Path(tfmq_fx.passes.__file__).parent
TESTS = Path(helpers.__file__).parent
PROPERTIES = "\n".join(path.read_text() for path in (TESTS.parent / "properties").glob("test_*.py"))
IN_PIPELINES = {pass_id for pipeline in PIPELINES.values() for pass_id in pipeline.ids}


def room_and_file(kind):
    return kind.__module__.split(".")[-2:]


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_a_pass_has_its_file_its_test_and_its_property(kind):
    room, file = room_and_file(kind)
    assert kind.id == f"tfmq::{file}" and kind.__name__.lower() == file.replace("_", "")
    assert (TESTS / room / f"test_{file}.py").is_file()
    assert kind.id in IN_PIPELINES or re.search(rf"\b{kind.__name__}\b", PROPERTIES), "not in the property suite"


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_a_pass_documents_itself(kind):
    sections = re.findall(r"^\s*(Before|After|Legality|Meta)\b[^\n]*:", kind.__doc__, re.MULTILINE)
    assert list(dict.fromkeys(sections)) == ["Before", "After", "Legality", "Meta"]
    assert kind.__doc__.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_a_room_says_whether_its_passes_change_numerics(kind):
    assert "numerics" in vars(kind)
    assert (kind.numerics is Numerics.CHANGED) == (room_and_file(kind)[0] == "precision")


@pytest.mark.parametrize("path", [p for p in ROOMS.glob("*/*.py") if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_what_is_no_pass_lies_apart(path):
    modules = {tuple(room_and_file(kind)) for kind in PASSES.values()}
    assert ((path.parent.name, path.stem) in modules) == (path.parent.name not in ("analysis", "support"))
