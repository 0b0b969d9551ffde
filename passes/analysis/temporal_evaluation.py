"""Run the temporal part of a graph alone, over all its timesteps, without an image.

The block may ask for shapes of nodes outside it (``expand`` to the batch of ``sample``); those are
answered from the symbolic shapes in ``meta["val"]``, so nothing outside the block is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.analysis.batch_axis import size_ratio
from tfmq_fx.passes.analysis.dependence import data_arguments, data_dependence
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.sizes import concrete_size
from tfmq_fx.passes.support.subgraphs import known_value
from tfmq_fx.passes.support.timestep_values import as_captured

__all__ = ["NodeHook", "evaluate_temporal_nodes"]

#: Rows of one call: a table over timesteps and classes may have many.
MOST_ROWS = 4096

#: Called as ``hook(node, args, value)`` after each node with its evaluated positional arguments; what it
#: returns is the node's value from then on.
NodeHook = Callable[[fx.Node, tuple[Any, ...], Any], Any]


def _identity(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
    return value


def _placeholder_value(value: Any, batch: int, device: torch.device) -> Any:
    """A value of the right shape and dtype for a node outside the block; zeros, one element of memory."""
    if isinstance(value, Tensor):
        shape = [concrete_size(size, batch) for size in value.shape]
        return torch.zeros((), dtype=value.dtype, device=device).expand(shape)
    return concrete_size(value, batch)


def _run(graph_module: fx.GraphModule, needed: Collection[fx.Node], inputs: Mapping[fx.Node, Tensor],
         batch: int, hook: NodeHook) -> dict[fx.Node, Any]:  # fmt: skip
    environment: dict[fx.Node, Any] = dict(inputs)
    device = next(iter(inputs.values())).device

    def lookup(node: fx.Node) -> Any:
        if node not in environment:
            if node.op == "get_attr":
                environment[node] = read_attribute(graph_module, str(node.target))
            else:
                environment[node] = _placeholder_value(known_value(graph_module, node), batch, device)
        return environment[node]

    for node in graph_module.graph.nodes:
        if node not in needed or node in environment:
            continue
        for source in data_arguments(node):
            # Its shape may be asked for; its values would be those of a stand-in.
            is_determined = (
                source in environment
                or source.op == "get_attr"
                or not isinstance(known_value(graph_module, source), Tensor)
            )
            if not is_determined:
                listed = ", ".join(repr(str(placeholder.target)) for placeholder in inputs)
                msg = (
                    f"node {node.name!r} reads the values of {source.name!r}, which depends on more than {listed}, so "
                    "it cannot be evaluated from these alone"
                )
                raise PassError(msg)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        if node.op == "get_attr":
            result = read_attribute(graph_module, str(node.target))
        elif node.op == "call_module":
            result = graph_module.get_submodule(str(node.target))(*args, **kwargs)
        else:
            result = node.target(*args, **kwargs)
        environment[node] = hook(node, args, result)
    return environment


def _is_computed_tensor(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op in ("call_function", "call_module") and isinstance(known_value(graph_module, node), Tensor)


def _needed_nodes(outputs: Sequence[fx.Node], members: Collection[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node in needed or node not in members:
            continue
        needed.add(node)
        queue.extend(node.all_input_nodes)
    return needed


@torch.no_grad()
def evaluate_temporal_nodes(
    graph_module: fx.GraphModule,
    members: Collection[fx.Node],
    outputs: Sequence[fx.Node],
    inputs: Mapping[str, Tensor],
    *,
    hook: NodeHook = _identity,
) -> list[Tensor]:
    """Evaluate ``outputs`` for every row of ``inputs``; row ``k`` of each result belongs to row ``k`` of them.

    Args:
        graph_module: The graph.
        members: The nodes that may be computed (those of a temporal block, and what was inserted into it); what
            else depends on ``inputs`` alone, or on nothing, is computed too.
        outputs: The nodes whose values are wanted.
        inputs: By name of the placeholder, its values, ``[K, ...]`` each: the timestep, and with a block over further
            inputs those. Cast to the placeholder's dtype; its captured shape (0-dim, ``[N, ...]``) is respected.
        hook: Sees, and may replace, the value of every node as it is computed.

    Returns:
        One tensor per output, shape ``[K, ...]``: the leading axis is the output's own batch axis when
        the timestep was captured as ``[N]`` or the output carries a batch of one, else a new axis. An output with
        ``r`` entries an item, such as one a token, has ``[K * r, ...]``.

    Raises:
        ConfigError: A value is fractional, and the placeholder has integers only.
    """
    placeholders = {str(n.target): n for n in graph_module.graph.nodes if n.op == "placeholder"}
    device = next((p.device for p in pytree.tree_leaves(list(graph_module.parameters()))), torch.device("cpu"))
    examples = {placeholders[name]: placeholders[name].meta["val"] for name in inputs}
    columns = {
        placeholders[name]: as_captured(x, examples[placeholders[name]].dtype, name).to(device)
        for name, x in inputs.items()
    }
    dependence = data_dependence(graph_module)
    reached = {node for node, names in dependence.items() if names and names <= inputs.keys()}
    # Others may read these too: the frequencies that a timestep and a guidance scale have in common.
    reached |= {node for node, names in dependence.items() if not names and _is_computed_tensor(graph_module, node)}
    needed = _needed_nodes(outputs, reached.union(members).difference(placeholders.values()))
    pieces: list[list[Tensor]] = [[] for _ in outputs]
    for start, count, batch in _chunks([(values, examples[node]) for node, values in columns.items()]):
        chunk = {
            node: _as_captured_shape(values[start : start + count], examples[node], batch)
            for node, values in columns.items()
        }
        environment = _run(graph_module, needed, chunk, batch, hook)
        for piece, node in zip(pieces, outputs, strict=True):
            result = environment[node]
            piece.append(_rows_of(graph_module, result, node, list(examples.values()), count, batch))
    return [torch.cat(piece) for piece in pieces]


def _chunks(inputs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[int, int, int]]:
    """Cut the rows into calls of the captured shapes: (first row, number of rows, batch).

    Args:
        inputs: The values of each input, ``[K, ...]``, and its example. A call has one value of a 0-dim input; with
            such inputs alone, it has one row.
    """
    count = len(inputs[0][0])
    batched = [example for _, example in inputs if example.ndim]
    if not batched:
        return [(start, 1, 1) for start in range(count)]
    fixed = [int(example.shape[0]) for example in batched if not isinstance(example.shape[0], SymInt)]
    size = min(fixed, default=MOST_ROWS)
    starts = [0]
    single = [values for values, example in inputs if example.ndim == 0]
    for row in range(1, count):
        changed = any(bool(values[row] != values[row - 1]) for values in single)
        if changed or row - starts[-1] == size:
            starts.append(row)
    counts = [stop - start for start, stop in zip(starts, [*starts[1:], count], strict=True)]
    return [(start, length, size if fixed else length) for start, length in zip(starts, counts, strict=True)]


def _rows_of(
    graph_module: fx.GraphModule, result: Tensor, node: fx.Node, inputs: Sequence[Tensor], count: int, batch: int
) -> Tensor:
    """The first ``count`` rows of a result along axis 0; what a 0-dim input alone leads to is the same in all."""
    batched = [value.shape[0] for value in inputs if value.ndim]
    if len(batched) < len(inputs):
        example = known_value(graph_module, node)
        if not (batched and example.ndim and _has_batch_axis(example.shape[0], batched[0])):
            row = result if result.ndim and result.shape[0] == 1 else result[None]
            return row.expand(count, *row.shape[1:])
    return result[: count * max(1, result.shape[0] // batch)]


def _has_batch_axis(size: int | SymInt, batch: int | SymInt) -> bool:
    """Whether an axis of this size has the same number of entries for every item of the batch."""
    return bool(size == batch) or (isinstance(size, SymInt) and size_ratio(size, batch) is not None)


def _as_captured_shape(values: Tensor, example: Tensor, batch: int) -> Tensor:
    """Rows as an argument of the captured shape, the last one repeated where the batch is larger."""
    if example.ndim == 0:
        return values[0]
    size = batch if isinstance(example.shape[0], SymInt) else int(example.shape[0])
    return torch.cat([values, values[-1:].expand(size - len(values), *values.shape[1:])])
