"""OpenVINO: the float model, and NNCF's post-training int8 of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latency_engines.engine import Arrays, Step

__all__ = ["files", "load", "prepare"]


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Quantize with NNCF on the common calibration inputs, row by row; ``"transformer"`` names its model type."""
    kind = settings["model"]
    if kind == "float" or _file(folder, kind).is_file():
        return
    import nncf
    import openvino

    model = openvino.Core().read_model(_file(folder, "float"))
    arrays = np.load(folder / "calibration.npz")
    names = _input_names(model, list(arrays))
    rows = [{names[k]: arrays[k][at : at + 1] for k in arrays} for at in range(len(arrays["sample"]))]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    openvino.save_model(quantized, _file(folder, kind), compress_to_fp16=False)


def load(folder: Path, settings: Mapping[str, Any], inputs: Arrays) -> Step:
    """Compile the model for the shapes of ``inputs``, for latency, with ``settings["precision"]`` as hint."""
    import openvino

    core = openvino.Core()
    model = core.read_model(_file(folder, settings["model"]))
    names = _input_names(model, list(inputs))
    model.reshape({names[name]: array.shape for name, array in inputs.items()})
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": settings["precision"],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        },
    )
    request = compiled.create_infer_request()

    def step(arrays: Arrays) -> np.ndarray:
        request.infer({names[name]: array for name, array in arrays.items()}, share_inputs=True)
        result: np.ndarray = request.get_output_tensor(0).data
        return result

    return step


def _input_names(model: Any, wanted: list[str]) -> dict[str, str]:
    """The model's input names by ours: an exported condition has a prefix."""
    found = [value.get_any_name() for value in model.inputs]
    return {name: next(n for n in found if n == name or n.endswith(f"_{name}")) for name in wanted}


def _file(folder: Path, kind: str) -> Path:
    return folder / ("float.xml" if kind == "float" else f"nncf-{kind}.xml")


def files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Graph and weights."""
    file = _file(folder, settings["model"])
    return [file, file.with_suffix(".bin")]
