"""A temporal program as data: its graph and tensors, as an artefact has them, and how they go together."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn

from tfmq_fx.artefact.fields import checked, fields_of, identifier, items, whole
from tfmq_fx.artefact.graph_json import MOST_GRAPH_BYTES, graph_from_bytes, graph_to_json
from tfmq_fx.artefact.layout import GRAPH, TENSORS
from tfmq_fx.artefact.tensor_file import read_tensors
from tfmq_fx.config.choices import TableStorage, UnknownTimestep
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.examples import example_arguments
from tfmq_fx.frontend.graph_export import export_graph
from tfmq_fx.passes.analysis import row_columns, row_inputs
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.temporal.program import TemporalProgram
from tfmq_fx.temporal.rest_inputs import TemporalInput
from tfmq_fx.temporal.time_graph import outputs_of

__all__ = ["MOST_FILE_BYTES", "StoredTemporalProgram", "store_temporal_program"]

#: Of each of its files; the temporal blocks of the largest models have some 200 MB of integers.
MOST_FILE_BYTES = 2**32
MOST_NAMES, MOST_OUTPUTS = 64, 100_000
STORAGES = ("float32", "float16", "int8")
FILES = (GRAPH, TENSORS)


@dataclass(frozen=True)
class StoredTemporalProgram:
    """What is said of a temporal program beside its files.

    Attributes:
        names: Names of its inputs, the timestep first.
        layers: For each output, the name of the layer that it comes from.
        inputs: What it computes for the rest of the denoiser.
        storage: How precisely features are kept.
        parameters: Names of the tensors that are parameters.
        expanded: Bytes of the graph before compression.
        digests: SHA-256 of each file, by its name.
        sizes: Bytes of each file, by its name.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: tuple[TemporalInput, ...]
    storage: TableStorage
    parameters: tuple[str, ...]
    expanded: int
    digests: Mapping[str, str]
    sizes: Mapping[str, int]

    @classmethod
    def from_json(cls, value: Any) -> StoredTemporalProgram:
        """Check every field.

        Raises:
            ArtefactError: A field is wrong; the message names it.
        """
        what = "the temporal program"
        fields = fields_of(checked(value, dict, what), tuple(cls.__dataclass_fields__), what)
        layers = [checked(layer, str, "a layer") for layer in items(fields["layers"], "'layers'", MOST_OUTPUTS)]
        files = {}
        for name in ("digests", "sizes"):
            files[name] = fields_of(checked(fields[name], dict, f"'{name}'"), FILES, f"'{name}' of {what}")
        if fields["storage"] not in STORAGES:
            msg = f"'storage' of {what} is none of {', '.join(STORAGES)}; compile the package again"
            raise ArtefactError(msg)
        return cls(
            names=_identifiers(fields["names"], "'names'", MOST_NAMES),
            layers=tuple(layers),
            inputs=tuple(_input(entry, len(layers)) for entry in items(fields["inputs"], "'inputs'", MOST_NAMES)),
            storage=fields["storage"],
            parameters=tuple(checked(n, str, "'parameters'") for n in items(fields["parameters"], "'parameters'")),
            expanded=whole(fields["expanded"], "'expanded'", 0, MOST_GRAPH_BYTES),
            digests={name: checked(files["digests"][name], str, "a digest") for name in FILES},
            sizes={name: whole(files["sizes"][name], "a size", 0, MOST_FILE_BYTES) for name in FILES},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_json` takes them."""
        inputs = [{"name": e.name, "outputs": list(e.outputs), "matrix": e.matrix} for e in self.inputs]
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {name: list(values[name]) for name in ("names", "layers", "parameters")}
        return {**values, **lists, "inputs": inputs, "digests": dict(self.digests), "sizes": dict(self.sizes)}

    def load(
        self, files: Mapping[str, bytearray], timesteps: Tensor | None, unknown: UnknownTimestep
    ) -> TemporalProgram:
        """The program.

        Args:
            files: The content of each file, by its name.
            timesteps: The timesteps that it was made for, float64 ``[K]``.
            unknown: What another timestep does.

        Raises:
            ArtefactError: A file was changed, or is not the graph of a temporal program.
        """
        for name in FILES:
            if len(files[name]) != self.sizes[name] or hashlib.sha256(files[name]).hexdigest() != self.digests[name]:
                msg = f"{name} of the temporal program is truncated or was changed: its checksum differs"
                raise ArtefactError(msg)
        tensors = read_tensors(files[TENSORS], f"{TENSORS} of the temporal program")
        for name in self.parameters:
            if name not in tensors or not tensors[name].is_floating_point():
                msg = f"'parameters' of the temporal program names {name!r}, which is no weight"
                raise ArtefactError(msg)
            tensors[name] = nn.Parameter(tensors[name], requires_grad=False)
        time = graph_from_bytes(bytes(files[GRAPH]), self.expanded, tensors)
        self._check_graph(time)
        return TemporalProgram(
            time, self.names, self.layers, self.inputs, timesteps=timesteps, unknown=unknown, storage=self.storage
        )

    def _check_graph(self, time: fx.GraphModule) -> None:
        inputs = {str(node.target): node_value(node) for node in time.graph.nodes if node.op == "placeholder"}
        outputs = outputs_of(time)
        fits = (
            all(isinstance(inputs.get(name), Tensor) for name in self.names)
            and len(outputs) == len(self.layers)
            and all(isinstance(node, fx.Node) and isinstance(node_value(node), Tensor) for node in outputs)
            and tuple(row_columns(time)) in ((), self.names)
        )
        if not fits:
            msg = "the graph of the temporal program does not fit what is said of its inputs and outputs"
            raise ArtefactError(msg)


@torch.no_grad()
def store_temporal_program(program: TemporalProgram) -> tuple[StoredTemporalProgram, dict[str, bytes]]:
    """The data of a temporal program: what is said of it, and the content of its files by their names."""
    indexed = {} if program.timesteps is None else {program.names[0]: program.timesteps}
    indexed.update(row_inputs(program.time))
    args, kwargs = example_arguments(program.time, indexed)
    exported = export_graph(program.time, args, kwargs, None)
    graph = graph_to_json(exported)
    tensors = {name: value.detach().contiguous().clone() for name, value in _state(exported).items()}
    files = {GRAPH: gzip.compress(graph, mtime=0), TENSORS: save(tensors)}
    stored = StoredTemporalProgram(
        names=program.names,
        layers=program.layers,
        inputs=program.inputs,
        storage=program.storage,
        parameters=tuple(name for name, value in exported.state_dict.items() if isinstance(value, nn.Parameter)),
        expanded=len(graph),
        digests={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        sizes={name: len(data) for name, data in files.items()},
    )
    return stored, files


def _state(exported: torch.export.ExportedProgram) -> dict[str, Tensor]:
    state: dict[str, Any] = {**exported.state_dict, **exported.constants}
    return state


def _identifiers(value: Any, what: str, most: int) -> tuple[str, ...]:
    names = tuple(identifier(name, f"a name in {what}") for name in items(value, what, most))
    if not names:
        msg = f"{what} of the temporal program is empty; compile the package again"
        raise ArtefactError(msg)
    return names


def _input(value: Any, count: int) -> TemporalInput:
    fields = fields_of(checked(value, dict, "an input"), ("name", "outputs", "matrix"), "an input of the rest")
    outputs = tuple(whole(n, "'outputs'", 0, count - 1) for n in items(fields["outputs"], "'outputs'", MOST_OUTPUTS))
    matrix = checked(fields["matrix"], bool, "'matrix'")
    if not outputs or (not matrix and len(outputs) != 1):
        msg = "an input of the rest has no output of the temporal program, or several that are no matrix"
        raise ArtefactError(msg)
    return TemporalInput(identifier(fields["name"], "a name in 'inputs'"), outputs, matrix)
