"""Where a type checker is told to look away, the line says why."""

import re

from tests.house.sources import ROOT, sources

IGNORE = re.compile(r"# type: ignore")
REASONED = re.compile(r"# type: ignore\[[\w-]+(?:, [\w-]+)*\]  # \w")
#: fx types the arguments of a node as anything that a graph may hold. What follows from that alone needs no more words.
ARGUMENTS_OF_NODES = re.compile(r"# type: ignore\[(arg-type|index|list-item|operator|return-value|union-attr)\]$")


def test_every_ignored_type_error_has_its_reason():
    found = [
        f"{source.path.relative_to(ROOT)}:{number}"
        for source in sources().values()
        for number, line in enumerate(source.path.read_text(encoding="utf-8").splitlines(), 1)
        if IGNORE.search(line) and not REASONED.search(line) and not ARGUMENTS_OF_NODES.search(line)
    ]
    assert not found, "write the reason behind the comment, as  # type: ignore[code]  # reason:\n" + "\n".join(found)


def test_an_unused_one_is_an_error_of_the_type_check():
    assert "warn_unused_ignores = true" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
