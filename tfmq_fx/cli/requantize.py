"""``tfmq-fx quantize --ranges-from``: other weights of an architecture that was quantized before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfmq_fx.cli.console import console, stage
from tfmq_fx.cli.given_options import is_given
from tfmq_fx.cli.summary import print_summary

__all__ = ["LoraOption", "LoraScale", "RangesFrom", "requantize"]

PANEL = "Other weights"
#: The options of ``quantize`` that ``--ranges-from`` leaves something to say.
TAKEN = ("model", "out", "ranges_from", "lora", "lora_scale", "reconstruction", "max_error", "print_after", "seed")

RangesFrom = Annotated[
    Path | None,
    typer.Option(
        "--ranges-from",
        help="An artefact of the same architecture: its activation ranges and configuration are kept, MODEL's weights "
        "are rounded anew. Seconds, without trajectories, for models with prompts too.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
LoraOption = Annotated[
    Path | None,
    typer.Option(
        "--lora",
        help="A LoRA (.safetensors) that is fused into MODEL's weights before they are quantized.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
LoraScale = Annotated[float, typer.Option("--lora-scale", help="Strength of --lora.", rich_help_panel=PANEL)]


def requantize(
    context: typer.Context,
    *,
    model: str | None,
    artefact: Path,
    out: Path,
    lora: Path | None,
    lora_scale: float,
    reconstruction: str | None,
    max_error: float | None,
    seed: int,
) -> None:
    """Quantize a model with the ranges of an artefact, and save it.

    Args:
        context: That of ``quantize``, whose options these are.
        model: The folder or id of the model.
        artefact: Where the ranges are.
        out: The folder to write.
        lora: What is fused into the model's weights.
        lora_scale: Its strength.
        reconstruction: How weights are rounded, in the place of what the artefact says.
        max_error: The largest relative error that is accepted.
        seed: Of the noise that ranges are checked on.

    Raises:
        typer.BadParameter: An option is given that the artefact decides.
    """
    from tfmq_fx.artefact.load import load
    from tfmq_fx.artefact.save import save
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.data.lora import fuse_lora
    from tfmq_fx.workflow.requantize import requantize as with_ranges_of

    for name in context.params:
        if name not in TAKEN and is_given(context, name):
            msg = "it has no effect beside --ranges-from, which keeps what the artefact says: leave one of them out"
            raise typer.BadParameter(msg, ctx=context, param_hint=f"--{name.replace('_', '-')}")
    quantized = load(artefact)
    stage("loading the model")
    module, _ = load_model(model)
    if lora is not None:
        stage(f"fusing {len(fuse_lora(module, lora, lora_scale))} layers of {lora}")
    stage(f"rounding its weights, with the ranges of {artefact}")
    program = with_ranges_of(quantized, module, reconstruction=reconstruction, max_error=max_error, seed=seed)
    stage("saving")
    save(program, out)
    print_summary(module, program, out)
    console().print(str(program.requantization), soft_wrap=True, markup=False)
