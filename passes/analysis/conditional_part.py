"""What a denoiser computes from the timestep and the conditioning, and never from the sample.

A prompt's embedding that is added before the SiLU of the embedding layers (SDXL's ``add_embedding``, LCM's guidance
embedding, the pooled text of SD3 and Flux) takes everything behind it out of the temporal block, and the keys and
values of cross attention never belonged to it. All of this is the same at every step of a prompt, or for a timestep and
a prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import SymInt, Tensor, fx

from tfmq_fx.passes.analysis.dependence import data_dependence
from tfmq_fx.passes.analysis.temporal_block import TemporalBlock
from tfmq_fx.passes.support.predicates import is_weighted, node_value

__all__ = ["ConditionalPart", "conditioning_inputs", "find_conditional_part", "outside_block"]


@dataclass(frozen=True)
class ConditionalPart:
    """The nodes that the sample does not reach, by how often they need computing.

    Attributes:
        per_prompt: Nodes that depend on the conditioning alone, in order.
        per_timestep: Nodes that depend on the timestep, with or without the conditioning, in order.
        conditions: Names of the conditioning inputs, in the order of the graph.
        timestep: Name of the timestep input.
        joint: Convolutions and linears that depend on the timestep and the conditioning, in order.
    """

    per_prompt: tuple[fx.Node, ...]
    per_timestep: tuple[fx.Node, ...]
    conditions: tuple[str, ...]
    timestep: str
    joint: tuple[fx.Node, ...] = ()

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
    graph_module: fx.GraphModule,
    samples: Collection[str],
    timestep: str = "timestep",
    *,
    features: Collection[str] = (),
) -> ConditionalPart:
    """Find the nodes whose values the sample does not reach.

    Args:
        graph_module: A captured graph, at any later stage; it is not changed.
        samples: Names of the inputs that are denoised.
        timestep: Name of the timestep input.
        features: Names of inputs that are computed from the timestep.

    Returns:
        The part. Tensors alone belong to it: sizes are read off whatever has them.
    """
    excluded, timed = frozenset(samples), frozenset((timestep, *features))
    per_prompt: list[fx.Node] = []
    per_timestep: list[fx.Node] = []
    joint: list[fx.Node] = []
    conditions: dict[str, None] = {}
    for node, inputs in data_dependence(graph_module).items():
        computed = node.op in ("call_function", "call_module") and isinstance(node_value(node), Tensor | tuple | list)
        if not computed or not inputs or inputs & excluded:
            continue
        (per_timestep if inputs & timed else per_prompt).append(node)
        if is_weighted(node) and inputs & timed and inputs - timed:
            joint.append(node)
        conditions.update(dict.fromkeys(sorted(inputs - timed)))
    order = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    return ConditionalPart(
        per_prompt=tuple(per_prompt),
        per_timestep=tuple(per_timestep),
        conditions=tuple(name for name in order if name in conditions),
        timestep=timestep,
        joint=tuple(joint),
    )


def conditioning_inputs(
    graph_module: fx.GraphModule, samples: Collection[str], timestep: str = "timestep"
) -> tuple[str, ...]:
    """The inputs that meet the timestep in a layer that the sample does not reach, one value for every item.

    ``find_temporal_block(graph_module, timestep, finite=conditioning_inputs(...))`` is the time path with them: the
    temporal block and the layers that depend on the timestep and the conditioning.

    Args:
        graph_module: A captured graph, at any later stage; it is not changed.
        samples: Names of the inputs that are denoised.
        timestep: Name of the timestep input.

    Returns:
        Their names in the order of the graph; empty when no layer depends on the timestep and on such inputs alone.
        An input without the batch as its first axis is none: there is no value of it for an item.
    """
    placeholders = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
    batches = [_first_size(node_value(placeholders[name])) for name in samples if name in placeholders]
    candidates = [
        name
        for name, node in placeholders.items()
        if name not in samples and name != timestep and batches and _first_size(node_value(node)) == batches[0]
    ]
    dependence = data_dependence(graph_module)
    allowed = frozenset((timestep, *candidates))
    conditioning: set[str] = set()
    for node, inputs in dependence.items():
        if is_weighted(node) and timestep in inputs and inputs <= allowed:
            conditioning |= inputs - {timestep}
    return tuple(name for name in candidates if name in conditioning)


def _first_size(value: object) -> object:
    """The size of a tensor's first axis, as something to compare; None without one."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return None
    size = value.shape[0]
    return size.node.expr if isinstance(size, SymInt) else size


def outside_block(path: TemporalBlock, block: TemporalBlock) -> tuple[fx.Node, ...]:
    """The nodes of a time path with conditioning that are not the temporal block's, in order.

    Args:
        path: The block that may depend on the conditioning (:func:`conditioning_inputs`).
        block: The temporal block of the same graph.
    """
    inner = set(block.nodes)
    return tuple(node for node in path.nodes if node not in inner)
