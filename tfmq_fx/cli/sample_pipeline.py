"""``tfmq-fx sample`` and ``compare`` for a quantized pipeline: prompts or class labels in, images out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tfmq_fx.cli.console import stage
from tfmq_fx.cli.given_options import refuse_without_effect
from tfmq_fx.cli.pipeline_call import PipelineCall
from tfmq_fx.cli.pipeline_options import parse_class_labels, parse_size
from tfmq_fx.cli.pipelines import is_pipeline, load_quantized_pipeline, run_to_images
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tfmq_fx.lowering.report.report import LoweringReport

__all__ = ["PipelineRun", "refuse_pipeline_options"]

#: Options that only a pipeline takes, and those that only an artefact takes, by the names of their parameters.
PIPELINE_OPTIONS = ("prompt", "prompts", "class_labels", "guidance", "size", "scheduler")
ARTEFACT_OPTIONS = ("unknown_timestep", "package", "rounds")


@dataclass(frozen=True)
class PipelineRun:
    """One run of pipelines from the same noise.

    Attributes:
        prompts: One call each.
        class_labels: Labels, for pipelines that take these.
        call: What else a call is given.
        scheduler: Another sampler's short name.
        samples: Images of each prompt or label.
        seed: Of the first call's noise.
    """

    prompts: Sequence[str]
    class_labels: Sequence[int] | None
    call: PipelineCall
    scheduler: str | None
    samples: int
    seed: int

    @classmethod
    def of_options(
        cls,
        context: typer.Context,
        folder: Path,
        *,
        prompts: Sequence[str],
        class_labels: str | None,
        steps: int | None,
        guidance: float | None,
        size: str | None,
        scheduler: str | None,
        samples: int | None,
        seed: int,
    ) -> PipelineRun:
        """What the options say, with what they leave open from the folder.

        Raises:
            typer.BadParameter: An option has no effect on a pipeline, or cannot be read.
            ArtefactError: The folder's file of defaults is damaged.
        """
        refuse_without_effect(context, dict.fromkeys(ARTEFACT_OPTIONS, "an artefact of a single model"))
        width, height = (None, None) if size is None else parse_size(size)
        call = PipelineCall(steps, guidance, width, height).over(PipelineCall.read(folder))
        labels = None if class_labels is None else parse_class_labels(class_labels)
        if prompts and labels is not None:
            msg = "prompts and --class-labels are for different pipelines: leave one of them out"
            raise ConfigError(msg)
        count = samples or (1 if prompts or labels else 16)
        return cls(prompts, labels, call, scheduler, count, seed)

    def quantized(self, folder: Path, backend: str) -> tuple[Tensor, list[LoweringReport]]:
        """Images of the quantized pipeline, and each component's lowering report."""
        stage(f"loading the pipeline ({backend})")
        pipeline = load_quantized_pipeline(folder, backend)
        images = self.images(pipeline, "sampling")
        served = [part.served for part in pipeline.components.values() if hasattr(part, "served")]
        return images, [one.denoiser.report for one in served]

    def images(self, pipeline: Any, label: str) -> Tensor:
        """``[N, C, H, W]`` in [-1, 1]."""
        from tfmq_fx.diffusers.scheduler_names import make_scheduler

        if self.scheduler is not None:
            pipeline.scheduler = make_scheduler(pipeline, self.scheduler)
        stage(label)
        return run_to_images(
            pipeline,
            self.prompts,
            self.class_labels,
            samples=self.samples,
            steps=self.call.steps,
            seed=self.seed,
            arguments=self.call.arguments(),
        )


def refuse_pipeline_options(context: typer.Context, artefact: Path) -> bool:
    """Whether ``artefact`` is a pipeline; where it is not, its options are refused."""
    if is_pipeline(artefact):
        return True
    if not artefact.exists():
        return False  # loading it says so
    missing = "a quantized pipeline as --artefact"
    refuse_without_effect(context, dict.fromkeys(PIPELINE_OPTIONS, missing))
    return False
