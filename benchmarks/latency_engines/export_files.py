"""The float UNet as ONNX and OpenVINO IR, written in an environment of its own (torch, onnx, onnxscript, openvino).

.peers/export/bin/python benchmarks/latency_engines/export_files.py runs/latency/cifar
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["write"]

#: Protocol buffers end at 2 GiB; larger models have their weights in a file beside.
ONNX_LIMIT = 1 << 30


def write(folder: Path) -> None:
    """Write ``float.onnx`` and ``float.xml`` beside ``model.pt2``, both with a symbolic batch.

    Args:
        folder: Of the UNet.
    """
    import openvino

    file = folder / "model.pt2"
    program = torch.export.load(file)
    if not (folder / "float.xml").is_file():
        openvino.save_model(openvino.convert_model(program), folder / "float.xml", compress_to_fp16=False)
    if not (folder / "float.onnx").is_file():
        exported = torch.onnx.export(program, dynamo=True)
        exported.save(folder / "float.onnx", external_data=file.stat().st_size > ONNX_LIMIT)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
