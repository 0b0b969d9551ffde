"""What guards a result is an error with a sentence that names the node, with asserts and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusal_cases import CASES, said


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_a_sentence_names_what_is_wrong(case):
    assert CASES[case] in said(case) and "\n" not in said(case)


def test_the_same_without_asserts():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-O", "-m", "tests.refusal_cases"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(CASES)
    for words, line in zip(CASES.values(), lines, strict=True):
        assert line.startswith("False: ") and words in line
