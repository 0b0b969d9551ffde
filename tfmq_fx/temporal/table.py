"""Temporal features as a table: the float block's, or layer by layer the closer of float and quantized.

Source: the cached temporal features of TFMQ-DM's extension (arXiv 2407.19547).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.fake_quantizers import quantizers_of
from tfmq_fx.passes import CompressTemporalTable, IndexTimesteps, TabulateTemporalBlock
from tfmq_fx.passes.precision.compress_temporal_table import (
    feature_columns,
    find_feature_tables,
    half_rows,
    quantize_rows,
)
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.temporal.tabulate_temporal_block import LAYER
from tfmq_fx.temporal.domain import TemporalDomain

__all__ = ["TemporalChoice", "float_table", "store_table", "stored_rows", "tabulate"]


@dataclass(frozen=True)
class TemporalChoice:
    """Which rows of a temporal feature are in the table, and how far both candidates are from the float feature.

    Attributes:
        layer: The embedding layer behind the feature.
        kept: ``"cached"``, the rows of the float block; or ``"quantized"``, those of the quantized block.
        cached_error: Relative error of the float rows, stored as the table is, over all timesteps.
        quantized_error: The same of the quantized block's rows.
    """

    layer: str
    kept: Literal["cached", "quantized"]
    cached_error: float
    quantized_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        errors = f"cached {self.cached_error:.2e}, quantized {self.quantized_error:.2e}"
        return f"{self.layer}: {self.kept} rows (error {errors})"


def float_table(prepared: fx.GraphModule, timestep: str = "timestep") -> fx.GraphModule:
    """A copy of a prepared graph in which the float temporal block is a table; reconstruction changes nothing in it."""
    graph_module = copy.deepcopy(prepared)
    for quantizer in quantizers_of(graph_module).values():
        quantizer.enabled = False
    TabulateTemporalBlock(timestep=timestep)(graph_module)
    return graph_module


def tabulate(
    graph_module: fx.GraphModule,
    domain: TemporalDomain,
    config: QuantizationConfig,
    original: fx.GraphModule | None = None,
) -> list[TemporalChoice]:
    """Replace the temporal block of a graph by a table with a row for each entry of a finite domain, in place.

    Args:
        graph_module: A converted graph; with ``temporal="cache"`` its block is float. If it has a row already, that
            row's domain is the one that counts.
        domain: The timesteps, and the values of the further inputs that the block depends on.
        config: Says what to store and how.
        original: For ``temporal="auto"``, a graph whose table holds the float features.

    Returns:
        With ``temporal="auto"``, what was chosen for every feature.

    Raises:
        ConfigError: ``temporal="auto"`` without ``original``.
    """
    timestep = domain.timestep
    further = {name: domain.values[name] for name in domain.further}
    IndexTimesteps(domain.values[timestep], timestep=timestep, unknown=config.lookup, finite=further)(graph_module)
    TabulateTemporalBlock(timestep=timestep)(graph_module)
    choices: list[TemporalChoice] = []
    if config.temporal == "auto":
        if original is None:
            msg = "temporal='auto' compares with the float block, which is gone here: convert with tfmq_fx.convert"
            raise ConfigError(msg)
        choices = _use_closer_rows(graph_module, original, config.resolved_table)
    store_table(graph_module, config)
    return choices


def store_table(graph_module: fx.GraphModule, config: QuantizationConfig) -> None:
    """Store the tables of a graph as the configuration says, in place."""
    if config.resolved_table != "float32":
        CompressTemporalTable(config.resolved_table)(graph_module)


def stored_rows(rows: Tensor, storage: str) -> Tensor:
    """What a table gives back of ``rows``, ``[K, C]``."""
    if storage == "int8":
        integers, scale, zero = quantize_rows(rows)
        return (integers.float() - zero[:, None].float()) * scale[:, None]
    if storage == "float16":
        halves, factor = half_rows(rows)
        return halves.float() * factor
    return rows


@torch.no_grad()
def _use_closer_rows(converted: fx.GraphModule, original: fx.GraphModule, storage: str) -> list[TemporalChoice]:
    """Put the float rows of a feature where, stored alike, they are closer to float than the quantized block's."""
    choices = []
    for gather, original_gather in zip(find_feature_tables(converted), find_feature_tables(original), strict=True):
        table, reference = _gathered_tensor(converted, gather), _gathered_tensor(original, original_gather)
        for piece in gather.users:
            columns = slice(*feature_columns(piece))
            expected = reference[:, columns]
            size = expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
            cached, quantized = (
                float((stored_rows(rows, storage) - expected).double().norm() / size)
                for rows in (expected, table[:, columns])
            )
            if cached < quantized:
                table[:, columns] = expected
            kept: Literal["cached", "quantized"] = "cached" if cached < quantized else "quantized"
            choices.append(TemporalChoice(piece.meta.get(LAYER, ""), kept, cached, quantized))
    return choices


def _gathered_tensor(graph_module: fx.GraphModule, gather: fx.Node) -> Tensor:
    """The table that a node looks rows up in."""
    table = gather.args[0]
    assert isinstance(table, fx.Node)
    tensor = read_attribute(graph_module, str(table.target))
    assert isinstance(tensor, Tensor)
    return tensor
