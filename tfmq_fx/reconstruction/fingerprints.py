"""What decides the outcome of a reconstruction, part by part, so that kept state is taken up by the same run alone."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import torch

from tfmq_fx.reconstruction.checkpoint import fingerprint
from tfmq_fx.reconstruction.code_digest import code_digest
from tfmq_fx.reconstruction.run import ReconstructionRun
from tfmq_fx.reconstruction.samples import Samples

__all__ = ["run_fingerprints"]


def run_fingerprints(run: ReconstructionRun, samples: Samples | None) -> dict[str, str]:
    """A hash of each part, by its name.

    Args:
        run: The run, before it goes.
        samples: The calibration samples that it takes.
    """
    state, conditional = run.state, run.time_path.conditional
    quantization = {key: value for key, value in state.config.to_dict().items() if key != "reconstruction"}
    units = [node.meta["tfmq_fx.unit"] for node in run.units]
    versions = [torch.__version__, version("torchao"), torch.backends.cpu.get_cpu_capability()]
    conditionings = [] if conditional is None else list(conditional.domain.values.values())
    return {
        "configuration": fingerprint([dataclasses.asdict(run.config), quantization]),
        "timesteps": fingerprint(state.timesteps),
        "units": fingerprint(units),
        "code": fingerprint(code_digest()),
        "libraries or processor": fingerprint(versions),
        "weights or ranges": fingerprint(None, run.prepared.state_dict().values()),
        "calibration data": fingerprint(None, [*conditionings, *([] if samples is None else samples.tensors())]),
    }
