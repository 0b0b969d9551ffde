"""The options of commands that run a whole diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tfmq_fx.cli.registered_names import name_parser

__all__ = [
    "PANEL",
    "ClassLabels",
    "ComponentOption",
    "Guidance",
    "PromptOption",
    "PromptsFile",
    "SchedulerOption",
    "Size",
    "parse_class_labels",
    "parse_size",
]

PANEL = "Pipelines"
MOST_GUIDANCE = 1e6


def schedulers() -> Iterable[str]:
    """Samplers by their short names."""
    from tfmq_fx.diffusers.scheduler_names import SCHEDULERS

    return SCHEDULERS


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from ``"768x512"``."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        msg = f"{text!r} is no size: write width x height in pixels, such as 512x512"
        raise typer.BadParameter(msg)
    return int(width), int(height)


def check_guidance(value: float | None) -> float | None:
    """A guidance scale that can be used."""
    if value is not None and not 0.0 <= value < MOST_GUIDANCE:
        msg = f"{value:g} is no guidance scale: it is a number from 0 on, such as 7.5"
        raise typer.BadParameter(msg)
    return value


def parse_class_labels(text: str) -> list[int]:
    """Whole numbers from ``"3,7"``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        msg = f"{text!r} are no class labels: write whole numbers with commas between them, such as 3,7"
        raise typer.BadParameter(msg)
    return [int(part) for part in parts]


PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A text file with a prompt in each line: MODEL is run as a pipeline with them.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
PromptOption = Annotated[
    list[str],
    typer.Option("--prompt", help="A prompt; may be repeated.", show_default=False, rich_help_panel=PANEL),
]
ClassLabels = Annotated[
    str | None,
    typer.Option(
        "--class-labels",
        metavar="N,N,…",
        help="Class labels, for pipelines that take these instead of prompts.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
ComponentOption = Annotated[
    list[str],
    typer.Option(
        "--component",
        help="A component to quantize: unet, transformer, transformer_2 … May be repeated.  [default: every denoiser]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        callback=check_guidance,
        help="Guidance scale.  [default: the pipeline's]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", help="Width x height in pixels.  [default: the pipeline's]", show_default=False,
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="NAME",
        parser=name_parser(schedulers),
        help="Another sampler: ddim, dpm++, dpm++-karras, euler, euler-a, euler-karras, heun, lcm, unipc …  "
        "[default: the pipeline's]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
