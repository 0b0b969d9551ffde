"""What a denoiser computes from the timestep and the conditioning, and never from the sample.

A prompt's embedding that is added before the SiLU of the embedding layers (SDXL's ``add_embedding``, LCM's guidance
embedding, the pooled text of SD3 and Flux) takes everything behind it out of the temporal block, and the keys and
values of cross attention never belonged to it. All of this is the same at every step of a prompt, or for a timestep and
a prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx

from ..predicates import is_weighted, node_value
from .dependence import data_dependence

__all__ = ["ConditionalPart", "find_conditional_part"]


@dataclass(frozen=True)
class ConditionalPart:
    """The nodes that the sample does not reach, by how often they need computing.

    Attributes:
        per_prompt: Nodes that depend on the conditioning alone, in order.
        per_timestep: Nodes that depend on the timestep, with or without the conditioning, in order.
        conditions: Names of the conditioning inputs, in the order of the graph.
        timestep: Name of the timestep input.
    """

    per_prompt: tuple[fx.Node, ...]
    per_timestep: tuple[fx.Node, ...]
    conditions: tuple[str, ...]
    timestep: str

    @property
    def layers(self) -> tuple[int, int]:
        """How many convolutions and linears depend on the conditioning alone, and how many on the timestep too."""
        return sum(map(is_weighted, self.per_prompt)), sum(map(is_weighted, self.per_timestep))

    def __str__(self) -> str:
        """Which case a model is, in a sentence."""
        prompt, both = self.layers
        if not prompt and not both:
            return "no layer depends on the conditioning without the sample"
        inputs = ", ".join(self.conditions) or "nothing else"
        parts = [f"{prompt} layers depend on ({inputs}) alone"] if prompt else []
        parts += [f"{both} on {self.timestep} and them"] if both and prompt else []
        parts += [f"{both} layers depend on {self.timestep} and ({inputs})"] if both and not prompt else []
        return " and ".join(parts) + ", never on the sample"


def find_conditional_part(
    graph_module: fx.GraphModule, samples: Collection[str], timestep: str = "timestep"
) -> ConditionalPart:
    """Find the nodes whose values the sample does not reach.

    Args:
        graph_module: A captured graph, at any later stage; it is not changed.
        samples: Names of the inputs that are denoised.
        timestep: Name of the timestep input.

    Returns:
        The part. Tensors alone belong to it: sizes are read off whatever has them.
    """
    excluded = frozenset(samples)
    per_prompt: list[fx.Node] = []
    per_timestep: list[fx.Node] = []
    conditions: dict[str, None] = {}
    for node, inputs in data_dependence(graph_module).items():
        computed = node.op in ("call_function", "call_module") and isinstance(node_value(node), Tensor | tuple | list)
        if not computed or not inputs or inputs & excluded:
            continue
        (per_timestep if timestep in inputs else per_prompt).append(node)
        conditions.update(dict.fromkeys(sorted(inputs - {timestep})))
    order = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    return ConditionalPart(
        tuple(per_prompt), tuple(per_timestep), tuple(name for name in order if name in conditions), timestep
    )
