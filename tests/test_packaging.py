"""What a wheel holds, and what stands in more than one file."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name):
    """The versions of a constraints file by package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def bounds(requirements):
    """The lower bounds of requirements by package."""
    found = [re.match(r"([\w-]+)(?:\[[\w,-]+\])?(?:>=([\d.]+))?", requirement) for requirement in requirements]
    return {match[1]: match[2] for match in found if match[1] != PROJECT["project"]["name"]}


def test_every_folder_with_a_package_is_listed():
    settings = PROJECT["tool"]["setuptools"]
    # The longer name first: tfmq_fx.passes lies in a folder of its own, not in that of tfmq_fx.
    folders = settings["package-dir"]
    found = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for package, folder in folders.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert {"tfmq_fx.schedulers", "tfmq_fx.passes.analysis"} <= found


def test_the_oldest_versions_are_the_lower_bounds():
    """``constraints-oldest.txt`` pins what pyproject.toml admits, so that CI tries what is promised."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    run = bounds([*project["dependencies"], *extras["testing"], *extras["openvino"], *extras["onnxruntime"]])
    oldest = pins("constraints-oldest.txt")
    assert set(oldest) == set(run)

    def parts(version):
        return [*map(int, version.split(".")), 0, 0][:3]

    assert {name: parts(version) for name, version in oldest.items()} == {n: parts(v) for n, v in run.items()}


def test_every_requirement_has_a_tested_version():
    project = PROJECT["project"]
    wanted = set(bounds(project["dependencies"]))
    for extra in project["optional-dependencies"].values():
        wanted |= set(bounds(extra))
    assert wanted <= set(pins("constraints.txt"))


def test_the_citation_is_of_the_newest_release():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == releases[0]
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{releases[0]}]")


def test_hosted_ci_runs_what_is_promised():
    """Every Python from the oldest admitted on, and a constraints file that is there."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f'python: ["{oldest}", "3.12", "3.13"]' in workflow
    assert all((ROOT / name).is_file() for name in re.findall(r"constraints[\w-]*\.txt", workflow))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"run: make ([\w-]+)", workflow)) <= set(targets)
