"""What compiled code was compiled for, and whether that is here."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tfmq_fx.artefact.fields import checked, fields_of, items

__all__ = ["Machine"]

#: Families of instructions that a compiler for the machine at hand uses, by the start of Linux's names for them.
FAMILIES = ("avx", "amx", "sse4", "fma", "f16c", "bmi", "gfni", "vaes", "vpclmul", "asimd", "sve", "i8mm", "bf16")


@dataclass(frozen=True)
class Machine:
    """Where code runs.

    Attributes:
        system: The operating system.
        processor: Its architecture.
        capability: What torch calls its vector instructions.
        instructions: The sets of instructions that it has, as far as they are known.
        torch: The version of torch, without what it was built with.
    """

    system: str
    processor: str
    capability: str
    instructions: tuple[str, ...]
    torch: str

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        return cls(
            platform.system(),
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            _instructions(),
            torch.__version__.partition("+")[0],
        )

    @classmethod
    def from_json(cls, value: Any) -> Machine:
        """The inverse of :meth:`to_json`.

        Raises:
            ArtefactError: A field is wrong.
        """
        fields = fields_of(value, cls.__dataclass_fields__, "'machine'")
        texts = {name: checked(fields[name], str, f"'machine'.{name}") for name in fields if name != "instructions"}
        names = [checked(name, str, "'machine'.instructions") for name in items(fields["instructions"], "'machine'")]
        return cls(**texts, instructions=tuple(names))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "instructions": list(self.instructions)}

    def lacks(self, other: Machine) -> str | None:
        """Why code that was compiled for ``other`` cannot run here, in words; None where it can."""
        for name in ("system", "processor", "torch"):
            required, available = getattr(other, name), getattr(self, name)
            if required != available:
                what = "torch " if name == "torch" else ""
                return f"{what}{required}, and this is {what}{available}"
        missing = [name for name in other.instructions if name not in self.instructions]
        if missing:
            return f"a processor with {', '.join(missing)}, which this one lacks"
        if not other.instructions and other.capability != self.capability:
            return f"a processor with {other.capability}, and this one has {self.capability}"
        return None


def _instructions() -> tuple[str, ...]:
    """The sets of instructions that Linux lists; what torch itself asks for where there is no list."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted({flag for flag in flags.split() if flag.startswith(FAMILIES)}))
    return ()
