"""``tfmq-fx bisect``: the first pass after which a model computes something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tfmq_fx.cli.console import console, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.options import BackendOption, Model, Seed, Steps

if TYPE_CHECKING:
    from tfmq_fx.testing import Bisection

__all__ = ["bisect"]

#: Items of the batch that graphs are run on, and batches of noise that quantization is calibrated on.
BATCH, CALIBRATION = 2, 2


def bisect(
    model: Model = None,
    backend: BackendOption = "inductor",
    steps: Steps = 50,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, help="The largest error, norm(a - b) / norm(b), of a pass that does not promise equal bits."
        ),
    ] = 5e-2,
    skip_pass: Annotated[
        list[str], typer.Option("--skip-pass", help="The id of a pass to leave out. May be repeated.")
    ] = [],  # noqa: B006  (typer shows the default; nothing changes it)
    seed: Seed = 0,
) -> None:
    """Capture, quantize and lower a model, and find the first pass after which it computes something else.

    Every graph is run before and after each pass on one batch of noise; the command ends with exit code 1 at the first
    pass that breaks its promise, and with 0 when all keep theirs. Calibration is on noise too: this checks the passes,
    not the quantization.
    """
    result = _bisect(model, backend, steps, tolerance, skip_pass, seed)
    for step in result.steps:
        if step.modified or step is result.culprit:
            console().print(str(step), soft_wrap=True, markup=False)
    console().print(str(result), soft_wrap=True, markup=False)
    if result.culprit is not None:
        raise typer.Exit(1)


def _bisect(model: str | None, backend: str, steps: int, tolerance: float, skip: list[str], seed: int) -> Bisection:
    import torch

    from tfmq_fx.cli.example_inputs import unconditional_inputs
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.diagnostics.comparison import ddim_scheduler
    from tfmq_fx.lowering.backends.registry import find_backend
    from tfmq_fx.lowering.lower import lower
    from tfmq_fx.lowering.options import LoweringOptions
    from tfmq_fx.passes.registry import check_pass_ids
    from tfmq_fx.testing import bisect_passes
    from tfmq_fx.workflow.quantize import quantize

    # Everything that can be wrong with the command is found before the model is loaded.
    check_pass_ids(skip)
    find_backend(backend).check(LoweringOptions(reuse=False))
    require_no_artefact(model)
    stage("loading the model")
    module, scheduler = load_model(model)
    timesteps = ddim_scheduler(scheduler, steps).timesteps
    generator = torch.Generator().manual_seed(seed)

    def noise(number: int) -> dict[str, torch.Tensor]:
        """A batch of the model's inputs: noise at timesteps of the schedule, others in each batch."""
        inputs = unconditional_inputs(module)
        sample = next(iter(inputs))
        inputs[sample] = torch.randn(inputs[sample].shape, generator=generator)
        inputs["timestep"] = timesteps[[(number * BATCH + item) % len(timesteps) for item in range(BATCH)]]
        return inputs

    batches = [noise(number) for number in range(CALIBRATION)]

    def run() -> None:
        program = quantize(module, None, batches, timesteps=timesteps, progress=False)
        # Stages have inputs of their own; whole, the program is run from noise to result behind every pass.
        lower(program, backend, reuse=False)

    stage("running every graph before and after each pass")
    return bisect_passes(run, noise(CALIBRATION), tolerance=tolerance, skip=skip)
