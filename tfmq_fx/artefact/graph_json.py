"""The graph as JSON in torch.export's own schema, and the checks that make it safe to read back.

torch's deserializer resolves operator names by attribute look-up and parses size expressions, both of
which would run code from a hostile file; so every name and expression is checked against what a
quantized denoiser can contain before it gets there.
"""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from tfmq_fx._compat import exported_from_dict, exported_to_json
from tfmq_fx.artefact.output_classes import import_output_classes
from tfmq_fx.errors import ArtefactError

__all__ = ["graph_from_bytes", "graph_to_bytes"]

OPERATOR = re.compile(r"torch\.ops\.(aten|prims|quantized_decomposed|tfmq_fx)\.\w+(\.\w+)?")
PYTHON_OPERATOR = re.compile(r"(_operator\.\w+|math\.\w+|torch\.sym_\w+)")
SIZE_NAMES = (
    "Symbol|positive|nonnegative|integer|True|False|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv"
    "|int_oo|oo|[su]\\d+"
)
EXPRESSION = re.compile(rf"[\s\d+\-*/(),.='<>]|\b({SIZE_NAMES})\b")
#: Metadata that only helps to debug the export; it would be most of the file, and holds local paths.
DEBUG_METADATA = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")


def graph_to_bytes(program: ExportedProgram) -> bytes:
    """Serialize the graph of an exported program (without tensors) to gzipped JSON."""
    for node in program.graph.nodes:
        for key in DEBUG_METADATA:
            node.meta.pop(key, None)
    # A fixed time stamp: the same program gives the same bytes.
    return gzip.compress(exported_to_json(program).encode(), mtime=0)


def graph_from_bytes(data: bytes, tensors: dict[str, Tensor]) -> ExportedProgram:
    """Rebuild the exported program from :func:`graph_to_bytes` and its tensors.

    Raises:
        ArtefactError: The graph is not readable, or holds an operator that no denoiser contains.
    """
    try:
        values = json.loads(gzip.decompress(data))
    except (OSError, EOFError, ValueError) as error:
        msg = f"the graph of the artefact cannot be read ({error}); save the program again"
        raise ArtefactError(msg) from error
    _check(values)
    _register_outputs(values)
    try:
        return exported_from_dict(values, tensors)
    except Exception as error:
        msg = f"the graph of the artefact does not fit this torch ({type(error).__name__}: {error}); save it again"
        raise ArtefactError(msg) from error


def _check(values: Any) -> None:
    """Walk the JSON; refuse unknown operators and expressions."""
    if isinstance(values, dict):
        target = values.get("target")
        if isinstance(target, str) and "inputs" in values:
            _check_operator(target)
        for key, value in values.items():
            if key == "expr_str" and isinstance(value, str):
                _check_expression(value)
            if key == "range_constraints" and isinstance(value, dict):
                for symbol in value:
                    _check_expression(symbol)
            _check(value)
    elif isinstance(values, list):
        for value in values:
            _check(value)


def _register_outputs(values: Any) -> None:
    """Import the diffusers modules whose output classes the graph returns; importing registers them."""
    for entry in values["graph_module"]["module_call_graph"]:
        signature = entry.get("signature") or {}
        for spec in (signature.get("in_spec", ""), signature.get("out_spec", "")):
            import_output_classes(spec)


def _check_operator(target: str) -> None:
    if not (OPERATOR.fullmatch(target) or PYTHON_OPERATOR.fullmatch(target)):
        msg = f"the artefact's graph calls {target!r}, which no quantized denoiser contains; do not trust this file"
        raise ArtefactError(msg)


def _check_expression(expression: str) -> None:
    if EXPRESSION.sub("", expression):
        msg = f"the artefact's graph holds the size expression {expression[:60]!r}, which is not one; do not trust it"
        raise ArtefactError(msg)
