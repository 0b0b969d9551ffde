"""Train a part of a graph on its own float output over a domain.

The time path needs no image, so what its layers see can be computed once and all of it be the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor, fx, nn

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    FakeQuantizer,
    TimestepQuantizer,
    float_mode,
    observing,
    quantizers_of,
)
from tfmq_fx.passes.analysis import evaluate_temporal_nodes
from tfmq_fx.passes.support.sizes import concrete_size
from tfmq_fx.passes.support.subgraphs import extract_subgraph, known_value
from tfmq_fx.reconstruction.acceptance import keep_if_better, undo_if_worse
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.training import STEP_POWER, train, train_steps
from tfmq_fx.reconstruction.unit_error import raised
from tfmq_fx.temporal.domain import TemporalDomain

__all__ = ["DomainTraining", "prepare_domain_training", "train_over_domain"]


@dataclass(frozen=True)
class DomainTraining:
    """A part of a graph behind its first weight, ready to run over all entries of a domain at once.

    Attributes:
        module: Called with ``inputs``, returns its outputs: ``[N * r, ..., C_i]`` each, ``r`` of them per entry.
        inputs: What stands in front of the first weight: it is the same in every iteration.
        targets: The float outputs.
        entries: The number of entries ``N``.
    """

    module: nn.Module
    inputs: list[Tensor | int]
    targets: tuple[Tensor, ...]
    entries: int

    def error(self, power: float = 2.0, drawn: Tensor | None = None) -> Tensor:
        """``sum_i mean_n sum_c |out_hat - out|^power``: the objective over the number of entries.

        Args:
            power: What errors are raised to.
            drawn: The entries that count, int64; all by default.
        """
        outputs = self.module(*self.inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        errors = [ours - theirs for ours, theirs in zip(outputs, self.targets, strict=True)]
        count = self.entries
        if drawn is not None:
            errors, count = [error.reshape(self.entries, -1)[drawn] for error in errors], len(drawn)
        return torch.stack([raised(error, power).sum() for error in errors]).sum() / count


def prepare_domain_training(
    prepared: fx.GraphModule,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    domain: TemporalDomain,
    *,
    members: Collection[fx.Node],
) -> DomainTraining:
    """Cut a part out and compute what stands in front of it, and what its float outputs are.

    Args:
        prepared: A graph with fake quantizers, whose ranges are settled; those before the part stay on, as they will at
            inference, and those in front of its first weight stay as they are.
        nodes: The part, in the order of the graph, with the constants that it alone reads.
        outputs: What it learns from, out of ``nodes``.
        domain: What to evaluate over.
        members: What may be computed from them: the part, and what leads to it.

    Raises:
        ReconstructionError: The part cannot be evaluated for all entries at once.
    """
    modules = quantizers_of(prepared)
    trained: set[fx.Node] = set()
    for node in nodes:
        learns = node.op == "call_module" and isinstance(modules.get(str(node.target)), AdaRoundQuantizer)
        if learns or any(source in trained for source in node.all_input_nodes):
            trained.add(node)
    constants = {n for n in nodes if n.op == "get_attr" and any(user in trained for user in n.users)}
    needed: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node not in needed and (node in trained or node in constants):
            needed.add(node)
            queue.extend(node.all_input_nodes)
    module, sources = extract_subgraph(prepared, [n for n in nodes if n in needed], outputs)
    example = {node: known_value(prepared, node) for node in sources}
    tensors = [node for node in sources if isinstance(example[node], Tensor)]
    columns, count = domain.columns(), len(domain)

    def evaluate(targets: list[fx.Node]) -> list[Tensor]:
        return evaluate_temporal_nodes(prepared, members, targets, columns)

    def arranged(tensors: dict[fx.Node, Tensor]) -> list[Tensor | int]:
        return [
            concrete_size(example[node], count) if isinstance(example[node], SymInt) else tensors[node]
            for node in sources
        ]

    with torch.no_grad():
        quantized = dict(zip(tensors, evaluate(tensors), strict=True))
    with torch.no_grad(), float_mode(_called_by(prepared, members)):
        originals = dict(zip([*tensors, *outputs], evaluate([*tensors, *outputs]), strict=True))
        targets = tuple(originals[node] for node in outputs)
        _check_together(DomainTraining(module, arranged(originals), targets, count))
    return DomainTraining(module, arranged(quantized), targets, count)


def _called_by(prepared: fx.GraphModule, members: Collection[fx.Node]) -> list[FakeQuantizer]:
    """The fake quantizers that ``members`` call: with all of them off, values are the float model's."""
    modules = quantizers_of(prepared)
    return [modules[name] for name in {str(n.target) for n in members if n.op == "call_module"} if name in modules]


def _check_together(float_part: DomainTraining) -> None:
    """The float part over all entries at once must give what it gives one by one."""
    try:
        error = float_part.error().item()
        reason = f"the error of the float block against itself is {error:g}"
    except (RuntimeError, ValueError) as failure:
        error, reason = float("inf"), str(failure).strip().splitlines()[0]
    size = sum(target.square().sum().item() for target in float_part.targets) / float_part.entries
    if not error <= 1e-6 * size:
        msg = (
            f"the temporal block cannot be evaluated for all timesteps at once ({reason}); "
            "capture the model with a timestep of shape [N], or use temporal='nearest'"
        )
        raise ReconstructionError(msg)


def train_over_domain(
    name: str,
    kind: str,
    quantizers: Sequence[FakeQuantizer],
    following: Sequence[ActivationQuantizer | TimestepQuantizer],
    training: DomainTraining,
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
    *,
    compiled: bool,
) -> UnitResult:
    """Learn the rounding of all weights of a part jointly.

    While they learn, the ranges of ``following`` are the exact ones of the moment, so what is trained is what
    calibration over the same domain gives at the end. With ``learned_steps`` the step sizes of all activations are
    trained instead, from the ranges at the start, or behind the weights from those that they leave.

    Args:
        name: The unit's name.
        kind: Its kind.
        quantizers: Its fake quantizers, updated in place.
        following: The activations among them whose ranges follow the weights.
        training: What to train on.
        config: Iterations and schedules.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Returns:
        The error before and after, as :class:`UnitResult`.
    """
    weights = [quantizer for quantizer in quantizers if isinstance(quantizer, AdaRoundQuantizer)]
    activations = [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]

    @torch.no_grad()
    def exact_error() -> float:
        with observing(following):
            return training.error().item()

    for quantizer in weights:
        quantizer.round_to_nearest()
    before = exact_error()

    steps = config.step_iterations(config.temporal_iterations) if activations else 0

    def learn_steps() -> None:
        def loss(_: int) -> Tensor:
            return training.error(STEP_POWER)

        train_steps(activations, loss, steps, config, on_iteration, precision=config.temporal_precision)

    def measure() -> float:
        if not config.learned_steps:
            return exact_error()
        with torch.no_grad():
            return training.error().item()

    generator = torch.Generator().manual_seed(config.seed)

    def batch_error(_: int) -> Tensor:
        if training.entries <= config.batch_size or kind != "temporal":
            return training.error()
        return training.error(drawn=torch.randperm(training.entries, generator=generator)[: config.batch_size])

    def learn() -> None:
        def fit(steps: Sequence[ActivationQuantizer | TimestepQuantizer]) -> None:
            train(
                weights,
                steps,
                batch_error,
                config.temporal_iterations,
                config,
                on_iteration,
                precision=config.temporal_precision,
                compiled=compiled,
            )

        if config.learned_steps is True:
            # The ranges of the soft weights at the start, which are the float ones.
            with float_mode(weights):
                exact_error()
            fit(activations)
        else:
            with observing(following):
                fit(())
        if config.learned_steps == "after":
            exact_error()  # ranges of the weights as they are now
        if steps:
            undo_if_worse(activations, learn_steps, measure)

    return keep_if_better(name, kind, quantizers, before, learn, measure, config.temporal_iterations + steps)
