"""``tfmq-fx search``: which layers get how many bits, under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.options import BatchSizeOption, CalibrationSamples, ConfigOption, Model, Seed, Steps
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from tfmq_fx.search.result import SearchResult

__all__ = ["search"]

#: Layers that the terminal lists; the JSON has all of them.
SHOWN_LAYERS = 12
#: Dots per inch of the picture.
DOTS = 160


def search(
    budget: Annotated[
        str,
        typer.Option(
            help="size=0.2x of the float model; latency=1.1x of W8A8's, measured here; or psnr=40, in dB, of the "
            "predictions."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: config.json, search.json, frontier.png.")],
    model: Model = None,
    candidates: Annotated[
        str, typer.Option(help="Widths that a layer may have, w8a8 first, with commas.")
    ] = "w8a8,w4a8,float",
    config_file: ConfigOption = None,
    steps: Steps = 50,
    calibration_samples: CalibrationSamples = 64,
    batch_size: BatchSizeOption = 16,
    seed: Seed = 0,
) -> None:
    """Search bit widths: measure what each layer loses and costs, and choose the best within a budget.

    The configuration that is found goes to `quantize --config`. Nothing is written before everything is done.
    """
    from tfmq_fx.artefact.layout import is_artefact
    from tfmq_fx.cli.configuration_file import read_configuration, write_configuration
    from tfmq_fx.cli.example_inputs import unconditional_inputs
    from tfmq_fx.config.quantization import QuantizationConfig
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.data.sampling import sample_trajectories
    from tfmq_fx.diagnostics.comparison import ddim_scheduler
    from tfmq_fx.search.budget import Budget
    from tfmq_fx.search.plots import frontier_plot
    from tfmq_fx.search.search_bits import search_bits
    from tfmq_fx.search.widths import check_candidates

    # Everything that can be wrong with the command is found before the minutes of measuring.
    wanted, widths = Budget.of(budget), check_candidates(candidates)
    config = QuantizationConfig() if config_file is None else read_configuration(config_file)
    require_no_artefact(model)
    if is_artefact(out) or out.is_file():
        kind = "a file" if out.is_file() else "an artefact"
        msg = f"{out} is {kind}; choose another folder for what the search finds"
        raise ConfigError(msg)
    stage("loading the model")
    module, scheduler = load_model(model)
    unconditional_inputs(module)
    ddim = ddim_scheduler(scheduler, steps)
    stage(f"sampling {calibration_samples} trajectories of {steps} steps with the float model")
    batches = sample_trajectories(
        module, ddim, steps=steps, samples=calibration_samples, batch_size=batch_size, seed=seed
    )
    stage(f"searching under {wanted}: calibrating, measuring layer by layer, quantizing with what is found")
    result = search_bits(
        module, wanted, batches, config=config, candidates=[str(each) for each in widths], timesteps=ddim.timesteps
    )
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    picture = frontier_plot(result)
    out.mkdir(parents=True, exist_ok=True)
    write_configuration(result.config, out / "config.json")
    (out / "search.json").write_text(text, encoding="utf-8")
    picture.savefig(out / "frontier.png", dpi=DOTS)
    console().print(_layers(result))
    console().print(str(result), soft_wrap=True, markup=False)
    for name in ("config.json", "search.json", "frontier.png"):
        console().print(f"[bold green]{out / name}[/]", soft_wrap=True)


def _layers(result: SearchResult) -> Table:
    """The most sensitive layers: the relative error of the prediction with each alone quantized, and its bytes."""
    layers = result.layers
    names = list(dict.fromkeys(str(widths) for layer in layers for widths in layer.widths if not widths.is_float))
    table = Table("layer", *(f"{name} alone" for name in names), "chosen", "size", title="most sensitive layers")
    table.title_justify = "left"
    for layer in layers[:SHOWN_LAYERS]:
        errors = {str(widths): f"{error:.2g}" for widths, error in zip(layer.widths, layer.errors, strict=True)}
        size = layer.sizes[layer.widths.index(layer.chosen)]
        table.add_row(layer.name, *(errors.get(name, "") for name in names), str(layer.chosen), size_text(size))
    return table
