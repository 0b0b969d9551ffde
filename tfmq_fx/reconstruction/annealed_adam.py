"""Adam whose learning rates fall to zero along a cosine, and which goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["AnnealedAdam"]

#: What Adam keeps of each variable.
MOMENTS = ("exp_avg", "exp_avg_sq")
GENERATOR = "generator"


class AnnealedAdam:
    """Adam (Kingma & Ba, 2015) over groups of variables with a rate each.

    Args:
        groups: Variables, and the rate that they start with; empty groups are left out.
        iterations: Training steps; behind the last one every rate is zero.

    Attributes:
        iteration: Training steps done.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], iterations: int) -> None:
        self.iterations, self.iteration = iterations, 0
        self.rates = [rate for variables, rate in groups if variables]
        self.variables = [variable for variables, _ in groups for variable in variables]
        self._adam = torch.optim.Adam([{"params": list(variables)} for variables, _ in groups if variables])

    def step(self, loss: Tensor) -> None:
        """Go against the gradient of a loss."""
        falling = 0.5 * (1.0 + math.cos(math.pi * self.iteration / self.iterations))
        for group, rate in zip(self._adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * falling
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._adam.step()
        self.iteration += 1

    def state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """All that the rest of a training depends on.

        Args:
            generator: What mini-batches are drawn with.
        """
        state = {GENERATOR: generator.get_state(), "iteration": torch.tensor(self.iteration)}
        for index, variable in enumerate(self.variables):
            state[f"{index}"] = variable.detach()
            # A variable that the loss does not depend on has no moments.
            state |= {
                f"{index}.{name}": self._adam.state[variable][name] for name in MOMENTS if self._adam.state[variable]
            }
        return state

    @torch.no_grad()
    def resume(self, state: Mapping[str, Tensor] | None, generator: torch.Generator) -> None:
        """Go on from what :meth:`state` gave; from the start where there is none."""
        if state is None:
            return
        generator.set_state(state[GENERATOR])
        self.iteration = int(state["iteration"])
        for index, variable in enumerate(self.variables):
            variable.copy_(state[f"{index}"])
            if f"{index}.{MOMENTS[0]}" in state:
                moments = {name: state[f"{index}.{name}"].clone() for name in MOMENTS}
                self._adam.state[variable] = {"step": torch.tensor(float(self.iteration)), **moments}
