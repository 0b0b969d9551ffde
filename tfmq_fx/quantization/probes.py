"""Probes: a few calibration items with the float model's results, kept to measure what conversion loses.

They lie in the metadata of the graph's placeholders: copies of a graph have them, and so has what ``convert_pt2e`` and
other tools make of it, for they copy the metadata of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.errors import InputError
from tfmq_fx.frontend.binding import Call
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.quantization.fidelity import Fidelity, TimestepFidelity
from tfmq_fx.quantization.layer_outputs import FloatRun

__all__ = ["MOST_BYTES", "MOST_PROBES", "Probe", "Probes", "drop_probes", "float_results", "measure", "probes_of"]

#: Probes of a graph, and the bytes that their tensors take together: as many as a forward pass of each is cheap beside
#: calibration, and their memory small beside the weights of a model that has such inputs.
MOST_PROBES, MOST_BYTES = 10, 2**26

#: Where a placeholder carries the probes of its graph.
PROBES = "tfmq_fx.probes"


@dataclass(frozen=True)
class Probe:
    """One item of the calibration data.

    Attributes:
        place: Where it stands among the others: its timestep, or the number of its batch without one.
        timestep: Its timestep; None where there is none, or it is a whole batch of several, which cannot be cut.
        call: Its inputs, copies.
        expected: The floating-point results of the float model for it, in the order of the result's leaves.
    """

    place: float
    timestep: float | None
    call: Call
    expected: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(value.nbytes for value in (*self.call.leaves, *self.expected) if isinstance(value, Tensor))


class Probes:
    """Chooses probes from calls as they come, at most :data:`MOST_PROBES` in :data:`MOST_BYTES`, spread by timestep.

    Of a timestep the last item of the first call is taken. Where there are too many, the one goes whose neighbours are
    nearest to each other. So the choice depends on the calls alone, and no call is kept that is not chosen.

    Args:
        prepared: The prepared graph; the probes of an earlier calibration stay.
        tables: By name of an input, the values that the program will serve, float64 ``[K]``: others are no probes.
    """

    def __init__(self, prepared: fx.GraphModule, tables: Mapping[str, Tensor]) -> None:
        self._prepared = prepared
        self._tables = {name: ValueSearch(values) for name, values in tables.items()}
        self._kept = {(probe.timestep, probe.place): probe for probe in probes_of(prepared)}
        self._calls = int(max((probe.place for probe in self._kept.values() if probe.timestep is None), default=0))

    def add(self, calls: Iterable[tuple[Tensor | None, Call]], results: Iterable[Any] | None = None) -> None:
        """Consider the calls of a batch.

        Args:
            calls: With the timesteps of each.
            results: What the float model returns for them, where that is known; else :meth:`attach` runs it.
        """
        calls = list(calls)
        for (timesteps, call), result in zip(calls, [None] * len(calls) if results is None else results, strict=True):
            self._calls += 1
            distinct = [] if timesteps is None else list(dict.fromkeys(timesteps.reshape(-1).tolist()))
            timestep = float(distinct[0]) if len(distinct) == 1 else None
            place = float(self._calls) if timestep is None else timestep
            if (timestep, place) in self._kept:
                continue
            item = _last_item(call)
            if self._served(item):
                expected = () if result is None else _last_results(result, call, item)
                self._kept[timestep, place] = Probe(place, timestep, item, expected)
                self._thin()

    def attach(self) -> None:
        """Run the float model on the probes and let the graph carry them; those without finite results go."""
        for key, probe in list(self._kept.items()):
            expected = probe.expected or float_results(FloatRun(self._prepared).run(*probe.call.leaves))
            self._kept[key] = replace(probe, expected=tuple(value.clone() for value in expected))
            if not any(value.numel() for value in expected) or not all(bool(v.isfinite().all()) for v in expected):
                del self._kept[key]
        self._thin()
        for node in self._prepared.graph.find_nodes(op="placeholder"):
            node.meta[PROBES] = tuple(self._kept.values())

    def _served(self, call: Call) -> bool:
        """Whether the program will have rows for a call."""
        for name, search in self._tables.items():
            index = call.interface.find(name)
            value = None if index is None else call.leaves[index]
            if isinstance(value, Tensor) and not bool(search.find(value)[1].all()):
                return False
        return True

    def _thin(self) -> None:
        while len(self._kept) > MOST_PROBES or sum(probe.nbytes for probe in self._kept.values()) > MOST_BYTES:
            order = sorted(self._kept, key=lambda key: key[1])
            inner = range(1, len(order) - 1)
            nearest = min(inner, key=lambda n: order[n + 1][1] - order[n - 1][1], default=len(order) - 1)
            del self._kept[order[nearest]]


def probes_of(graph_module: fx.GraphModule) -> tuple[Probe, ...]:
    """The probes that a graph carries."""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if PROBES in node.meta:
            probes: tuple[Probe, ...] = node.meta[PROBES]
            return probes
    return ()


def drop_probes(graph_module: fx.GraphModule) -> None:
    """Let a graph carry none; copies of it keep theirs."""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        node.meta.pop(PROBES, None)


@torch.no_grad()
def measure(converted: fx.GraphModule, probes: Iterable[Probe]) -> Fidelity | None:
    """Run a converted graph on probes and hold its results against the float ones; None where there are no probes."""
    measured = []
    for probe in probes:
        args, kwargs = probe.call.arguments()
        results = float_results(converted(*args, **kwargs))
        measured.append(TimestepFidelity.of(probe.timestep, results, probe.expected))
    return Fidelity.of(measured)


def _last_item(call: Call) -> Call:
    """A copy of the last item of a call, or of all of it where it cannot be cut."""
    item = call
    if call.batch is not None and call.batch > 1:
        try:
            item = call.take(torch.tensor([call.batch - 1]))
        except InputError:
            item = call
    leaves: list[Any] = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in item.leaves]
    return replace(item, leaves=leaves)


def _last_results(results: Any, call: Call, item: Call) -> tuple[Tensor, ...]:
    """The floating-point results of a call for its last item, which ``item`` is, copied."""
    axes = call.interface.results
    kept = []
    for leaf, axis in zip(pytree.tree_leaves(results), axes, strict=True):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            if axis is not None and call.batch is not None and item.batch != call.batch:
                size = leaf.shape[axis] // call.batch
                leaf = leaf.narrow(axis, leaf.shape[axis] - size, size)
            kept.append(leaf.detach().clone())
    return tuple(kept)


def float_results(results: Any) -> list[Tensor]:
    """The floating-point tensors of a result, in the order of its leaves."""
    leaves = pytree.tree_leaves(results)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
