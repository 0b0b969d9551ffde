"""What a wheel holds: every package, wherever its folder lies."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_a_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    # The longer name first: tfmq_fx.passes lies in a folder of its own, not in that of tfmq_fx.
    folders = settings["package-dir"]
    found = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for package, folder in folders.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert {"tfmq_fx.schedulers", "tfmq_fx.passes.analysis"} <= found
