"""What each layer takes in an artefact, at each of its widths."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from tfmq_fx.artefact.packing import needed_bits
from tfmq_fx.artefact.save import save
from tfmq_fx.config.bits import FLOAT_BITS
from tfmq_fx.observers import GroupedObserver, TimestepObserver
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.search.layers import Operand, SearchLayer
from tfmq_fx.search.operand_quantizers import OperandQuantizers

__all__ = ["artefact_bytes", "entry_bytes", "float_bytes", "layer_bytes"]

#: A scale (float32) and a zero point (int64), of an output channel or a row of a table.
PARAMETERS = 4 + 8
#: What the file's header and the manifest say of a packed weight beside its name, which they say three times.
ENTRY = 256


@torch.no_grad()
def layer_bytes(layers: Sequence[SearchLayer], quantizers: OperandQuantizers) -> list[Tensor]:
    """The bytes that each layer brings along, per layer int64 ``[options]``.

    Those are its weights as the artefact stores them, integers packed to the width that they need, with their
    parameters; and the tables of activations that no other layer reads. A table that several layers read is there at
    any of their widths, and counted nowhere. Tensors are counted to the byte, what is written about them (a packed
    weight takes more words, a float one fewer) such that the sum is rather too large.
    """
    readers: dict[fx.Node, set[str]] = {}
    for layer in layers:
        for operand in layer.operands:
            readers.setdefault(operand.observed, set()).add(layer.name)
    found = []
    for layer in layers:
        alone = {o.observed: o for o in layer.operands if not o.is_weight and len(readers[o.observed]) == 1}
        tables = sum(_table_bytes(operand) for operand in alone.values())
        sizes = [
            sum(_weight_bytes(operand, quantizers, widths.weight_bits) for operand in layer.weights)
            + (0 if widths.activation_bits == FLOAT_BITS else tables)
            for widths in layer.options
        ]
        found.append(torch.tensor(sizes, dtype=torch.int64))
    return found


def _weight_bytes(operand: Operand, quantizers: OperandQuantizers, bits: int) -> int:
    if bits == FLOAT_BITS:
        return int(quantizers.weight_of(operand).nbytes)
    integers, scale = quantizers.weight(operand, bits).quantize()
    parameters = PARAMETERS * len(scale)
    packed = needed_bits(integers)
    if packed == 8:
        return integers.nbytes + parameters
    return math.ceil(integers.numel() * packed / 8) + len(integers) + parameters + entry_bytes(operand)


def entry_bytes(operand: Operand) -> int:
    """What a packed weight adds to the words about tensors, at most."""
    return ENTRY + 3 * len(str(operand.observed.args[0]))


def _table_bytes(operand: Operand) -> int:
    observer = operand.observer
    return PARAMETERS * len(observer.low) if isinstance(observer, (GroupedObserver, TimestepObserver)) else 0


def artefact_bytes(program: QuantizedProgram) -> int:
    """The bytes of a program's artefact: it is saved to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save(program, Path(folder) / "artefact")
        return sum(file.stat().st_size for file in saved.iterdir())


def float_bytes(program: fx.GraphModule) -> int:
    """The bytes of a captured model's parameters and buffers in float32."""
    return sum(4 * value.numel() for value in program.state_dict().values())
