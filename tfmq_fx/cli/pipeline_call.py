"""How a pipeline is called from the command line, and the file beside a quantized one that says what it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tfmq_fx.errors import ArtefactError, ConfigError

__all__ = ["CALL_FILE", "PipelineCall", "read_prompts"]

#: In the folder of a quantized pipeline: what it was called with while it was recorded.
CALL_FILE = "tfmq_fx_call.json"
#: Nothing longer is read.
MOST_BYTES = 10_000


@dataclass(frozen=True)
class PipelineCall:
    """Arguments of a call that have defaults; None is the pipeline's own.

    Attributes:
        steps: Sampling steps.
        guidance: Guidance scale.
        width: In pixels.
        height: In pixels.
    """

    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None

    def over(self, defaults: PipelineCall) -> PipelineCall:
        """This call, with what it leaves open from ``defaults``."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return PipelineCall(**{**asdict(defaults), **own})

    def arguments(self) -> dict[str, Any]:
        """As diffusers names them, without the steps."""
        named = {"guidance_scale": self.guidance, "width": self.width, "height": self.height}
        return {name: value for name, value in named.items() if value is not None}

    def write(self, folder: Path) -> None:
        """Write the file."""
        (folder / CALL_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> PipelineCall:
        """What the file says; nothing where there is none.

        Raises:
            ArtefactError: It is damaged.
        """
        path = folder / CALL_FILE
        if not path.exists():
            return cls()
        msg = f"{path} is damaged: delete it, and give --steps, --guidance and --size"
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ArtefactError(msg)
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ArtefactError(msg) from error
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not set(content) <= names or not all(map(_usable, content.items())):
            raise ArtefactError(msg)
        return cls(**content)


def _usable(item: tuple[str, Any]) -> bool:
    name, value = item
    if value is None:
        return True
    kinds = (int, float) if name == "guidance" else (int,)
    return (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and 0 <= value < 10**6
        and (value > 0 or len(kinds) > 1)
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ConfigError: It cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        msg = f"the prompts in {path} cannot be read: {reason}"
        raise ConfigError(msg) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        msg = f"{path} has no prompts: write one in each line"
        raise ConfigError(msg)
    return prompts
