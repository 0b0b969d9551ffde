"""How much the model's result depends on each element of each unit's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.fake_quantizers import float_mode, quantizers_of
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.values import in_window, placeholder_value

__all__ = ["fisher_information"]


class _Walk(fx.Interpreter):
    """Runs the graph and keeps the outputs of its units."""

    def __init__(self, graph_module: fx.GraphModule, units: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.units = units
        self.outputs: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node; a unit's outputs retain their gradients."""
        value = super().run_node(n)
        if n in self.units:
            self.outputs[n] = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            for leaf in self.outputs[n]:
                if leaf.requires_grad:
                    leaf.retain_grad()
                elif leaf.is_floating_point():
                    leaf.requires_grad_()  # what depends on the timestep alone
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a unit."""
        assert isinstance(self.module, fx.GraphModule)
        return self.module.get_submodule(str(target))(*args, **kwargs)


def fisher_information(
    graph_module: fx.GraphModule, samples: Samples, units: set[fx.Node], seed: int
) -> dict[fx.Node, list[Tensor | None]]:
    """The diagonal Fisher information of the float model at every unit's outputs.

    A denoiser's output is the mean of a Gaussian, whose Fisher information at an inner activation ``a`` is
    ``E_v[(J^T v)^2]`` with ``J`` the Jacobian from ``a`` to the output and ``v ~ N(0, I)``: one backward
    pass serves all units. Averaged over samples and scaled to a mean of 1, so that it moves weight between
    elements and leaves the balance with the rounding regulariser. Source: BRECQ (ICLR 2021), section
    3.2; the Gaussian output is ours, BRECQ's models classify.

    Args:
        graph_module: The partitioned graph.
        samples: The calibration samples.
        units: The call nodes of the units.
        seed: Seed of ``v``.

    Returns:
        Per unit and output, the shape of the output without axis 0; None where no gradient arrives.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[fx.Node, list[Tensor | None]] = {}
    with float_mode(quantizers_of(graph_module).values()), torch.enable_grad():
        for window in samples.chunks:
            walk = _Walk(graph_module, units)
            outputs = walk.run(*_inputs(samples, window), enable_io_processing=False)
            result = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not result:
                break
            torch.autograd.backward(
                result, [torch.randn(leaf.shape, generator=generator).to(leaf.dtype) for leaf in result]
            )
            for unit, leaves in walk.outputs.items():
                squares = [None if leaf.grad is None else leaf.grad.square().sum(0) for leaf in leaves]
                before = sums.setdefault(unit, [None] * len(squares))
                sums[unit] = [new if old is None else old if new is None else old + new
                              for old, new in zip(before, squares, strict=True)]  # fmt: skip
    return {unit: [None if total is None else _scaled(total) for total in totals] for unit, totals in sums.items()}


def _inputs(samples: Samples, window: Window) -> list[Any]:
    """The graph's inputs; floating-point ones collect gradients, so that what depends on them does."""
    inputs = [in_window(placeholder_value(column), window) for column in samples.inputs]
    return [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in inputs
    ]


def _scaled(total: Tensor) -> Tensor:
    mean = total.mean()
    return total / mean if float(mean) > 0 else torch.ones_like(total)
