"""What stands beside the timestep on a time path: listed values, such as class labels, or conditionings of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch, bind_batch
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.tensors import contiguous
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_values import distinct_timesteps

__all__ = ["Conditionings", "FiniteInputs", "as_finite", "collect_conditionings", "finite_values"]

#: Names of inputs, a string being one, or their values by name.
FiniteInputs = Collection[str] | Mapping[str, Tensor | Iterable[float]]


def as_finite(finite: Any) -> FiniteInputs:
    """What a user gave as finite inputs, as a tuple of names or a mapping.

    Raises:
        ConfigError: It is something else.
    """
    names = (finite,) if isinstance(finite, str) else finite
    if not isinstance(names, Collection) or isinstance(names, Tensor) or not all(isinstance(n, str) for n in names):
        msg = f"finite={finite!r} must be names of inputs, such as ('class_labels',), or values by name"
        raise ConfigError(msg)
    return names if isinstance(names, Mapping) else tuple(names)


def finite_values(graph_module: fx.GraphModule, finite: FiniteInputs) -> dict[str, Tensor]:
    """The values of each finite input, float64 ``[P]``; of an input that is named alone, all indices of its embedding.

    Args:
        graph_module: A captured graph.
        finite: Names, or values by name.

    Raises:
        ConfigError: There is no such input, or it is named alone and indexes no embedding.
    """
    inputs = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
    values_by_name = {}
    for name in finite:
        if name not in inputs:
            msg = f"finite={name!r} is no input of the model; its inputs are {', '.join(inputs)}"
            raise ConfigError(msg)
        listed = finite[name] if isinstance(finite, Mapping) else None
        indices = _embedding_indices(inputs[name])
        values = indices if listed is None else _as_tensor(listed, name)
        if values is None or len(values) == 0:
            msg = f"the values of the finite input {name!r} are not known: give them as finite={{{name!r}: [...]}}"
            raise ConfigError(msg)
        values_by_name[name] = distinct_timesteps(values)
        if indices is not None:
            _check_indices(values_by_name[name], len(indices), name)
    return values_by_name


def _as_tensor(values: Tensor | Iterable[float], name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        msg = f"the values of the finite input {name!r} must be numbers, such as range(10), not {values!r}"
        raise ConfigError(msg) from error


def _check_indices(values: Tensor, count: int, name: str) -> None:
    """Refuse values of an input that its embedding has no row for."""
    outside = (values < 0) | (values >= count) | (values != values.round())
    if bool(outside.any()):
        msg = (
            f"finite={{{name!r}: ...}} lists {float(values[outside][0]):g}, but {name!r} indexes an embedding of "
            f"{count} rows: list whole numbers from 0 to {count - 1}"
        )
        raise ConfigError(msg)


def _embedding_indices(placeholder: fx.Node) -> Tensor | None:
    """Every index of the embedding that reads an input, or None when nothing looks it up."""
    for user in placeholder.users:
        if is_call(user, torch.ops.aten.embedding.default) and user.args[1] is placeholder:
            weight = user.args[0]
            assert isinstance(weight, fx.Node)
            return torch.arange(int(node_value(weight).shape[0]))
    return None


@dataclass
class Conditionings:
    """Distinct conditionings of calibration batches, in the order in which they were seen.

    Attributes:
        names: Names of the inputs.
        values: One tuple for each conditioning, ``[...]`` without the batch's axis, in the order of ``names``.
    """

    names: tuple[str, ...]
    values: list[tuple[Tensor, ...]] = field(default_factory=list)
    _digests: set[bytes] = field(default_factory=set, repr=False)

    def add(self, graph_module: fx.GraphModule, call: Call) -> None:
        """Take those of a calibration batch of the graph."""
        placeholders = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = dict(zip(placeholders, call.leaves, strict=True))
        for item in zip(*(leaves[name] for name in self.names), strict=True):
            key = _digest(item)
            if key not in self._digests:
                self._digests.add(key)
                self.values.append(tuple(value.detach().clone() for value in item))


def collect_conditionings(
    graph_module: fx.GraphModule, names: Sequence[str], batches: Iterable[Batch], timestep: str = "timestep"
) -> Conditionings:
    """The distinct conditionings of calibration batches.

    Args:
        graph_module: The graph that the batches are for.
        names: Names of the conditioning inputs.
        batches: The model's own inputs.
        timestep: Name of the timestep input.

    Raises:
        CalibrationError: A batch does not fit the graph.
    """
    conditionings, interface = Conditionings(tuple(names)), interface_of(graph_module)
    for index, batch in enumerate(batches):
        conditionings.add(graph_module, bind_batch(interface, index, batch, timestep))
    return conditionings


def _digest(conditioning: Sequence[Tensor]) -> bytes:
    """A hash of the bits of a conditioning."""
    state = hashlib.blake2b(digest_size=16)
    for value in conditioning:
        state.update(contiguous(value.cpu()).reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.digest()
