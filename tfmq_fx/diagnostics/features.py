r"""Temporal feature error: what the embedding layers say at each timestep, before and after quantization.

For the output ``emb_{t,i} = g_i(h(t))`` of embedding layer ``i`` and its quantized version there are two measures, the
paper's temporal feature error and the relative feature error, which is ours:

.. math:: \cos(emb_{t,i}, \widehat{emb}_{t,i}) \qquad
          \lVert emb_{t,i} - \widehat{emb}_{t,i} \rVert / \lVert emb_{t,i} \rVert

TFMQ-DM (CVPR 2024, section 4) shows the cosine for one layer of Stable Diffusion; here it is every layer. A cosine is 1
without any error, and does not see lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.diagnostics.json_values import number, numbers, tensor
from tfmq_fx.diagnostics.vectors import cosine_of_chord, ratio, unit
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.passes.analysis import TemporalBlock, evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.support.predicates import fqn
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.quantization.add_timesteps import add_timesteps
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = [
    "TemporalFeatureError",
    "TemporalFeatures",
    "align_features",
    "temporal_feature_error",
    "temporal_features",
    "temporal_layers",
]


@dataclass(frozen=True, eq=False)
class TemporalFeatures:
    """What the embedding layers of one graph compute, timestep by timestep.

    Attributes:
        layers: Names of the layers; for a model that has only the time embed ``h``, its last linear.
        timesteps: The timesteps, float64 ``[T]``.
        values: Per layer ``[T, C_i]``, in the graph's own dtype, on the CPU.
    """

    layers: tuple[str, ...]
    timesteps: Tensor
    values: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class TemporalFeatureError:
    """How far the temporal features are from the float ones.

    Attributes:
        layers: Names of the ``L`` layers.
        timesteps: float64 ``[T]``.
        cosine: Cosine of the float and the quantized feature, float64 ``[T, L]``: the paper's temporal feature error.
        relative: Norm of their difference over the norm of the float one, float64 ``[T, L]``: the relative feature
            error.
        overall: The relative feature error over all timesteps and layers at once (Frobenius norms).
    """

    layers: tuple[str, ...]
    timesteps: Tensor
    cosine: Tensor
    relative: Tensor
    overall: float

    @property
    def mean_cosine(self) -> float:
        """The paper's temporal feature error, over all timesteps and layers."""
        return float(self.cosine.mean())

    @property
    def least_cosine(self) -> float:
        """The same of the feature that has turned the most."""
        return float(self.cosine.min())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layers": list(self.layers),
            "timesteps": numbers(self.timesteps),
            "cosine": numbers(self.cosine),
            "relative": numbers(self.relative),
            "overall": number(self.overall),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TemporalFeatureError:
        """The inverse of :meth:`to_dict`."""
        return cls(
            layers=tuple(values["layers"]),
            timesteps=tensor(values["timesteps"]),
            cosine=tensor(values["cosine"]),
            relative=tensor(values["relative"]),
            overall=float(values["overall"]),
        )


@in_plain_surroundings
@torch.no_grad()
def temporal_features(
    source: fx.GraphModule | QuantizedProgram,
    timesteps: Tensor | Iterable[float] | None = None,
    *,
    timestep: str = "timestep",
    fixed: Mapping[str, float] | None = None,
) -> TemporalFeatures:
    """Evaluate the embedding layers of a captured graph or a quantized program, without any image.

    Args:
        source: A captured float graph, or a quantized program whose temporal block is in its graph. A
            program that refuses timesteps outside its table gets rows for them first
            (:func:`tfmq_fx.add_timesteps`, on a copy), as if it had been quantized with them.
        timesteps: The values to evaluate, repeated ones once; by default those of the program's table.
        timestep: Name of the timestep input of a captured graph; a program knows its own.
        fixed: By name, the value at which a further finite input is held, e.g. ``{"class_labels": 3}``; by default
            the first of those that a program's table is indexed by.

    Raises:
        ConfigError: There is no temporal block, or there are no timesteps.

    Source: TFMQ-DM (CVPR 2024), section 4: the output of the temporal information block.
    """
    if isinstance(source, QuantizedProgram):
        timestep = source.timestep
        if timesteps is None:
            timesteps = source.timesteps
    values = distinct_timesteps(_as_sequence(timesteps))
    if len(values) == 0:
        msg = "there are no timesteps to evaluate the temporal features at; pass timesteps, e.g. scheduler.timesteps"
        raise ConfigError(msg)
    graph_module = source if isinstance(source, fx.GraphModule) else _program_serving(source, values).graph_module
    if fixed is None:
        finite = source.finite if isinstance(source, QuantizedProgram) else {}
        fixed = {name: float(allowed[0]) for name, allowed in finite.items()}
    block = find_temporal_block(graph_module, timestep, finite=tuple(fixed))
    if not block:
        msg = f"there are no temporal features: {block.reason}"
        raise ConfigError(msg)
    nodes = temporal_layers(block)
    fixed_columns = {name: torch.full_like(values, value) for name, value in fixed.items()}
    features = evaluate_temporal_nodes(graph_module, block.nodes, nodes, {timestep: values, **fixed_columns})
    return TemporalFeatures(tuple(fqn(node) for node in nodes), values, tuple(x.flatten(1).cpu() for x in features))


def temporal_layers(block: TemporalBlock) -> list[fx.Node]:
    """The linears of the embedding layers; for a block that is the time embed ``h`` alone, its last linear."""
    return [layer.linear for layer in block.embedding_layers] or list(block.time_embedding[-1:])


def _as_sequence(timesteps: Tensor | Iterable[float] | None) -> Any:
    return () if timesteps is None else timesteps if isinstance(timesteps, Tensor) else list(timesteps)


def _program_serving(program: QuantizedProgram, values: Tensor) -> QuantizedProgram:
    """The program, with rows for all ``values`` where it would refuse them."""
    if program.timesteps is None or program.config.unknown_timestep == "nearest":
        return program
    _, in_table = ValueSearch(program.timesteps).find(values)
    if bool(in_table.all()):
        return program
    return add_timesteps(program, values)


def align_features(features: TemporalFeatures, other: TemporalFeatures) -> TemporalFeatures:
    """``other`` with its layers in the order, and under the names, of ``features``.

    Layers are matched by name; where a rewrite changed the names, by their order in the block.

    Raises:
        ConfigError: The two have other timesteps, or their layers do not correspond: another model.
    """
    if not torch.equal(features.timesteps, other.timesteps):
        msg = "the two sets of temporal features are of different timesteps; evaluate both at the same ones"
        raise ConfigError(msg)
    values = other.values
    by_layer = dict(zip(other.layers, other.values, strict=True))
    if set(by_layer) == set(features.layers) and len(by_layer) == len(other.layers):
        values = tuple(by_layer[layer] for layer in features.layers)
    widths, other_widths = ([x.shape[1] for x in v] for v in (features.values, values))
    if widths != other_widths:
        msg = (
            f"the embedding layers differ, so this is another model: {len(widths)} of widths {_brief(widths)} "
            f"against {len(other_widths)} of widths {_brief(other_widths)}"
        )
        raise ConfigError(msg)
    return TemporalFeatures(features.layers, other.timesteps, values)


def _brief(widths: list[int]) -> str:
    return ", ".join(map(str, widths[:8])) + (" …" if len(widths) > 8 else "")


@in_plain_surroundings
def temporal_feature_error(features: TemporalFeatures, quantized: TemporalFeatures) -> TemporalFeatureError:
    """Compare two sets of temporal features, in float64: by the paper's cosine, and by the relative error.

    Args:
        features: Those of the float graph.
        quantized: Those of the quantized one at the same timesteps.

    Raises:
        ConfigError: They are not of the same model and timesteps (:func:`align_features`).

    Source: TFMQ-DM (CVPR 2024), section 4, "temporal feature error", which is the cosine; the relative error is ours.
    """
    quantized = align_features(features, quantized)
    cosines, relatives = [], []
    error_energy, energy = 0.0, 0.0
    for x, x_hat in zip(features.values, quantized.values, strict=True):
        x, x_hat = x.double(), x_hat.double()
        u, v = unit(x), unit(x_hat)
        cosine = cosine_of_chord(u, v, (u - v).norm(dim=1))
        cosines.append(torch.where((x == x_hat).all(dim=1), 1.0, cosine))
        error, norm = (x - x_hat).norm(dim=1), x.norm(dim=1)
        relatives.append(ratio(error, norm))
        error_energy += error.square().sum().item()
        energy += norm.square().sum().item()
    overall = ratio(torch.tensor(error_energy).sqrt(), torch.tensor(energy).sqrt()).item()
    return TemporalFeatureError(
        features.layers, features.timesteps, torch.stack(cosines, 1), torch.stack(relatives, 1), overall
    )
