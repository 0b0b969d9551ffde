"""How the model's result moves with what the layers of the time path give, timestep by timestep, as probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.passes.analysis.layer_names import layer_name
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.values import in_window, placeholder_value

__all__ = ["PROBES", "output_probes"]

#: Probes of each timestep. With 12 in the place of 32 the bundled model's images were 8 dB further away, in one run.
PROBES = 32
#: Samples that go through the model at once: their activations are kept for the gradient.
ROWS = 8


class _Walk(fx.Interpreter):
    """Runs a graph and keeps the outputs of some layers, which retain their gradients."""

    def __init__(self, graph_module: fx.GraphModule, layers: set[str]) -> None:
        super().__init__(graph_module)
        self.layers = layers
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node."""
        value = super().run_node(n)
        if n.name in self.layers:
            if value.requires_grad:
                value.retain_grad()
            else:
                value.requires_grad_()
            self.outputs[n.name] = value
        return value


def output_probes(
    model: fx.GraphModule, layers: Sequence[fx.Node], samples: Samples, timestep: str, timesteps: Tensor, seed: int
) -> dict[fx.Node, Tensor]:
    """Probes ``J^T v`` of the result's Jacobian at the outputs of layers of the time path.

    ``v ~ N(0, I)``, so that the mean of ``g g^T`` over the probes ``g`` of a timestep estimates the mean of ``J^T J``
    over its samples. A timestep with too few samples has those of its neighbours too: ``J`` changes little from one to
    the next.

    Args:
        model: The float graph (:func:`~.float_graph.float_graph`).
        layers: The layers, nodes of a graph with the same names; each gives ``[N, C]``, or ``[1, C]`` for a whole
            batch.
        samples: The calibration samples, or some of them.
        timestep: Name of the timestep input.
        timesteps: The values that probes are wanted for, ``[K]``.
        seed: Of ``v``.

    Returns:
        Per layer float32 ``[K, P, C]`` with ``P`` at most :data:`PROBES`, divided by ``sqrt(P)``.

    Raises:
        ReconstructionError: A layer gives several rows an item, or the result does not depend on it.
    """
    generator = torch.Generator().manual_seed(seed)
    column = next(i for i, n in enumerate(_placeholders(model)) if str(n.target) == timestep)
    wanted = PROBES * len(timesteps)
    windows = _windows(samples, wanted)
    passes = -(-wanted // sum(len(window) for window in windows))
    at: list[Tensor] = []
    found: dict[fx.Node, list[Tensor]] = {layer: [] for layer in layers}
    with torch.enable_grad():
        for window in windows:
            inputs = [in_window(placeholder_value(values), window) for values in samples.inputs]
            walk = _Walk(model, {layer.name for layer in layers})
            result = walk.run(*inputs, enable_io_processing=False)
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            for number in range(passes if leaves else 0):
                for value in walk.outputs.values():
                    value.grad = None
                probes = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves]
                torch.autograd.backward(leaves, probes, retain_graph=number + 1 < passes)
                for layer in layers:
                    found[layer].append(_rows(layer, walk.outputs[layer.name].grad, len(window)))
                at.append(torch.as_tensor(inputs[column]).reshape(-1).double()[: len(found[layers[0]][-1])])
    if not at:
        msg = "the model's result does not depend on its temporal block: use temporal_objective='features'"
        raise ReconstructionError(msg)
    chosen = _nearest(torch.cat(at), timesteps)
    return {layer: torch.cat(rows)[chosen] / chosen.shape[1] ** 0.5 for layer, rows in found.items()}


def _placeholders(model: fx.GraphModule) -> list[fx.Node]:
    return [node for node in model.graph.nodes if node.op == "placeholder"]


def _windows(samples: Samples, wanted: int) -> list[Window]:
    """Which samples go through the model together: the first ones, where more are there than are wanted."""
    if not samples.mixing:
        return list(samples.chunks)[:wanted]
    count = min(samples.count, wanted)
    return [Window(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def _rows(layer: fx.Node, gradient: Tensor | None, count: int) -> Tensor:
    """One row an item, or one for a batch of ``count``: the sum over them, whose square is ``count`` times as large."""
    if gradient is not None:
        rows: Tensor = gradient.detach().float().reshape(-1, gradient.shape[-1])
        if len(rows) == count:
            return rows
        if len(rows) == 1:
            return rows / math.sqrt(count)
    reason = "does not move the result" if gradient is None else "has several rows an item"
    msg = f"{layer_name(layer)} {reason}: use temporal_objective='features'"
    raise ReconstructionError(msg)


def _nearest(at: Tensor, timesteps: Tensor) -> Tensor:
    """Which probes belong to each timestep: its own, then those of its neighbours, int64 ``[K, P]``."""
    distance = (timesteps.double()[:, None] - at[None]).abs()
    nearest: Tensor = distance.argsort(dim=1, stable=True)[:, :PROBES]
    return nearest
