"""The temporal program: a timestep becomes features, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.config.choices import TableStorage, UnknownTimestep
from tfmq_fx.errors import ConfigError, TimestepError
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_values import ValueSearch, as_captured, distinct_timesteps, is_low
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups
from tfmq_fx.passes.temporal.widen_timesteps import integer_reader
from tfmq_fx.temporal.extend import describe_non_finite, evaluate_padded, find_row_quantizers, is_indexed_by_row
from tfmq_fx.temporal.rest_inputs import TemporalInput
from tfmq_fx.temporal.split import TemporalSplit
from tfmq_fx.temporal.table import stored_rows
from tfmq_fx.temporal.time_graph import outputs_of
from tfmq_fx.temporal.value_cache import ValueCache, join_items
from tfmq_fx.temporal.ways_out import in_program

__all__ = ["TemporalProgram"]

aten = torch.ops.aten
#: Memory for values that are kept: a thousand timesteps of Stable Diffusion take 80 MB.
CACHE_BYTES = 2**29

Key = tuple[float, ...]
Row = tuple[Tensor, ...]


class TemporalProgram:
    """Turns timesteps, and the values of further finite inputs, into what the rest of a denoiser needs to know of them.

    Values are computed at the first call with a timestep, by the quantized temporal block itself, and kept; the least
    recently used give way. A timestep of the table has its row's parameters. Another one gets its own, exact ones
    (:mod:`~tfmq_fx.temporal.extend`), and the timestep group of its nearest row. Several threads may call it.

    Args:
        time: The time graph (:func:`~tfmq_fx.temporal.split.split_temporal`).
        names: Names of its inputs: the timestep, then those from a finite set.
        layers: For each of its outputs, the name of the layer that it comes from.
        inputs: What it returns.
        timesteps: The timesteps that it was made for, float64 ``[K]``; None where none are known.
        unknown: What another timestep does.
        storage: How precisely features are kept: those of ``"int8"`` and ``"float16"`` are rounded as a table would be.
        most_bytes: Memory for the values.

    Attributes:
        computed: Rows that were computed so far.
    """

    def __init__(
        self,
        time: fx.GraphModule,
        names: Sequence[str],
        layers: Sequence[str],
        inputs: Sequence[TemporalInput],
        *,
        timesteps: Tensor | None,
        unknown: UnknownTimestep,
        storage: TableStorage = "float32",
        most_bytes: int = CACHE_BYTES,
    ) -> None:
        self.time, self.names, self.layers, self.inputs = time, tuple(names), tuple(layers), tuple(inputs)
        self.timesteps, self.unknown, self.storage = timesteps, unknown, storage
        self.computed = 0
        self._nodes, self._outputs = set(time.graph.nodes), outputs_of(time)
        self._quantizers = find_row_quantizers(time, self._nodes)
        self._search = None if timesteps is None else ValueSearch(timesteps)
        self._cache: ValueCache[Key] = ValueCache(most_bytes)

    @classmethod
    def of(
        cls,
        split: TemporalSplit,
        *,
        timesteps: Tensor | None,
        unknown: UnknownTimestep,
        storage: TableStorage = "float32",
    ) -> TemporalProgram:
        """The program of a graph that was split; arguments as for the class."""
        return cls(
            split.time, split.names, split.layers, split.inputs, timesteps=timesteps, unknown=unknown, storage=storage
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the timestep input."""
        placeholders = self.time.graph.find_nodes(op="placeholder")
        timestep = next(node for node in placeholders if node.target == self.names[0])
        dtype: torch.dtype = node_value(timestep).dtype
        return dtype

    @property
    def has_block(self) -> bool:
        """Whether it computes features; else the rows of its table are all that is left of the temporal block."""
        groups = {find_groups(self.time, name) for name in (GROUPS, EACH_TIMESTEP)}
        parameters = {node.args[place] for node in self._quantizers for place in (1, 2)}
        gathers = [node for node in self.time.graph.nodes if is_call(node, aten.index_select.default)]
        return not any(is_indexed_by_row(node) for node in gathers if node not in groups | parameters)

    def resolve(self, timestep: Tensor) -> Tensor:
        """Timesteps as the program has them: those of its table by value, others as they are.

        Args:
            timestep: Any shape and dtype, as they were given: a cast may round them.

        Returns:
            The same shape, in the dtype of the timestep input.

        Raises:
            TimestepError: One is unknown and ``unknown`` is ``"error"``, or it cannot be computed: it is no finite
                number, or fractional where the model takes integers, or the program has rows alone.
        """
        dtype = self.dtype
        values = timestep.to(dtype if is_low(dtype) else torch.float64)
        if self._search is None:
            self._require_computable(values, dtype)
            return as_captured(values, dtype, self.names[0])
        if self.unknown != "extend":
            advice = in_program(has_block=self.has_block)
            rows = self._search.rows(timestep, self.unknown, captured=dtype, advice=advice)
            return as_captured(self._search.values[rows], dtype, self.names[0])
        rows, in_table = self._search.find(values)
        if not bool(in_table.all()):
            self._require_computable(values[~in_table], dtype)
        table = self._search.values[rows.clamp_max(len(self._search.values) - 1)]
        return as_captured(torch.where(in_table, table, values.double()), dtype, self.names[0])

    def __call__(self, timestep: Tensor, *finite: Tensor) -> tuple[Tensor, ...]:
        """What the rest of the denoiser takes, one tensor per entry of ``inputs``.

        Args:
            timestep: 0-dim or ``[N]``.
            *finite: The further inputs in the order of ``names``, 0-dim or ``[N]``.

        Raises:
            TimestepError: As :meth:`resolve`; or another input is outside its values, or a feature is NaN or infinite.
        """
        columns = [value.reshape(-1).tolist() for value in (timestep, *finite)]
        count = max(map(len, columns))
        expanded = (column * count if len(column) == 1 else column for column in columns)
        keys: list[Key] = list(zip(*expanded, strict=True))
        return join_items(self._cache.fetch(keys, self._compute))

    @torch.no_grad()
    def _compute(self, keys: Sequence[Key]) -> dict[Key, Row]:
        """The values of rows that are not in the cache."""
        row_of: dict[Key, Row] = {}
        resolved = self.resolve(torch.tensor([key[0] for key in keys], dtype=torch.float64))
        in_table = torch.zeros(len(keys), dtype=torch.bool) if self._search is None else self._search.find(resolved)[1]
        further = list(zip(*keys, strict=True))[1:]
        columns = [resolved, *(torch.tensor(column, dtype=torch.float64) for column in further)]
        for new in (False, True):
            chosen = [number for number in range(len(keys)) if bool(in_table[number]) is not new]
            if chosen:
                inputs = {name: column[chosen] for name, column in zip(self.names, columns, strict=True)}
                own_parameters = self._quantizers if new else ()
                values = evaluate_padded(self.time, self._nodes, self._outputs, inputs, own_parameters)
                row_of.update(zip((keys[number] for number in chosen), self._rows(values, inputs), strict=True))
        self.computed += len(keys)
        return row_of

    def _rows(self, values: Sequence[Tensor], columns: dict[str, Tensor]) -> list[Row]:
        """The values of each row, as the rest takes them."""
        count = len(next(iter(columns.values())))
        if problem := describe_non_finite(
            values, columns, [f"the temporal feature of {layer!r}" for layer in self.layers]
        ):
            msg = f"{problem}; check the scheduler"
            raise TimestepError(msg)
        flat = [value.reshape(count, -1) for value in values]
        joined = []
        for entry in self.inputs:
            parts = [self._as_stored(flat[number]) if entry.matrix else flat[number] for number in entry.outputs]
            joined.append(torch.cat(parts, dim=1) if entry.matrix else parts[0].reshape(-1))
        return [tuple(value[n : n + 1].clone() for value in joined) for n in range(count)]

    def _as_stored(self, rows: Tensor) -> Tensor:
        return stored_rows(rows, self.storage) if rows.dtype == torch.float32 else rows

    def _require_computable(self, new: Tensor, dtype: torch.dtype) -> None:
        """Raise unless timesteps outside the table can be computed."""
        if self._search is not None:
            self._search.rows(new, "nearest")  # names what is no finite number
        try:
            distinct = distinct_timesteps(new)
        except ConfigError as error:
            raise TimestepError(str(error)) from error
        if not self.has_block:
            served = "" if self.timesteps is None else ", ".join(f"{value:g}" for value in self.timesteps[:4].tolist())
            count = 0 if self.timesteps is None else len(self.timesteps)
            msg = (
                f"timestep {float(distinct[0]):g} is not among the {count} whose features this program has ({served}, "
                "…), and it has no temporal block to compute others: quantize again with all timesteps or with "
                "temporal='fsc', or lower with unknown_timestep='nearest'"
            )
            raise TimestepError(msg)
        fractional = distinct[distinct != distinct.round()]
        if len(fractional) and not dtype.is_floating_point:
            reader = integer_reader(self.time, self.names[0])
            reason = f" and {reader.name!r} takes them as integers" if reader is not None else ""
            msg = (
                f"timestep {float(fractional[0]):g} is fractional, but the model was captured with "
                f"{str(dtype).removeprefix('torch.')} timesteps{reason}: capture it again with a float timestep"
            )
            raise TimestepError(msg)
