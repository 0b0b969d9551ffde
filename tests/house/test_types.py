"""Where a type checker is told to look away, the line says why."""

import re

from tests.house.sources import ROOT, sources

IGNORE = re.compile(r"# type: ignore")
REASONED = re.compile(r"# type: ignore\[[\w-]+(?:, [\w-]+)*\]  # \w")


def test_every_ignored_type_error_has_its_reason():
    unexplained = [
        f"{source.path.relative_to(ROOT)}:{number}"
        for source in sources().values()
        for number, line in enumerate(source.path.read_text(encoding="utf-8").splitlines(), 1)
        if IGNORE.search(line) and not REASONED.search(line)
    ]
    assert not unexplained, (
        "read an argument of a node by tfmq_fx.passes.support.arguments, or write the reason behind the comment, as"
        "  # type: ignore[code]  # reason:\n" + "\n".join(unexplained)
    )


def test_an_unused_one_is_an_error_of_the_type_check():
    assert "warn_unused_ignores = true" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
