"""The options and arguments that commands share; their help texts and choices stand only here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfmq_fx.cli.registered_names import activation_observers, backends, name_parser, reconstructions, samplers
from tfmq_fx.config.choices import Temporal, UnknownTimestep
from tfmq_fx.config.presets import PRESETS

__all__ = [
    "ActivationBits",
    "ActivationRangeOption",
    "ArtefactOption",
    "BackendOption",
    "BatchSizeOption",
    "CacheBytes",
    "CalibrationSamples",
    "ConfigOption",
    "Iterations",
    "KeepFloat",
    "Model",
    "NdtcMean",
    "OptionalArtefact",
    "OutFolder",
    "PackageOption",
    "PresetOption",
    "PrintAfter",
    "ReconstructionOption",
    "SampleCount",
    "SamplerOption",
    "Samples",
    "Seed",
    "ServedTimesteps",
    "Steps",
    "TableSteps",
    "TemporalIterations",
    "TemporalOption",
    "UnknownTimestepOption",
    "WeightBits",
]

SETTINGS = "What is quantized"
CALIBRATION = "Calibration"
RECONSTRUCTION = "Reconstruction"
PASSES = "Passes"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A diffusers pipeline or model folder, or an id on the Hugging Face Hub. None: the bundled model.",
        show_default=False,
    ),
]
ArtefactOption = Annotated[Path, typer.Option("--artefact", help="The folder that `quantize` wrote.")]
OptionalArtefact = Annotated[
    Path | None, typer.Option("--artefact", help="Show this quantized artefact.", show_default=False)
]
OutFolder = Annotated[Path, typer.Option("--out", help="The folder to write; an artefact that is there is replaced.")]

PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"A published method: {', '.join(PRESETS)} (`tfmq-fx presets` describes them). Options that are given too "
        "change its settings.",
        show_default=False,
        rich_help_panel=SETTINGS,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A JSON file with the fields of a configuration, such as `search` writes. Options that are given too "
        "change it.",
        show_default=False,
        rich_help_panel=SETTINGS,
    ),
]
WeightBits = Annotated[int, typer.Option(help="Bits of a weight: 2-8, 16, or 32 for float.", rich_help_panel=SETTINGS)]
ActivationBits = Annotated[
    int, typer.Option(help="Bits of an activation: 2-8, 16, or 32 for float.", rich_help_panel=SETTINGS)
]
TemporalOption = Annotated[
    Temporal,
    typer.Option(
        "--temporal",
        help="The temporal block: fsc, one parameter set per timestep; cache, its float features as stored rows; auto, "
        "what of both is closer to float; shared, one set for all; observed, the same from calibration data; float, "
        "left alone.",
        rich_help_panel=SETTINGS,
    ),
]
UnknownTimestepOption = Annotated[
    UnknownTimestep,
    typer.Option(
        "--unknown-timestep",
        help="A timestep outside the table: computed exactly and kept, an error, or its nearest.",
        rich_help_panel=SETTINGS,
    ),
]
ServedTimesteps = Annotated[
    UnknownTimestep | None,
    typer.Option(
        "--unknown-timestep",
        help="A timestep outside the artefact's table: computed, an error, or its nearest.  [default: as quantized]",
        show_default=False,
    ),
]
KeepFloat = Annotated[
    list[str],
    typer.Option(
        help="What stays float: a role (input, output, attention) or a pattern of layer names. May be repeated; what "
        "is given takes the place of the default, so name input and output too to keep them.",
        rich_help_panel=SETTINGS,
    ),
]
ActivationRangeOption = Annotated[
    str,
    typer.Option(
        "--activation-range",
        parser=name_parser(activation_observers),
        help="How activation ranges are estimated: ema is a smoothed minimum and maximum, mse a search.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationSamples = Annotated[
    int,
    typer.Option(min=1, help="Trajectories sampled with the float model to calibrate.", rich_help_panel=CALIBRATION),
]
SamplerOption = Annotated[
    str,
    typer.Option(
        "--sampler",
        parser=name_parser(samplers),
        help="Timesteps calibrated on; ndtc is PTQ4DM's normal distribution.",
        rich_help_panel=CALIBRATION,
    ),
]
NdtcMean = Annotated[
    float,
    typer.Option(help="Mean of --sampler ndtc as a share of T, 0 to 0.5.", rich_help_panel=CALIBRATION),
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Batch size of calibration.", rich_help_panel=CALIBRATION)
]
ReconstructionOption = Annotated[
    str | None,
    typer.Option(
        "--reconstruction",
        parser=name_parser(reconstructions),
        help="Weight rounding: nearest (or none); gptq, layer by layer without training; tfmq-dm, learned, the "
        "temporal block first (TIAR), then block by block (BRECQ); brecq, without TIAR; adaround, layer by layer; "
        "tiar, the temporal block alone. By default gptq for weights of 6 bits or fewer, else nearest.",
        rich_help_panel=RECONSTRUCTION,
    ),
]
Iterations = Annotated[
    int,
    typer.Option(min=1, help="Training steps of each block that is reconstructed.", rich_help_panel=RECONSTRUCTION),
]
TemporalIterations = Annotated[
    int,
    typer.Option(
        min=1,
        help="Training steps of a temporal block that learns by its features, and of what joins a conditioning.",
        rich_help_panel=RECONSTRUCTION,
    ),
]
CacheBytes = Annotated[
    float,
    typer.Option(
        "--cache-gib",
        min=0.0,
        help="GiB of memory for the activations that reconstruction caches; what is beyond goes to files.",
        rich_help_panel=RECONSTRUCTION,
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        min=0.0,
        help="Write nothing when a timestep's relative error against the float model is larger, such as 0.1.",
        show_default=False,
        rich_help_panel=SETTINGS,
    ),
]
PrintAfter = Annotated[
    list[str],
    typer.Option(
        "--print-after",
        help="Print the graph after a pass to stderr: its id, such as tfmq::remove_dropouts, or all. May be repeated.",
        rich_help_panel=PASSES,
    ),
]

Steps = Annotated[int, typer.Option(min=1, help="Sampling steps (DDIM); their timesteps make the table.")]
TableSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Sampling steps (DDIM).  [default: those of the artefact]", show_default=False),
]
Samples = Annotated[int, typer.Option(min=1, help="Images.")]
SampleCount = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Images; of a pipeline, of each prompt.  [default: 16; 1 of each prompt]",
                 show_default=False),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        parser=name_parser(backends),
        help="What runs the model (`tfmq-fx backends` describes them).",
    ),
]
PackageOption = Annotated[
    Path | None,
    typer.Option(
        "--package",
        help="The package of a backend that writes one, such as aot.  [default: the artefact's path with its suffix]",
        show_default=False,
    ),
]
