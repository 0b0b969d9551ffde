"""A torchao quantizer that knows the temporal block."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from tfmq_fx._torch.core import Q_ANNOTATION_KEY
from tfmq_fx.config.quantization import FLOAT_BITS, ROLES, QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.canonical import canonicalize
from tfmq_fx.frontend.notes import keep_notes, update_notes
from tfmq_fx.frontend.roles import find_roles, output_nodes, sample_inputs
from tfmq_fx.observers import (
    ConditionalObserver,
    EMAMinMaxObserver,
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    GroupedObserver,
    MinMaxObserver,
    MSEObserver,
    PerChannelWeightObserver,
    TimestepObserver,
)
from tfmq_fx.observers.finite import input_of, output_of, weight_of
from tfmq_fx.passes import (
    DecomposeAttention,
    FlattenFrameConvs,
    FlattenLinearInputs,
    GroupTimesteps,
    IndexTimesteps,
    ObserveTemporalBlock,
    ObserveTimestepGroups,
    ShareTemporalNodes,
    SinkRepeatedRows,
    SplitConcatenatedConvs,
    WidenSequenceConvs,
)
from tfmq_fx.passes.analysis import (
    TemporalBlock,
    conditioning_inputs,
    data_dependence,
    find_temporal_block,
    row_columns,
    several_timesteps,
)
from tfmq_fx.passes.support.predicates import (
    fqn,
    is_attention,
    is_call,
    is_conv,
    is_float_tensor,
    is_linear,
    is_matmul,
    is_softmax_output,
    is_weighted,
)
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps
from tfmq_fx.passes.temporal.observe_timestep_groups import UNGROUPED
from tfmq_fx.quantization.stage_checks import CONVERTED, check_config, describe, stage_of
from tfmq_fx.temporal.accepted_timesteps import accept_timesteps
from tfmq_fx.temporal.finite_inputs import FiniteInputs, finite_values
from tfmq_fx.temporal.finite_set_calibration import calibrate_temporal_block

__all__ = ["META_KEY", "TFMQQuantizer"]

#: Where a graph carries what later stages need to know about its quantization.
META_KEY = "tfmq_fx.quantization"

ACTIVATION_OBSERVERS = {"ema": EMAMinMaxObserver, "minmax": MinMaxObserver, "mse": MSEObserver}
GROUPED_OBSERVERS: dict[str, type[GroupedObserver]] = {
    "ema": GroupedEMAObserver,
    "minmax": GroupedMinMaxObserver,
    "mse": GroupedMSEObserver,
}


class TFMQQuantizer(Quantizer):  # type: ignore[misc]
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
        self.config = check_config(config)
        self.timesteps = None if timesteps is None else _timestep_values(timesteps)
        self.timestep = timestep
        self.finite = finite

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Bring the graph into the form to annotate: exact rewrites, then the temporal observers."""
        config = self.config
        if META_KEY in model.meta or stage_of(model) == CONVERTED:
            msg = f"a graph is prepared with TFMQQuantizer once, this is {describe(model)}"
            raise ConfigError(msg)
        keep_notes(model)
        canonicalize(model)
        if self.timesteps is not None:
            accept_timesteps(model, self.timesteps, self.timestep)
        if config.activation_bits < FLOAT_BITS and "attention" not in config.keep_float:
            DecomposeAttention()(model)
        if config.split_concatenations:
            SplitConcatenatedConvs()(model)
        FlattenFrameConvs()(model)
        WidenSequenceConvs()(model)
        FlattenLinearInputs()(model)
        SinkRepeatedRows(timestep=self.timestep)(model)
        conditions = self._conditions(model)
        ShareTemporalNodes(timestep=self.timestep, finite=(*self.finite, *conditions))(model)
        block = self._block(model)
        if block:
            self._index(model, block)
        if conditions:
            self._index_conditional(model, block, conditions)
        if config.activation_groups > 1:
            self._group(model, block)
        return model

    def _block(self, model: fx.GraphModule) -> TemporalBlock:
        return find_temporal_block(model, self.timestep, finite=tuple(self.finite))

    def _conditions(self, model: fx.GraphModule) -> tuple[str, ...]:
        """The further inputs that layers of the time path depend on, those of ``finite`` excepted."""
        samples = {str(node.target) for node in sample_inputs(model.graph, self.timestep)}
        found = conditioning_inputs(model, samples, self.timestep)
        return tuple(name for name in found if name not in self.finite)

    def _index(self, model: fx.GraphModule, block: TemporalBlock) -> None:
        if self.config.temporal in ("shared", "float"):
            return
        timesteps = self._needed_timesteps(f"a temporal block ({len(block.linears)} linears)")
        if self.config.temporal == "cache":
            return
        self._insert_row(model, timesteps)
        count = len(row_columns(model)[self.timestep])

        def make_observer(linear: fx.Node) -> TimestepObserver:
            name = fqn(linear)
            return TimestepObserver(count, self.config.for_layer(name).activation_bits, input_of(name))

        ObserveTemporalBlock(make_observer, timestep=self.timestep, select=self._indexes)(model)
        calibrate_temporal_block(model, self.timestep)

    def _needed_timesteps(self, what: str) -> Tensor:
        if self.timesteps is None:
            msg = (
                f"the model has {what}, so its timesteps are needed: "
                "pass timesteps=scheduler.timesteps, or configure temporal='float'"
            )
            raise ConfigError(msg)
        return self.timesteps

    def _insert_row(self, model: fx.GraphModule, timesteps: Tensor) -> None:
        finite, unknown = finite_values(model, self.finite), self.config.lookup
        IndexTimesteps(timesteps, timestep=self.timestep, unknown=unknown, finite=finite)(model)

    def _index_conditional(self, model: fx.GraphModule, block: TemporalBlock, conditions: tuple[str, ...]) -> None:
        """Observe by timestep what depends on the timestep and the conditioning, and never on the sample."""
        if self.config.temporal in ("shared", "float"):
            return
        timesteps = self._needed_timesteps(f"layers of {self.timestep!r} and {', '.join(map(repr, conditions))}")
        self._insert_row(model, timesteps)
        count = len(distinct_timesteps(timesteps))
        GroupTimesteps(count, EACH_TIMESTEP)(model)
        path = find_temporal_block(model, self.timestep, finite=(*self.finite, *conditions))
        roles, dependence = find_roles(model, self.timestep), data_dependence(model)

        def bits(layer: fx.Node) -> int:
            return self.config.for_layer(fqn(layer)).activation_bits

        def select(layer: fx.Node, activation: fx.Node) -> bool:
            # The path has layers of the conditioning alone too: they see the same at every timestep.
            inside = layer in path and layer not in block and self.timestep in dependence[activation]
            eligible = Q_ANNOTATION_KEY not in layer.meta and bits(layer) < FLOAT_BITS
            return inside and eligible and not self._float_reason(layer, block, roles.get(layer, frozenset()))

        def make_observer(layer: fx.Node) -> ConditionalObserver:
            return ConditionalObserver(count, bits(layer), input_of(fqn(layer)))

        ObserveTimestepGroups(make_observer, select=select, key=bits, groups=EACH_TIMESTEP)(model)
        _warn_of_ungrouped(model, "timesteps")

    def _group(self, model: fx.GraphModule, block: TemporalBlock) -> None:
        """Observe by timestep group what lies outside the temporal block and changes with the noise."""
        if self.timesteps is None:
            count = self.config.activation_groups
            msg = f"activation_groups={count} needs the timesteps to group: pass timesteps=scheduler.timesteps"
            raise ConfigError(msg)
        inputs = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
        if self.timestep not in inputs:
            msg = f"activation_groups needs the timestep: the model has no input {self.timestep!r}, only {inputs}"
            raise ConfigError(msg)
        self._insert_row(model, self.timesteps)
        GroupTimesteps(self.config.activation_groups)(model)
        count = min(self.config.activation_groups, len(distinct_timesteps(self.timesteps)))
        roles, dependence = find_roles(model, self.timestep), data_dependence(model)
        noisy = {self.timestep, *(str(node.target) for node in sample_inputs(model.graph, self.timestep))}

        def select(layer: fx.Node, activation: fx.Node) -> bool:
            # What neither the sample nor the timestep reaches, such as a text's projections, is the same at every step.
            reached = bool(noisy & dependence[activation])
            bits = self.config.for_layer(fqn(layer)).activation_bits
            eligible = Q_ANNOTATION_KEY not in layer.meta and bits < FLOAT_BITS and layer not in block
            return reached and eligible and not self._float_reason(layer, block, roles.get(layer, frozenset()))

        def make_observer(layer: fx.Node) -> GroupedObserver:
            name = fqn(layer)
            bits = self.config.for_layer(name).activation_bits
            return GROUPED_OBSERVERS[self.config.activation_range](count, bits, input_of(name))

        def key(layer: fx.Node) -> int:
            return self.config.for_layer(fqn(layer)).activation_bits

        ObserveTimestepGroups(make_observer, select=select, key=key)(model)
        _warn_of_ungrouped(model, "timestep groups")

    def _indexes(self, linear: fx.Node) -> bool:
        """Whether a temporal linear's input gets timestep-indexed parameters."""
        name = fqn(linear)
        config = self.config.for_layer(name)
        return config.activation_bits < FLOAT_BITS and config.keeps_float(name, frozenset()) is None

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate every eligible node; note in ``model.meta`` what stays float and why."""
        roles = find_roles(model, self.timestep)
        block, conditions = self._block(model), self._conditions(model)
        finite = finite_values(model, self.finite)
        grouped = self.config.activation_groups > 1
        kept: dict[str, str] = {}
        for node in model.graph.nodes:
            if is_attention(node) and (reason := self._attention_reason(node)):
                kept[fqn(node)] = reason
            if Q_ANNOTATION_KEY in node.meta or not (is_weighted(node) or is_matmul(node)):
                continue
            reason = self._float_reason(node, block, roles.get(node, frozenset()))
            if reason:
                kept[fqn(node)] = reason
            else:
                self._annotate(node, node in block)
        if self.config.output_bits not in (None, FLOAT_BITS):
            for node in filter(is_float_tensor, map(_computed, output_nodes(model.graph))):
                self._annotate_output(node)
        model.meta[META_KEY] = {
            "config": self.config.to_dict(),
            "timestep": self.timestep,
            "timesteps": self.timesteps.tolist()
            if self.timesteps is not None
            and (block or conditions or grouped)
            and not several_timesteps(model, self.timestep)
            else None,
            "finite": {name: values.tolist() for name, values in finite.items()} if block else {},
            "conditions": list(conditions),
            "kept_float": kept,
        }
        update_notes(model)
        self._warn_of_unmatched(model)
        return model

    def _warn_of_unmatched(self, model: fx.GraphModule) -> None:
        """Say which patterns are the names of no layer: a typing error would change nothing without a word."""
        names = [fqn(node) for node in model.graph.nodes if is_weighted(node) or is_matmul(node)]
        kept = [entry for entry in self.config.keep_float if entry not in ROLES]
        for field, patterns in (("keep_float", kept), ("overrides", list(self.config.overrides))):
            alone = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]
            if alone:
                shown = ", ".join(map(repr, alone))
                warnings.warn(f"{field} has {shown}, which matches no layer of this model", stacklevel=3)

    def _float_reason(self, node: fx.Node, block: TemporalBlock, roles: frozenset[str]) -> str:
        """Why ``node`` stays float, or ``""``."""
        name = fqn(node)
        if not all(is_float_tensor(argument) for argument in _operands(node)):
            return "its operands are not floating-point tensors"
        if node in block and self.config.temporal in ("float", "cache"):
            return f"temporal={self.config.temporal!r}"
        entry = self.config.keeps_float(name, roles)
        if entry is not None and not (entry in ("input", "output") and node in block):
            return f"keep_float has {entry!r}"
        if is_matmul(node):
            return "activation_bits=32" if self.config.for_layer(name).activation_bits == FLOAT_BITS else ""
        if not (is_conv(node) or is_linear(node)):
            return "transposed convolutions are not quantized"
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        config = self.config.for_layer(name)
        if config.weight_bits == FLOAT_BITS and config.activation_bits == FLOAT_BITS:
            return "weight_bits=32 and activation_bits=32"
        return ""

    def _attention_reason(self, node: fx.Node) -> str:
        """Why attention was left fused, or ``""`` where that is not the configuration's doing."""
        entry = self.config.keeps_float(fqn(node), frozenset(("attention",)))
        if entry is not None:
            return f"keep_float has {entry!r}"
        return "activation_bits=32" if self.config.for_layer(fqn(node)).activation_bits == FLOAT_BITS else ""

    def _annotate(self, node: fx.Node, temporal: bool) -> None:
        name = fqn(node)
        config = self.config.for_layer(name)
        specs: dict[fx.Node, QuantizationSpec] = {}
        activations = list(node.args[:2]) if is_matmul(node) else [node.args[0]]
        if config.activation_bits < FLOAT_BITS:
            for activation in activations:
                assert isinstance(activation, fx.Node)
                if activation.op != "call_module":  # a timestep-indexed observer stands there already
                    softmax = is_matmul(node) and is_softmax_output(activation)
                    symmetric = config.symmetric_activations or (is_matmul(node) and config.symmetric_attention)
                    specs[activation] = _activation_spec(
                        config, name, shared_temporal=temporal, softmax=softmax, symmetric=symmetric
                    )
        if not is_matmul(node) and config.weight_bits < FLOAT_BITS:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            specs[weight] = _weight_spec(config, name)
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)

    def _annotate_output(self, node: fx.Node) -> None:
        """Quantize what the model returns; a layer that is annotated already keeps its inputs' annotation."""
        annotation = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
        if annotation.output_qspec is None:
            annotation.output_qspec = _output_spec(self.config, node.name)

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: every annotation is made from a valid configuration."""


def _warn_of_ungrouped(model: fx.GraphModule, what: str) -> None:
    if alone := model.meta.get(UNGROUPED):
        layer, reason = next(iter(alone.items()))
        warnings.warn(
            f"{len(alone)} layers keep one activation range for all {what}, {layer!r} for one: {reason}", stacklevel=3
        )


def _timestep_values(timesteps: Tensor | Iterable[float]) -> Tensor:
    if isinstance(timesteps, Tensor) and (timesteps.is_meta or timesteps.is_complex()):
        msg = f"timesteps must be real numbers that are there, not {timesteps.dtype} on {timesteps.device}"
        raise ConfigError(msg)
    try:
        given = timesteps if isinstance(timesteps, Tensor) else [float(t) for t in timesteps]
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"timesteps must be numbers, such as scheduler.timesteps: {error}"
        raise ConfigError(msg) from error
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        msg = (
            "timesteps must hold at least one value and only finite ones; pass scheduler.timesteps after set_timesteps"
        )
        raise ConfigError(msg)
    return values.reshape(-1)


def _computed(result: fx.Node) -> fx.Node:
    """A result as it was computed, before the cast to the type that the model returns it in."""
    return result.args[0] if is_call(result, torch.ops.aten.to.dtype) else result  # type: ignore[return-value]


def _operands(node: fx.Node) -> list[Any]:
    return list(node.args[:2])


def _activation_spec(
    config: QuantizationConfig, layer: str, *, shared_temporal: bool, softmax: bool, symmetric: bool
) -> QuantizationSpec:
    # A temporal range shared by all timesteps is the union of theirs; smoothing it would clip some.
    observer: Any = MinMaxObserver if shared_temporal else ACTIVATION_OBSERVERS[config.activation_range]
    bits = (config.softmax_bits if softmax else None) or config.activation_bits
    # Nothing of a softmax is negative: its zero point comes out as 0, and the middle would waste a bit.
    return _per_tensor_spec(observer, bits, input_of(layer), symmetric=symmetric and not softmax)


def _output_spec(config: QuantizationConfig, output: str) -> QuantizationSpec:
    assert config.output_bits is not None
    observer = ACTIVATION_OBSERVERS[config.activation_range]
    return _per_tensor_spec(observer, config.output_bits, output_of(output), symmetric=config.symmetric_activations)


def _per_tensor_spec(observer: Any, bits: int, subject: str, *, symmetric: bool) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8 if bits <= 8 else torch.int32,
        observer_or_fake_quant_ctr=observer.with_args(subject=subject),
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )


def _weight_spec(config: QuantizationConfig, layer: str) -> QuantizationSpec:
    observer = PerChannelWeightObserver.with_args(
        bits=config.weight_bits,
        symmetric=config.resolved_symmetric_weights,
        search=config.resolved_weight_range == "mse",
        subject=weight_of(layer),
    )
    wide = config.weight_bits > 8
    return QuantizationSpec(
        dtype=torch.int16 if wide else torch.int8,
        observer_or_fake_quant_ctr=observer,
        quant_min=-(2 ** (min(config.weight_bits, 16) - 1)),
        quant_max=2 ** (min(config.weight_bits, 16) - 1) - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
