"""Load a denoiser and its scheduler: the bundled model, a local diffusers folder, or an id on the Hub."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import CaptureError

__all__ = ["bundled_model_path", "load_model"]

#: Names under which a diffusers pipeline holds its denoiser.
COMPONENTS = ("unet", "transformer")
#: An id on the Hugging Face Hub: "name" or "owner/name".
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def bundled_model_path() -> Path:
    """The diffusers pipeline folder of the model that comes with this package."""
    return Path(__file__).parent / "models" / "fashion-ddpm"


def load_model(path_or_id: str | Path | None = None) -> tuple[nn.Module, Scheduler]:
    """Load a denoiser in float32 and evaluation mode, with its scheduler.

    Args:
        path_or_id: A diffusers pipeline folder (``model_index.json`` with a ``unet`` or ``transformer``),
            a bare model folder (``config.json``), or an id on the Hugging Face Hub of either. None is the
            bundled model.

    Returns:
        The model, and its diffusers scheduler: a default ``DDPMScheduler`` where there is none.

    Raises:
        CaptureError: There is no such model, it is not a denoiser, or its files cannot be read.
    """
    source = bundled_model_path() if path_or_id is None else path_or_id
    folder = Path(source)
    if folder.exists():
        return _load_folder(folder)
    if path_or_id is None:
        msg = f"the bundled model is missing from this installation ({folder}); reinstall the package, or name a model"
        raise CaptureError(msg)
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        msg = f"there is no model folder {str(source)!r}"
        raise CaptureError(msg)
    return _load_from_hub(source)


def _load_folder(folder: Path) -> tuple[nn.Module, Scheduler]:
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        component = _component(index, f"pipeline folder {str(folder)!r}")
        model = _load_denoiser(str(folder / component), None, index[component][1])
    elif (folder / "config.json").is_file():
        index = {}
        model = _load_denoiser(str(folder), None, str(_read_json(folder / "config.json").get("_class_name", "")))
    else:
        msg = f"{str(folder)!r} is no diffusers folder: it has neither model_index.json nor config.json"
        raise CaptureError(msg)
    if not (folder / "scheduler").is_dir():
        return model, _default_scheduler()
    config = folder / "scheduler" / "scheduler_config.json"
    name = index["scheduler"][1] if "scheduler" in index else str(_read_json(config).get("_class_name", ""))
    return model, _load_scheduler(str(folder), name)


def _load_from_hub(name: str) -> tuple[nn.Module, Scheduler]:
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.configuration_utils import ConfigMixin

    class _BareConfig(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is not followed
        config_name = "config.json"

    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as no_pipeline:
        try:
            config = _BareConfig.load_config(name)
        except (OSError, ValueError):
            msg = f"{name!r} is no folder here, and the Hugging Face Hub does not give it: {_first_line(no_pipeline)}"
            raise CaptureError(msg) from no_pipeline
        return _load_denoiser(name, None, str(config.get("_class_name", ""))), _default_scheduler()
    component = _component(index, f"pipeline {name!r}")
    model = _load_denoiser(name, component, index[component][1])
    scheduler = _load_scheduler(name, index["scheduler"][1]) if "scheduler" in index else _default_scheduler()
    return model, scheduler


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{str(path)!r} cannot be read as JSON: {_first_line(error)}"
        raise CaptureError(msg) from error
    if not isinstance(content, dict):
        msg = f"{str(path)!r} holds a {type(content).__name__}, not a configuration"
        raise CaptureError(msg)
    return content


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _component(index: dict[str, Any], what: str) -> str:
    """The entry of a pipeline's index that is its denoiser."""
    for name in COMPONENTS:
        entry = index.get(name)
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], str):
            return name
    msg = f"the {what} has no {' or '.join(COMPONENTS)}, so it holds no diffusion model"
    raise CaptureError(msg)


def _subclass(name: str, base: Any) -> Any | None:
    """The class of diffusers with this name, if it has one that derives from ``base``."""
    import diffusers

    candidate = getattr(diffusers, name, None)
    return candidate if isinstance(candidate, type) and issubclass(candidate, base) else None


def _load_denoiser(source: str, subfolder: str | None, class_name: str) -> nn.Module:
    import diffusers

    where = f"{source}/{subfolder}" if subfolder else source
    model_class = _subclass(class_name, diffusers.ModelMixin)
    if model_class is None:
        msg = f"{where!r} is not a diffusers model: its class is {class_name or 'not named'!r}"
        raise CaptureError(msg)
    if "timestep" not in inspect.signature(model_class.forward).parameters:
        msg = f"{where!r} holds a {class_name}, which takes no timestep and so is not a diffusion model"
        raise CaptureError(msg)
    options = {} if subfolder is None else {"subfolder": subfolder}
    try:
        model = model_class.from_pretrained(source, torch_dtype=torch.float32, low_cpu_mem_usage=False, **options)
    except Exception as error:  # from_pretrained lets errors of many libraries through
        msg = f"the {class_name} in {where!r} cannot be loaded: {_first_line(error)}"
        raise CaptureError(msg) from error
    assert isinstance(model, nn.Module)
    return model.float().eval()


def _load_scheduler(source: str, class_name: str) -> Scheduler:
    import diffusers

    scheduler_class = _subclass(class_name, diffusers.SchedulerMixin)
    if scheduler_class is None:
        msg = f"the scheduler of {source!r} is of class {class_name or 'not named'!r}, which diffusers does not have"
        raise CaptureError(msg)
    try:
        scheduler: Scheduler = scheduler_class.from_pretrained(source, subfolder="scheduler")
    except Exception as error:  # as above
        msg = f"the {class_name} of {source!r} cannot be loaded: {_first_line(error)}"
        raise CaptureError(msg) from error
    return scheduler


def _default_scheduler() -> Scheduler:
    from diffusers import DDPMScheduler

    scheduler: Scheduler = DDPMScheduler()
    return scheduler
