"""A torchao quantizer that knows the temporal block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from tfmq_fx._torch.pt2e import Q_ANNOTATION_KEY
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.quantization import FLOAT_BITS, QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.notes import keep_notes
from tfmq_fx.frontend.program_stage import CONVERTED, describe, stage_of
from tfmq_fx.frontend.roles import output_nodes
from tfmq_fx.passes.analysis import TemporalBlock
from tfmq_fx.passes.analysis.table_row import several_timesteps
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.predicates import (
    fqn,
    is_attention,
    is_call,
    is_float_tensor,
    is_matmul,
    is_softmax_output,
    is_weighted,
    softmax_scores,
)
from tfmq_fx.passes.temporal.observe_timestep_groups import ungrouped_layers
from tfmq_fx.quantization.float_layers import FloatLayers, warn_unmatched_patterns
from tfmq_fx.quantization.quantizer_options import QuantizerOptions, schedule_values
from tfmq_fx.quantization.rewrites import rewrite_for_annotation
from tfmq_fx.quantization.specs import activation_spec, output_spec, softmax_spec, weight_spec
from tfmq_fx.quantization.timestep_observers import insert_timestep_observers
from tfmq_fx.temporal.calibrate import calibrate_temporal_block
from tfmq_fx.temporal.inputs import FiniteInputs, as_finite, finite_values

__all__ = ["TFMQQuantizer"]


class TFMQQuantizer(Quantizer):  # type: ignore[misc]  # torchao has no types
    """Annotates a diffusion model for PT2E: ``prepare_pt2e(graph, TFMQQuantizer(config, timesteps=…))``.

    Convolutions, linears and the two matrix products of attention get per-tensor activations and
    per-channel weights; activations inside the temporal block, and those that depend on the timestep and the
    conditioning alone, get one parameter set per timestep, with ``activation_groups`` the others one per group of
    timesteps.
    Layers that touch the model's sample or result stay float by default. Integer tensors and shape
    arithmetic are never annotated, nor is any node that another quantizer annotated before, so it
    composes with ``ComposableQuantizer``. Weights are stored as integers when the graph is converted, whatever
    ``convert_pt2e(fold_quantize=…)`` says: no ``quantize`` of a float weight gives what learned rounding has found.

    Args:
        config: What to quantize; W8A8 with FSC by default.
        timesteps: The timesteps of the schedule, e.g. ``scheduler.timesteps``: 1-d, integer or float.
            Needed when the model has a temporal block, or layers of the timestep and the conditioning alone.
        timestep: Name of the model's timestep input.
        finite: Further inputs from a finite set, such as ``("class_labels",)`` or ``{"class_labels": range(10)}``:
            the temporal block is then a function of the timestep and of them, with one row for every combination.

    Raises:
        ConfigError: From ``prepare_pt2e``, when the model has a temporal block and no timesteps are given, or
            the values of a finite input are not known.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        timesteps: Tensor | Iterable[float] | None = None,
        timestep: str = "timestep",
        finite: FiniteInputs = (),
    ) -> None:
        super().__init__()
        values = None if timesteps is None else schedule_values(timesteps)
        self.options = QuantizerOptions(QuantizationConfig.of(config), values, timestep, as_finite(finite))

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Bring the graph into the form to annotate: exact rewrites, observers by timestep, their first ranges.

        The ranges of the temporal block come from the schedule, not from data. They are set here already, under float
        weights, because torchao's own workflow never calls :func:`tfmq_fx.calibrate`: it runs batches forward, which
        visit some timesteps, and converts. ``calibrate`` sets them again, once the weights' observers stand in the
        graph, to those that the quantized block has.
        """
        if PreparedState.find(model) is not None or stage_of(model) == CONVERTED:
            msg = f"a graph is prepared with TFMQQuantizer once, this is {describe(model)}"
            raise ConfigError(msg)
        keep_notes(model)
        rewrite_for_annotation(model, self.options)
        insert_timestep_observers(model, self.options)
        calibrate_temporal_block(model, self.options.timestep)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate every eligible node; attach a :class:`PreparedState`, which says what stays float and why."""
        config = self.options.config
        block = self.options.temporal_block(model)
        layers = FloatLayers.of(model, config, block)
        float_reasons: dict[str, str] = {}
        for node in model.graph.nodes:
            if is_attention(node) and (reason := layers.attention_reason(node)):
                float_reasons[fqn(node)] = reason
            if Q_ANNOTATION_KEY in node.meta or not (is_weighted(node) or is_matmul(node)):
                continue
            if reason := layers.reason(node):
                float_reasons[fqn(node)] = reason
            else:
                _annotate_layer(node, layers.config_of(node), exact=node in block and config.temporal == "shared")
        if config.output_bits not in (None, FLOAT_BITS):
            for node in filter(is_float_tensor, map(_before_cast, output_nodes(model.graph))):
                _annotate_output(node, config)
        self._state(model, block, float_reasons).attach(model)
        warn_unmatched_patterns(model, config)
        return model

    def _state(self, model: fx.GraphModule, block: TemporalBlock, float_reasons: dict[str, str]) -> PreparedState:
        """What the later stages need to know of the annotated graph."""
        options, conditions = self.options, self.options.conditions(model)
        finite = finite_values(model, options.finite)
        indexes = bool(block) or bool(conditions) or (options.config.activation_groups or 1) > 1
        timesteps = None
        if options.timesteps is not None and indexes and not several_timesteps(model, options.timestep):
            timesteps = tuple(options.timesteps.tolist())
        return PreparedState(
            config=options.config,
            timestep=options.timestep,
            timesteps=timesteps,
            finite={name: tuple(values.tolist()) for name, values in finite.items()} if block else {},
            conditions=conditions,
            kept_float=float_reasons,
            ungrouped=ungrouped_layers(model),
        )

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: every annotation is made from a valid configuration."""


def _annotate_layer(layer: fx.Node, config: QuantizationConfig, *, exact: bool) -> None:
    """Annotate the activations and the weight of a layer, whose configuration this is.

    Args:
        layer: A convolution, a linear or a matrix product.
        config: Its configuration.
        exact: Whether its activations have the range of all timesteps together.
    """
    specs: dict[fx.Node, QuantizationSpec] = {}
    matmul = is_matmul(layer)
    if config.activation_bits < FLOAT_BITS:
        for activation in layer.args[: 2 if matmul else 1]:
            assert isinstance(activation, fx.Node)
            if activation.op == "call_module":  # an observer by timestep stands there already
                continue
            if matmul and is_softmax_output(activation):
                specs[activation] = _annotate_softmax(activation, fqn(layer), config)
                continue
            symmetric = config.symmetric_activations or (matmul and config.symmetric_attention)
            specs[activation] = activation_spec(config, fqn(layer), exact=exact, symmetric=symmetric)
    if not matmul and config.weight_bits < FLOAT_BITS:
        weight = layer.args[1]
        assert isinstance(weight, fx.Node)
        specs[weight] = weight_spec(config, fqn(layer))
    layer.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)


def _annotate_softmax(weights: fx.Node, layer: str, config: QuantizationConfig) -> QuantizationSpec:
    """The spec of the weights of attention; the sum that divides their product adds up what the product reads."""
    spec = softmax_spec(config, layer, deferred=softmax_scores(weights) is not None)
    for user in weights.users:
        if is_call(user, torch.ops.aten.sum.dim_IntList) and Q_ANNOTATION_KEY not in user.meta:
            user.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map={weights: spec}, _annotated=True)
    return spec


def _annotate_output(result: fx.Node, config: QuantizationConfig) -> None:
    """Quantize what the model returns; a layer that is annotated already keeps its inputs' annotation."""
    annotation = result.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
    if annotation.output_qspec is None:
        annotation.output_qspec = output_spec(config, result.name)


def _before_cast(result: fx.Node) -> fx.Node:
    """A result as it was computed, before the cast to the type that the model returns it in."""
    return argument_node(result, 0) if is_call(result, torch.ops.aten.to.dtype) else result
