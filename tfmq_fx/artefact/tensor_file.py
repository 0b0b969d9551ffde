"""Read the tensors of a safetensors file out of memory: no byte is read that its header does not account for."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from tfmq_fx.artefact.fields import checked, fields_of, items, parse_json, whole
from tfmq_fx.errors import ArtefactError

__all__ = ["DTYPES", "read_tensors"]

MOST_HEADER_BYTES = 2**25
MOST_AXES = 16
#: What safetensors calls the dtypes of an artefact.
CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip
#: The same, by the names that the manifest has.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES.values()}


def read_tensors(data: bytearray, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; they share the memory of ``data``, without a copy.

    Args:
        data: The file.
        what: What it is, for the message.

    Raises:
        ArtefactError: The header is none, or does not account for every byte of the file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MOST_HEADER_BYTES, len(data) - 8):
        _refuse(what, f"a header of {length} bytes in a file of {len(data)}")
    header: dict[str, Any] = checked(parse_json(bytes(data[8 : 8 + length]), what, MOST_HEADER_BYTES), dict, what)
    header.pop("__metadata__", None)
    start = end = 8 + length
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1], item[0])):
        first, last = _offsets(entry, name)
        code = checked(entry["dtype"], str, f"the dtype of {name!r}")
        shape = [whole(size, f"the shape of {name!r}", 0, 2**40) for size in items(entry["shape"], name, MOST_AXES)]
        dtype = CODES.get(code)
        if dtype is None or start + first != end or last - first != math.prod(shape) * dtype.itemsize:
            _refuse(what, f"tensor {name[:60]!r} of {code[:20]} and {shape} at bytes {first} to {last}")
        end = start + last
        if end > len(data) or (start + first) % dtype.itemsize:
            _refuse(what, f"tensor {name[:60]!r} at bytes {first} to {last}, where none is")
        if last == first:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            count = (last - first) // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first)
            tensors[name] = flat.reshape(shape)
    if end != len(data):
        _refuse(what, f"{len(data) - end} bytes after the last tensor")
    return tensors


def _offsets(entry: Any, name: str) -> tuple[int, int]:
    fields = fields_of(entry, ("dtype", "shape", "data_offsets"), f"the header of tensor {name[:60]!r}")
    offsets = items(fields["data_offsets"], name, 2)
    if len(offsets) != 2:
        _refuse(name, "no two offsets")
    first, last = (whole(offset, f"an offset of {name[:60]!r}", 0, 2**48) for offset in offsets)
    return first, last


def _refuse(what: str, problem: str) -> NoReturn:
    msg = f"{what} cannot be read ({problem}); copy or save it again"
    raise ArtefactError(msg)
