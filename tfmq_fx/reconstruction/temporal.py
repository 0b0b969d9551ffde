r"""Temporal information aware reconstruction (TIAR): the temporal block learns from its own output alone.

.. math::
    L = \sum_t \sum_i \| g_i(h(t)) - \hat g_i(\hat h(t)) \|^2

over all timesteps ``t`` of the schedule and all embedding layers ``i``, without any image: the block is a
function over a finite set, so the whole set is the batch. Source: TFMQ-DM (CVPR 2024), section 5,
temporal information block based reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor, fx, nn

from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    FakeQuantizer,
    TimestepQuantizer,
    float_mode,
    quantizers_of,
)
from tfmq_fx.passes.analysis import TemporalBlock, evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.sizes import concrete_size
from tfmq_fx.passes.subgraphs import extract_subgraph, known_value
from tfmq_fx.reconstruction.keeping import keep_if_better
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.training import train
from tfmq_fx.reconstruction_config import ReconstructionConfig

__all__ = ["observe_temporal_block", "reconstruct_temporal_block", "sampled_rows", "temporal_quantizers"]

#: Rows of the full batch; a schedule has fewer, the pairs of timestep and class may be more.
MOST_ROWS = 4096


def temporal_quantizers(prepared: fx.GraphModule, block: TemporalBlock) -> list[FakeQuantizer]:
    """The fake quantizers that only the temporal block calls."""
    called = {str(node.target): node in block for node in prepared.graph.nodes if node.op == "call_module"}
    modules = quantizers_of(prepared)
    return [modules[name] for name, inside in called.items() if inside and name in modules]


def sampled_rows(inputs: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
    """The rows that TIAR trains on: all of them up to :data:`MOST_ROWS`, beyond it a random choice of as many."""
    count = len(next(iter(inputs.values())))
    if count <= MOST_ROWS:
        return inputs
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    return {name: column[chosen] for name, column in inputs.items()}


@torch.no_grad()
def observe_temporal_block(prepared: fx.GraphModule, timestep: str, inputs: Mapping[str, Tensor]) -> None:
    """Give every activation of the block the exact range of what it sees over the schedule (FSC).

    Args:
        prepared: A graph with fake quantizers; those of the temporal block are updated in place.
        timestep: Name of the timestep placeholder.
        inputs: By name, the timesteps of the schedule and the values of further finite inputs, ``[K]`` each.
    """
    _observe(prepared, find_temporal_block(prepared, timestep), inputs)


def _observe(prepared: fx.GraphModule, block: TemporalBlock, inputs: Mapping[str, Tensor]) -> None:
    sites = _activations(temporal_quantizers(prepared, block))

    def evaluate(nodes: Sequence[fx.Node]) -> list[Tensor]:
        return evaluate_temporal_nodes(prepared, block.nodes, nodes, inputs)

    if all(isinstance(site, TimestepQuantizer) for site in sites):
        with _observing(sites):
            evaluate(block.linears if sites else ())
        return
    # A range that all timesteps share is known only when all have been seen, and some graphs take one at a
    # time: site by site, each behind those that are settled.
    modules = quantizers_of(prepared)
    for node in block.nodes:
        site = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(site, TimestepQuantizer):
            with _observing([site]):
                evaluate([node])
        elif isinstance(site, ActivationQuantizer):
            (seen,) = evaluate([node.args[0]])  # type: ignore[list-item]
            with _observing([site]):
                site(seen)


def _activations(quantizers: list[FakeQuantizer]) -> list[ActivationQuantizer | TimestepQuantizer]:
    return [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]


@contextmanager
def _observing(quantizers: Sequence[ActivationQuantizer | TimestepQuantizer]) -> Iterator[None]:
    """Ranges follow what is seen for the time of a block."""
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False


@dataclass(frozen=True)
class _TemporalTraining:
    """The part of the block behind its first weight, ready to run over all timesteps at once.

    Attributes:
        module: Called with ``inputs``, returns ``emb_{t,i}`` for every ``i``: ``[K, C_i]`` each.
        inputs: What the part in front of the first weight computes: it is the same in every iteration.
        targets: The float block's ``emb_{t,i}`` side by side, ``[K, sum C_i]``.
    """

    module: nn.Module
    inputs: list[Tensor | int]
    targets: Tensor

    def error(self) -> Tensor:
        """``sum_i mean_t sum_c (emb_hat - emb)^2``: the objective over the number of timesteps."""
        outputs = self.module(*self.inputs)
        whole = outputs if isinstance(outputs, Tensor) else torch.cat(outputs, dim=-1)
        return (whole - self.targets).square().sum() / len(self.targets)


def _training_graph(prepared: fx.GraphModule, block: TemporalBlock, inputs: Mapping[str, Tensor]) -> _TemporalTraining:
    outputs = [layer.linear for layer in block.embedding_layers] or [block.time_embedding[-1]]
    quantizers = temporal_quantizers(prepared, block)
    modules = quantizers_of(prepared)
    trained: set[fx.Node] = set()
    for node in block.nodes:
        learns = node.op == "call_module" and isinstance(modules.get(str(node.target)), AdaRoundQuantizer)
        if learns or any(source in trained for source in node.all_input_nodes):
            trained.add(node)
    constants = {n for n in block.nodes if n.op == "get_attr" and any(user in trained for user in n.users)}
    needed: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node not in needed and (node in trained or node in constants):
            needed.add(node)
            queue.extend(node.all_input_nodes)
    module, sources = extract_subgraph(prepared, [n for n in block.nodes if n in needed], outputs)
    example = {node: known_value(prepared, node) for node in sources}
    tensors = [node for node in sources if isinstance(example[node], Tensor)]

    def evaluate(nodes: list[fx.Node]) -> list[Tensor]:
        return evaluate_temporal_nodes(prepared, block.nodes, nodes, inputs)

    count = len(inputs[block.timestep])

    def arranged(tensors: dict[fx.Node, Tensor]) -> list[Tensor | int]:
        return [
            concrete_size(example[node], count) if isinstance(example[node], SymInt) else tensors[node]
            for node in sources
        ]

    # The sites in front of the first weight are calibrated here, once and for all.
    with torch.no_grad():
        _observe(prepared, block, inputs)
        quantized = dict(zip(tensors, evaluate(tensors), strict=True))
    with torch.no_grad(), float_mode(quantizers):
        originals = dict(zip([*tensors, *outputs], evaluate([*tensors, *outputs]), strict=True))
        targets = torch.cat([originals[node] for node in outputs], dim=-1)
        _check_together(_TemporalTraining(module, arranged(originals), targets))
    return _TemporalTraining(module, arranged(quantized), targets)


def _check_together(float_block: _TemporalTraining) -> None:
    """The float block over all timesteps at once must give what it gives one by one."""
    try:
        error = float_block.error().item()
        reason = f"the error of the float block against itself is {error:g}"
    except (RuntimeError, ValueError) as failure:
        error, reason = float("inf"), str(failure).strip().splitlines()[0]
    size = float_block.targets.square().sum().item() / len(float_block.targets)
    if not error <= 1e-6 * max(size, 1e-12):
        msg = (
            f"the temporal block cannot be evaluated for all timesteps at once ({reason}); "
            "capture the model with a timestep of shape [N], or use temporal='nearest'"
        )
        raise ReconstructionError(msg)


def reconstruct_temporal_block(
    prepared: fx.GraphModule,
    timestep: str,
    inputs: Mapping[str, Tensor],
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    *,
    compiled: bool = False,
) -> UnitResult:
    """Learn the rounding of all weights of the temporal block jointly.

    While they learn, each activation's range is the exact one of the moment, so what is trained is what
    finite set calibration gives at the end. With ``learned_steps`` the tables are trained instead, from
    the ranges at the start.

    Args:
        prepared: A graph with fake quantizers; those of the temporal block are updated in place.
        timestep: Name of the timestep placeholder.
        inputs: By name, the timesteps of the schedule and the values of further finite inputs, ``[K]`` each.
        config: Iterations and schedules.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Returns:
        The error before and after, as :class:`UnitResult`.

    Raises:
        ReconstructionError: The block cannot be evaluated for all timesteps at once.
    """
    block = find_temporal_block(prepared, timestep)
    quantizers = temporal_quantizers(prepared, block)
    weights = [quantizer for quantizer in quantizers if isinstance(quantizer, AdaRoundQuantizer)]
    activations = _activations(quantizers)
    if not weights:
        return UnitResult("temporal block", "temporal", reason="its weights are not quantized")
    training = _training_graph(prepared, block, inputs)

    @torch.no_grad()
    def exact_error() -> float:
        with _observing(activations):
            return training.error().item()

    for quantizer in weights:
        quantizer.round_to_nearest()
    before = exact_error()

    def learn() -> None:
        def fit(steps: Sequence[ActivationQuantizer | TimestepQuantizer]) -> None:
            train(
                weights,
                steps,
                lambda _: training.error(),
                config.temporal_iterations,
                config,
                on_iteration,
                precision=config.temporal_precision,
                compiled=compiled,
            )

        if config.learned_steps:
            # The ranges of the soft weights at the start, which are the float ones.
            with float_mode(weights):
                exact_error()
            fit(activations)
        else:
            with _observing(activations):
                fit(())

    def measure() -> float:
        if not config.learned_steps:
            return exact_error()
        with torch.no_grad():
            return training.error().item()

    return keep_if_better("temporal block", "temporal", quantizers, before, learn, measure, config.temporal_iterations)
