"""Which layers a compiled OpenVINO model runs on integer kernels, read off its runtime graph."""

from __future__ import annotations

from typing import Any

import openvino as ov

__all__ = ["integer_layers"]

#: What the runtime graph calls the kernels that multiply.
MULTIPLYING = ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul", "GroupConvolution")
#: What it calls a loop that was made for several operators: attention is one, both of its products in it.
FUSED = "Subgraph"
INTEGERS = ("i8", "u8")
#: How the names of primitives end that read integer weights and multiply floats.
FLOATS = ("_f32", "_bf16")


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def integer_layers(compiled: ov.CompiledModel) -> set[str]:
    """Names of the layers whose kernel reads integers, as the translator named them.

    The runtime graph gives each node its layer type, the precision that it runs in, and the names of all operators
    of the model that were fused into it.
    """
    integer: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        if _info(node, "runtimePrecision") not in INTEGERS:
            continue
        if _info(node, "primitiveType").endswith(FLOATS):
            continue
        names = [node.get_friendly_name(), *_info(node, "originalLayersNames").split(",")]
        if _info(node, "layerType") in MULTIPLYING:
            # What the transformations derive from an operator has its name with a path behind.
            integer.update(name.split("/")[0] for name in names)
        elif _info(node, "layerType") == FUSED:
            integer.update(names)
    return integer
