r"""TIAR by what the prediction feels: the temporal block is rounded so that the model's result moves least.

The paper's objective sums the squared errors of all temporal features, whatever they do. Here they are weighed by the
Jacobian of the noise prediction with respect to them, in full: which direction an error has, and whether errors of
different embedding layers add up or cancel, decides what becomes of the image, far more than its size
(:mod:`.joint_rounding`). As the block is small and its domain is known, nothing is trained: the time embed is rounded
layer by layer, each by what its own output does to the result, then all embedding layers at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import float_mode, quantizers_of
from tfmq_fx.passes.analysis import evaluate_temporal_nodes
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.predicates import is_linear
from tfmq_fx.reconstruction.acceptance import keep_if_better
from tfmq_fx.reconstruction.between_timesteps import moments_between
from tfmq_fx.reconstruction.float_graph import float_graph
from tfmq_fx.reconstruction.joint_rounding import JointLayer, round_alone, round_together
from tfmq_fx.reconstruction.layer_inputs import input_position
from tfmq_fx.reconstruction.output_probes import output_probes
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.samples import Samples
from tfmq_fx.reconstruction.time_path import TimePathUnit, sampled_domain
from tfmq_fx.reconstruction.time_path_layers import TimePathLayer, time_path_layers
from tfmq_fx.temporal.domain import time_path

__all__ = ["SWEEPS", "round_for_prediction"]

#: How often all channels of a group of layers are gone over.
SWEEPS = 3
#: What the diagonal of every layer's curvature gets, relative to its mean.
DAMPING = 1e-3


def round_for_prediction(
    prepared: fx.GraphModule,
    unit: TimePathUnit,
    config: ReconstructionConfig,
    samples: Samples,
    on_iteration: Callable[[int, float], None],
) -> UnitResult:
    """Choose the rounding of the temporal block by what its errors do to the result of the float model.

    Args:
        prepared: A graph with fake quantizers; those of the unit are updated in place.
        unit: The temporal block.
        config: Has the seed, which draws the probes and the order of channels.
        samples: Calibration samples.
        on_iteration: Called after each of the :data:`SWEEPS` with its number and the error.

    Returns:
        The mean squared change of the result over the domain, summed over its elements, before and after, as
        :class:`UnitResult`: to first order, as the probes see it.

    Raises:
        ReconstructionError: A layer cannot be rounded so: no linear, or not one row a timestep.
    """
    if not unit.weights:
        return UnitResult(unit.name, unit.kind, reason="its weights are not quantized")
    unit.observe(prepared)
    return _Rounding(prepared, unit, config, samples).result(on_iteration)


class _Rounding:
    """What the layers of the block see and give, and how the result moves with them."""

    def __init__(
        self, prepared: fx.GraphModule, unit: TimePathUnit, config: ReconstructionConfig, samples: Samples
    ) -> None:
        self.prepared, self.unit, self.config = prepared, unit, config
        self.layers = list(time_path_layers(prepared, unit))
        if len(self.layers) != len(unit.weights) or not all(is_linear(layer.layer) for layer in self.layers):
            msg = "a layer of the temporal block is no linear of its own: use temporal_objective='features'"
            raise ReconstructionError(msg)
        self.domain = sampled_domain(prepared, unit, config.seed)
        self.members = time_path(prepared, self.domain).nodes
        self.generator = torch.Generator().manual_seed(config.seed)
        timesteps, nodes = self.domain.values[self.domain.timestep], [layer.layer for layer in self.layers]
        model = float_graph(prepared)
        found = output_probes(model, nodes, samples, self.domain.timestep, timesteps, config.seed)
        entries = self.domain.chosen[self.domain.timestep]
        self.probes = {node: probes[entries] for node, probes in found.items()}
        sources = [self._source(layer) for layer in self.layers]
        with float_mode(quantizers_of(prepared).values()):
            self.targets = dict(zip(nodes, self._values(*nodes), strict=True))
        self.between = moments_between(model, nodes, self.domain)
        rows = {len(values) for values in (*self.targets.values(), *self._values(*sources))}
        if rows != {len(self.domain)}:
            msg = "a layer of the temporal block has several rows a timestep: use temporal_objective='features'"
            raise ReconstructionError(msg)

    def _source(self, layer: TimePathLayer) -> fx.Node:
        return argument_node(layer.layer, input_position(layer.layer))

    def _values(self, *nodes: fx.Node) -> list[Tensor]:
        values = evaluate_temporal_nodes(self.prepared, self.members, nodes, self.domain.columns())
        return [value.flatten(0, -2) for value in values]

    def result(self, on_iteration: Callable[[int, float], None]) -> UnitResult:
        """Round everything."""
        last = [layer for layer in self.layers if layer.layer in self.unit.outputs]
        groups = [[layer] for layer in self.layers if layer.layer not in self.unit.outputs] + [last]

        def choose() -> None:
            for group in groups:
                self._round(group)
                self.unit.observe(self.prepared)

        def error() -> float:
            outputs = self._values(*(layer.layer for layer in last))
            moved = [
                torch.einsum("tkc,tc->tk", self.probes[layer.layer], (output - self.targets[layer.layer]).float())
                for layer, output in zip(last, outputs, strict=True)
            ]
            return torch.stack(moved).sum(0).square().sum(1).mean().item()

        quantizers = list(self.unit.quantizers.values())
        result = keep_if_better(self.unit.name, self.unit.kind, quantizers, error(), choose, error, SWEEPS)
        for sweep in range(SWEEPS):
            on_iteration(sweep, result.after)
        return result

    def _round(self, group: list[TimePathLayer]) -> None:
        joint = [self._joint(layer) for layer in group]
        for alone in joint:
            round_alone(alone)
        round_together(joint, SWEEPS, self.generator)
        for layer, chosen in zip(group, joint, strict=True):
            layer.quantizer.put(chosen.integers.float().movedim(0, layer.quantizer.axis))

    def _joint(self, layer: TimePathLayer) -> JointLayer:
        quantizer = layer.quantizer
        weight = quantizer.seen_weight().movedim(quantizer.axis, 0).double()
        (inputs,) = (values.double() for values in self._values(self._source(layer)))
        low, high = (bound - quantizer.zero_point for bound in quantizer.bounds)
        between = self.between[layer.layer]
        prior = between + torch.eye(len(between), dtype=between.dtype) * DAMPING * inputs.square().sum() / len(between)
        with float_mode(quantizers_of(self.prepared).values()):
            (original,) = (values.double() for values in self._values(self._source(layer)))
        return JointLayer(
            weight=weight,
            scale=quantizer.scale[:, None].double(),
            low=low[:, None].double(),
            high=high[:, None].double(),
            inputs=inputs,
            target=original @ weight.T,
            probes=self.probes[layer.layer].double(),
            prior=prior,
        )
