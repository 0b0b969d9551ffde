"""Run a program in stages, and reuse what was computed for the same prompt, or timestep and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx._torch import pytree
from tfmq_fx.frontend.tensors import contiguous
from tfmq_fx.lowering.stages import Layout, Stage, StagedGraph, StageRun
from tfmq_fx.temporal.value_cache import ValueCache, join_items

__all__ = ["Reused", "StagedProgram", "stage_inputs"]

#: Memory for values that are kept, per stage: the keys and values of SDXL's cross attention take some 55 MB a prompt.
CACHE_BYTES = 2**29


class Reused:
    """A stage whose values are cached by the batch items of its inputs.

    Images of one prompt share an item, and a batch of cached items runs nothing. Where a stage mixes items, the whole
    batch is one entry. The least recently used values give way.

    Args:
        stage: The stage.
        run: Called with its inputs; returns its outputs as a tuple.
        most_bytes: Memory for the values.

    Attributes:
        computed: Items that were computed so far.
    """

    def __init__(self, stage: Stage, run: StageRun, most_bytes: int = CACHE_BYTES) -> None:
        self.stage, self.run = stage, run
        self.computed = 0
        self._cache: ValueCache[bytes] = ValueCache(most_bytes)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The stage's outputs, which are not to be written to: some are what is kept."""
        items = [inputs]
        if self.stage.by_row:
            count = next(value.shape[0] for value in inputs if value.ndim)
            items = [tuple(value[n : n + 1] if value.ndim else value for value in inputs) for n in range(count)]
        keys = [_digest(item) for item in items]
        item_of = dict(zip(keys, items, strict=True))
        values = self._cache.fetch(keys, lambda missing: self._compute_all({key: item_of[key] for key in missing}))
        return join_items(values)

    def _compute_all(self, items: dict[bytes, tuple[Tensor, ...]]) -> dict[bytes, tuple[Tensor, ...]]:
        """The outputs of each item, computed together."""
        values: dict[bytes, tuple[Tensor, ...]] = {}
        for call in self._calls(items):
            self.computed += len(call)
            values.update(zip(call, self._compute(list(call.values())), strict=True))
        return values

    def _calls(self, missing: dict[bytes, tuple[Tensor, ...]]) -> list[dict[bytes, tuple[Tensor, ...]]]:
        """The items of each call: all of them, or those of one timestep."""
        if self.stage.timestep is None or not self.stage.by_row:
            return [missing]
        calls: dict[bytes, dict[bytes, tuple[Tensor, ...]]] = {}
        position = self.stage.inputs.index(self.stage.timestep)
        for key, item in missing.items():
            calls.setdefault(_digest(item[position : position + 1]), {})[key] = item
        return list(calls.values())

    def _compute(self, items: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        if not self.stage.by_row:
            return [_as_tuple(self.run(*items[0]))]
        inputs = [torch.cat(column) if column[0].ndim else column[0] for column in zip(*items, strict=True)]
        outputs = _as_tuple(self.run(*inputs))
        return [tuple(value[n : n + 1].clone() for value in outputs) for n in range(len(items))]


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """A stage's outputs in one memory layout: compiled code takes no other than it was compiled for."""
    return tuple(value.contiguous() for value in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def _memory_of(value: Tensor) -> int:
    """Where a tensor lies."""
    return value.untyped_storage().data_ptr()


def _digest(item: tuple[Tensor, ...]) -> bytes:
    """A hash of the bits of an item's inputs."""
    state = hashlib.blake2b(digest_size=16)
    for value in item:
        state.update(str(tuple(value.shape)).encode())
        state.update(contiguous(value).reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.digest()


class StagedProgram:
    """Called like the program that was cut into stages.

    Args:
        layout: How the stages go together.
        structure: What the program's flat results are put into.
        runs: What runs each stage.
        own: The positions of those that cache their values themselves; of the others all but the last are cached here.
    """

    def __init__(
        self, layout: Layout, structure: pytree.TreeSpec, runs: Sequence[StageRun], own: Collection[int] = ()
    ) -> None:
        self.layout, self.structure = layout, structure
        uncached = {*own, len(runs) - 1}
        self.runs: list[StageRun] = [
            run if number in uncached else Reused(stage, run)
            for number, (stage, run) in enumerate(zip(layout.stages, runs, strict=True))
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stages in order."""
        values: dict[str | None, Any] = {None: None}
        values.update(zip(self.layout.inputs, pytree.tree_leaves((args, kwargs)), strict=True))
        for stage, run in zip(self.layout.stages, self.runs, strict=True):
            outputs = _as_tuple(run(*(values[name] for name in stage.inputs)))
            values.update(zip(stage.outputs, outputs, strict=True))
        # What an earlier stage keeps is not its caller's to write to, also where the last one only hands it on.
        kept = {_memory_of(values[name]) for stage in self.layout.stages[:-1] for name in stage.outputs}
        results = [values[name] for name in self.layout.results]
        results = [value.clone() if value is not None and _memory_of(value) in kept else value for value in results]
        return pytree.tree_unflatten(results, self.structure)


def stage_inputs(staged: StagedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What each stage is called with for these inputs of the program."""
    values = dict(zip(staged.layout.inputs, pytree.tree_leaves((args, kwargs)), strict=True))
    inputs: list[tuple[Any, ...]] = []
    for number, (stage, graph_module) in enumerate(zip(staged.layout.stages, staged.graph_modules, strict=True)):
        inputs.append(tuple(values[name] for name in stage.inputs))
        run = staged.runs.get(number, graph_module)
        values.update(zip(stage.outputs, _as_tuple(run(*inputs[-1])), strict=True))
    return inputs
