"""Inputs beside the timestep that come from a finite set: class labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, fx

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps

__all__ = ["FiniteInputs", "finite_values"]

#: Names of inputs, or their values by name.
FiniteInputs = Collection[str] | Mapping[str, Tensor | Iterable[float]]


def finite_values(graph_module: fx.GraphModule, finite: FiniteInputs) -> dict[str, Tensor]:
    """The values of each finite input, float64 ``[K]``; of an input that is named alone, all rows of its embedding.

    Args:
        graph_module: A captured graph.
        finite: Names, or values by name.

    Raises:
        ConfigError: There is no such input, or it is named alone and indexes no embedding.
    """
    inputs = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
    found = {}
    for name in finite:
        if name not in inputs:
            msg = f"finite={name!r} is no input of the model; its inputs are {', '.join(inputs)}"
            raise ConfigError(msg)
        given = finite[name] if isinstance(finite, Mapping) else None
        values = _embedding_rows(inputs[name]) if given is None else _listed(given)
        if values is None or len(values) == 0:
            msg = f"the values of the finite input {name!r} are not known: give them as finite={{{name!r}: [...]}}"
            raise ConfigError(msg)
        found[name] = distinct_timesteps(values)
    return found


def _listed(values: Tensor | Iterable[float]) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor([float(value) for value in values])


def _embedding_rows(placeholder: fx.Node) -> Tensor | None:
    """Every index of the embedding that reads an input, or None when nothing looks it up."""
    for user in placeholder.users:
        if is_call(user, torch.ops.aten.embedding.default) and user.args[1] is placeholder:
            weight = user.args[0]
            assert isinstance(weight, fx.Node)
            return torch.arange(int(node_value(weight).shape[0]))
    return None
