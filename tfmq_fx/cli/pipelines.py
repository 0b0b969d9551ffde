"""Whole diffusers pipelines on the command line: found, loaded, and run to images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfmq_fx.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_components", "is_pipeline", "load_float_pipeline", "load_quantized_pipeline", "run_to_images"]

INDEX = "model_index.json"
#: What a pipeline with such an argument is given, and the option for it.
NEEDED = {"prompt": "prompts: add --prompt", "class_labels": "class labels: add --class-labels"}
#: Seldom on a command line, and no reason to keep images back that the user's own machine makes.
SAFETY = {"safety_checker": None, "requires_safety_checker": False}


def is_pipeline(path: str | Path | None) -> bool:
    """Whether this is the folder of a diffusers pipeline."""
    return path is not None and (Path(path) / INDEX).is_file()


def check_components(model: str | None, components: Sequence[str]) -> None:
    """Find out whether a pipeline in a folder has these components, before its weights are read.

    Raises:
        ConfigError: MODEL is missing or is no pipeline, or has no such component.
    """
    if model is None:
        msg = "name a pipeline folder as MODEL: the bundled model takes neither prompts nor components"
        raise ConfigError(msg)
    from tfmq_fx.artefact.layout import is_artefact
    from tfmq_fx.diffusers.components import AUTOENCODERS

    folder = Path(model)
    if not folder.exists():
        return  # an id on the Hub
    if not is_pipeline(folder):
        msg = f"{model} is no pipeline: it has no {INDEX}; name the folder around the model's"
        raise ConfigError(msg)
    try:
        index = dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        msg = f"{folder / INDEX} cannot be read as an index of components"
        raise ConfigError(msg) from error
    held = sorted(name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None)
    if quantized := [name for name in held if is_artefact(folder / name)]:
        msg = f"{quantized[0]!r} of the pipeline {model} is quantized already, and MODEL is a float pipeline; name that"
        raise ConfigError(msg)
    if decoders := [name for name in components if name in AUTOENCODERS]:
        msg = (
            f"a pipeline whose {decoders[0]!r} is quantized cannot be saved: leave --component {decoders[0]} out, or "
            "use tfmq_fx.quantize_pipeline, which puts it in place"
        )
        raise ConfigError(msg)
    if unknown := [name for name in components if name not in held]:
        msg = f"{model} has no component {unknown[0]!r}; it has {', '.join(held)}"
        raise ConfigError(msg)


def load_float_pipeline(source: str) -> Any:
    """A pipeline in float32.

    Args:
        source: Its folder, or its id on the Hugging Face Hub.

    Raises:
        CaptureError: diffusers cannot load it.
    """
    import torch

    return _load(source, torch_dtype=torch.float32)


def load_quantized_pipeline(folder: Path, backend: str | None) -> Any:
    """A pipeline that ``quantize`` or ``save_pretrained`` wrote, on a backend; None leaves each as it was saved.

    Raises:
        CaptureError: diffusers cannot load it.
        ConfigError: Nothing in it is quantized.
    """
    from diffusers import PipelineQuantizationConfig

    from tfmq_fx.artefact.layout import is_artefact
    from tfmq_fx.diffusers.configuration import TFMQConfig

    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_artefact(path))
    if not parts:
        msg = f"no component of the pipeline in {folder} is quantized; name the folder that `quantize` wrote"
        raise ConfigError(msg)
    mapping = PipelineQuantizationConfig(quant_mapping={name: TFMQConfig(backend) for name in parts})
    return _load(str(folder), quantization_config=mapping)


def _load(source: str, **arguments: Any) -> Any:
    from diffusers import DiffusionPipeline

    from tfmq_fx.errors import TfmqError

    given = SAFETY if _has_safety_checker(source) else {}
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, **given, **arguments)
    except TfmqError:
        raise
    except (OSError, ValueError, TypeError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        msg = f"diffusers cannot load the pipeline {source!r}: {first}"
        raise CaptureError(msg) from error
    return pipeline


def _has_safety_checker(source: str) -> bool:
    path = Path(source) / INDEX
    return path.is_file() and '"safety_checker"' in path.read_text(encoding="utf-8")


def run_to_images(
    pipeline: Any,
    prompts: Sequence[str],
    class_labels: Sequence[int] | None,
    *,
    samples: int,
    steps: int | None,
    seed: int,
    arguments: dict[str, Any],
) -> Tensor:
    """Run a pipeline on prompts, on class labels, or on noise alone.

    Args:
        pipeline: A diffusers pipeline of images or videos.
        prompts: One call each.
        class_labels: One call with all of them; only without prompts.
        samples: Images of each prompt or label, or all that there are.
        steps: Sampling steps; None is the pipeline's default.
        seed: Of the first call's noise.
        arguments: Of each call.

    Returns:
        ``[N, C, H, W]`` in [-1, 1]; videos frame by frame.

    Raises:
        ConfigError: The pipeline does not take an argument, or makes neither images nor videos.
    """
    import numpy as np
    import torch

    from tfmq_fx.config.progress import draws_progress
    from tfmq_fx.diffusers.pipeline_calls import PipelineCalls

    name = type(pipeline).__name__
    taken = inspect.signature(type(pipeline).__call__).parameters
    needed = [what for argument, what in NEEDED.items() if argument in taken]
    if needed and not prompts and class_labels is None:
        msg = f"{name} takes {needed[0]}"
        raise ConfigError(msg)
    pipeline.set_progress_bar_config(disable=not draws_progress(), leave=False)
    given = {"output_type": "np", **arguments}
    if prompts:
        given |= {"num_images_per_prompt": samples} if samples > 1 else {}
    elif class_labels is not None:
        given["class_labels"] = [label for label in class_labels for _ in range(samples)]
    elif samples > 1:
        given["batch_size"] = samples
    runs = PipelineCalls(pipeline, list(prompts) or None, len(prompts) or 1, steps, seed, given, decodes=True)
    images: list[Any] = []
    for index in range(runs.count):
        result = runs.run(index)
        found = getattr(result, "images", getattr(result, "frames", None))
        pixels = None if found is None else np.asarray(found)
        if pixels is None or pixels.ndim not in (4, 5) or pixels.shape[-1] not in (1, 3):
            msg = f"{name} makes neither images nor videos, and the command line draws only these: run it from Python"
            raise ConfigError(msg)
        images.append(torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:])).movedim(-1, 1).float())
    return torch.cat(images).mul(2).sub(1)
