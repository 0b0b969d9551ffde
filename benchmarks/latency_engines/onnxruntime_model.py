"""ONNX Runtime: the float model, and its static int8 in QDQ form."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latency_engines.engine import Arrays, Step

__all__ = ["files", "load", "prepare"]


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Quantize statically on the common calibration inputs: per-channel int8 weights, int8 or uint8 activations."""
    kind = settings["model"]
    target = _file(folder, kind)
    if kind == "float" or target.is_file():
        return
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Rows(CalibrationDataReader):
        def __init__(self, names: dict[str, str]) -> None:
            arrays = dict(np.load(folder / "calibration.npz"))
            count = len(arrays["sample"])
            rows = ({names[k]: v[at : at + 1] for k, v in arrays.items()} for at in range(count))
            self._rows: Iterator[dict[str, np.ndarray]] = iter(list(rows))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._rows, None)

    source, ready = _file(folder, "float"), folder / "preprocessed.onnx"
    large = source.with_name(source.name + ".data").is_file()
    if not ready.is_file():
        quant_pre_process(source, ready, skip_symbolic_shape=True, save_as_external_data=large)
    found = [value.name for value in onnx.load(source, load_external_data=False).graph.input]
    quantize_static(
        ready,
        target,
        Rows(_input_names(found)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        activation_type=QuantType.QUInt8 if kind == "qdq-u8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=large,
    )


def load(folder: Path, settings: Mapping[str, Any], inputs: Arrays) -> Step:
    """A session with every graph optimization and the batch of ``inputs`` fixed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", len(inputs["sample"]))
    session = onnxruntime.InferenceSession(_file(folder, settings["model"]), options, ["CPUExecutionProvider"])
    names = _input_names([value.name for value in session.get_inputs()])

    def step(arrays: Arrays) -> np.ndarray:
        (result,) = session.run(None, {names[name]: array for name, array in arrays.items()})
        array: np.ndarray = result
        return array

    return step


def _input_names(found: list[str]) -> dict[str, str]:
    """The model's input names by ours: an exported condition has a prefix."""
    return {name.removeprefix("conditions_"): name for name in found}


def _file(folder: Path, kind: str) -> Path:
    return folder / ("float.onnx" if kind == "float" else f"{kind}.onnx")


def files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The model, and its weights where they have a file of their own."""
    file = _file(folder, settings["model"])
    return [path for path in (file, file.with_name(file.name + ".data")) if path.is_file()]
