"""Every code block of the README and of the site is run or checked, and every link leads somewhere.

Blocks of Python run in order, one namespace a page, as a reader would run them. Blocks of shell are checked against
what they call: the options of ``tfmq-fx``, the targets of the Makefile, the extras of pyproject.toml.
"""

import re
import shlex
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from diffusers import DDIMScheduler, UNet2DModel

import tfmq_fx
from tfmq_fx.cli.app import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
WRITTEN = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *PAGES]
#: Fewer steps and samples: the code is the page's, the sizes are a test's.
SMALLER = (
    ("set_timesteps(50)", "set_timesteps(4)"),
    ("steps=50, samples=32", "steps=4, samples=8"),
    ("steps=50, calls=32", "steps=4, calls=2"),
    ("batch_size=4, num_inference_steps=50", "batch_size=1, num_inference_steps=4"),
    ("iterations=400, temporal_iterations=400", "iterations=3, temporal_iterations=3"),
    ('lower="inductor"', 'lower="reference"'),
    ("max_examples=5,", "max_examples=2,"),
    ("max_examples=20,", "max_examples=5,"),
)
#: The languages of code blocks: those that are run or checked, and drawings.
LANGUAGES = {"python", "sh", "text"}


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if found == language]


def with_blocks(language, pages=WRITTEN):
    return [page for page in pages if blocks(page, language)]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A pipeline folder with the interface of the bundled model, and next to no weights."""
    folder = tmp_path_factory.mktemp("small-model")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    UNet2DModel(**blocks, **sizes, add_attention=False).save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def run_page(page):
    namespace = {"__name__": "documentation"}
    for block in blocks(page, "python"):
        for full, small in SMALLER:
            block = block.replace(full, small)
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """An empty folder, and no C++ compilation."""
    monkeypatch.setattr(tfmq_fx, "lower", partial(tfmq_fx.lower, backend="reference"))
    monkeypatch.setattr("tfmq_fx.diffusers.served.lower", tfmq_fx.lower)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_the_readme_runs(as_a_reader):
    namespace = run_page("README.md")
    assert isinstance(namespace["model"], UNet2DModel)
    assert len(namespace["images"]) == 1
    assert namespace["denoiser"].report.temporal_layers == 0


@pytest.mark.parametrize("page", with_blocks("python", PAGES))
def test_the_pages_run(page, as_a_reader, small_model, monkeypatch):
    monkeypatch.setattr(tfmq_fx, "bundled_model_path", lambda: small_model)
    assert run_page(page)


def test_the_guides_and_concepts_have_code():
    """What is run below is what is there to run."""
    guides = {page for page in PAGES if page.startswith("docs/guides/")}
    assert len(guides) >= 3
    assert guides | {"docs/getting-started.md", "docs/concepts/lowering.md"} <= set(with_blocks("python", PAGES))


@pytest.mark.parametrize("page", WRITTEN)
def test_every_block_says_what_it_is(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```(.*)$", text, re.M)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


def shell_lines():
    return [
        (page, line)
        for page in with_blocks("sh")
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize("page, line", shell_lines())
def test_commands_exist(page, line):
    program, *arguments = shlex.split(line, comments=True)
    if program == "tfmq-fx":
        # Parsing fails on an option, a choice or a command that is not there, and runs nothing.
        command = typer.main.get_command(app).commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {argument for argument in arguments if "=" not in argument} <= set(targets)
    elif program in (".venv/bin/pytest", ".venv/bin/python", "python"):
        assert all((ROOT / argument.split("::")[0]).exists() for argument in arguments if argument.endswith(".py"))
    elif Path(program).name in ("pip", "pre-commit", "git"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = re.findall(r"tfmq-fx\[([\w,]+)\]", line)
        assert {extra for names in named for extra in names.split(",")} <= set(extras["optional-dependencies"])
    else:
        pytest.fail(f"{page} runs {program!r}, which nothing here checks")


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


def interface_names():
    text = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| (`\w.*?) \| ", text, re.M))
    return sorted(set(re.findall(r"`(\w+)\(", rows)))


@pytest.mark.parametrize("name", interface_names())
def test_every_name_in_the_interface_table_exists(name):
    assert callable(getattr(tfmq_fx, name))


def test_the_interface_table_is_the_interface():
    """Each function of the package is in the table that lists them."""
    functions = {name for name in tfmq_fx.__all__ if name.islower() and callable(getattr(tfmq_fx, name))}
    # How one gets the folder of the bundled model, and what `lower` does itself.
    assert functions - {"bundled_model_path", "program_from_graph"} <= set(interface_names())


def test_every_public_room_has_a_reference_page():
    """A room is public when it exports names; the site then has a page that renders it."""
    rendered = {
        name for page in PAGES for name in re.findall(r"^::: ([\w.]+)", (ROOT / page).read_text(encoding="utf-8"), re.M)
    }
    rooms = [path.parent for path in (ROOT / "tfmq_fx").glob("*/__init__.py")]
    public = {
        f"tfmq_fx.{room.name}" for room in rooms if "__all__" in (room / "__init__.py").read_text(encoding="utf-8")
    }
    assert public - {"tfmq_fx.cli", "tfmq_fx.kernels"} <= rendered
    assert {"tfmq_fx", "tfmq_fx.passes", "tfmq_fx.passes.analysis", "tfmq_fx.errors"} <= rendered
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(page.removeprefix("docs/") in site for page in PAGES)


def test_every_room_is_in_the_drawing_of_the_house():
    text = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "tfmq_fx").glob("*/__init__.py")}
    rooms |= {path.parent.name + "/" for path in (ROOT / "passes").glob("*/__init__.py")}
    assert {"temporal", "lowering", "canonical/", "analysis/"} <= rooms
    assert [room for room in sorted(rooms) if room not in text] == []
