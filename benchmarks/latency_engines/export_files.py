"""The float UNet as ONNX and OpenVINO IR, written in an environment of its own (torch, onnx, onnxscript, openvino).

.peers/export/bin/python benchmarks/latency_engines/export_files.py runs/latency/cifar openvino onnxruntime
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import torch

__all__ = ["write"]

#: Protocol buffers end at 2 GiB; larger models have their weights in a file beside.
ONNX_LIMIT = 1 << 30


def write(folder: Path, engines: Collection[str]) -> None:
    """Write ``float.xml`` and ``float.onnx`` beside ``model.pt2``, both with a symbolic batch.

    Args:
        folder: Of the UNet.
        engines: ``"openvino"`` for the first, ``"onnxruntime"`` for the second.
    """
    file = folder / "model.pt2"
    program = torch.export.load(file)
    if "openvino" in engines and not (folder / "float.xml").is_file():
        import openvino

        openvino.save_model(openvino.convert_model(program), folder / "float.xml", compress_to_fp16=False)
    if "onnxruntime" in engines and not (folder / "float.onnx").is_file():
        exported = torch.onnx.export(program, dynamo=True)
        exported.save(folder / "float.onnx", external_data=file.stat().st_size > ONNX_LIMIT)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
