"""torch.export's JSON schema: exported programs to it and from it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import (
    _SERIALIZE_TO_TORCH_DTYPE,
    EnumEncoder,
    ExportedProgramDeserializer,
    ExportedProgramSerializer,
    _dataclass_to_dict,
)
from torch.export import ExportedProgram

__all__ = ["export_schema", "exported_from_schema", "exported_to_json", "serialized_dtypes"]

#: The objects of torch.export's JSON schema.
export_schema: Any = schema


def exported_to_json(program: ExportedProgram) -> str:
    """The graph of an exported program in torch.export's JSON schema, without its tensors."""
    serialized = ExportedProgramSerializer().serialize(program)
    plain = _dataclass_to_dict(serialized.exported_program)  # type: ignore[no-untyped-call]  # torch gives it no types
    return json.dumps(plain, cls=EnumEncoder)


def exported_from_schema(program: Any, tensors: dict[str, Tensor], constants: dict[str, Tensor]) -> ExportedProgram:
    """Rebuild an exported program from objects of :data:`export_schema` and its tensors; nothing is unpickled."""
    deserializer = ExportedProgramDeserializer()
    rebuilt: ExportedProgram = deserializer.deserialize(program, tensors, constants, None)
    return rebuilt


def serialized_dtypes() -> dict[int, torch.dtype]:
    """The dtypes by their number in torch.export's JSON schema."""
    return dict(_SERIALIZE_TO_TORCH_DTYPE)
