"""The configuration of a quantization run: frozen, checked on construction, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfmq_fx.config.bits import FLOAT_BITS, NARROW_BITS
from tfmq_fx.config.checks import check_fields
from tfmq_fx.config.choices import Lookup, TableStorage, Temporal, UnknownTimestep, WeightRange
from tfmq_fx.config.field_checks import FIELD_CHECKS
from tfmq_fx.config.frozen_mapping import FrozenMapping, freeze, thaw
from tfmq_fx.config.overrides import ROLES, checked_overrides, names_layer
from tfmq_fx.config.presets import find_preset
from tfmq_fx.config.reconstruction import RECONSTRUCTIONS, ReconstructionConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.observers.registry import check_activation_observer

__all__ = ["FLOAT_BITS", "ROLES", "QuantizationConfig"]


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized, and how. Frozen and hashable: lists become tuples, mappings become read-only.

    Attributes:
        weight_bits: Weight width, per output channel: 2 to 8, 16, or 32 for float.
        activation_bits: Activation width, per tensor: 2 to 8, 16, or 32 for float.
        temporal: How the activations inside the temporal block are quantized: ``"fsc"``, one parameter
            set per timestep (TFMQ-DM, CVPR 2024, section 5); ``"cache"``, the float block's features are
            stored per timestep and the block is gone (arXiv 2407.19547); ``"auto"``, per embedding layer
            what is closer to float of the two, as a table; ``"shared"``, one set for all timesteps, the
            min-max of them all; ``"observed"``, one set for all timesteps, observed over the calibration data by
            ``activation_range`` like any other activation's (the baselines of the papers); ``"float"``, the block
            is left alone. Of arXiv 2407.19547 only the abstract and the authors' page were read: from there are the
            stored, quantized features, and that the temporal feature error chooses between them and the quantized
            block. Our reading is how: one choice a layer for all timesteps, by the squared error over the schedule,
            between rows with parameters of their own and the block under ``"fsc"``.
            With the first three, layers that depend on the timestep and the conditioning alone (SDXL, LCM, SD3) have
            one set per timestep too; with the others they are quantized as any layer.
        table: How a table of temporal features is stored: ``"float32"``, ``"float16"`` or ``"int8"``
            (parameters per timestep and feature); None is int8 for ``"cache"`` and ``"auto"``, else float32.
        weight_range: How a weight channel's range is chosen: ``"minmax"`` or ``"mse"`` (L2.4 search);
            ``None`` takes min-max at 8 bits and more, the search below.
        activation_range: ``"ema"``, the min-max of each timestep, smoothed over timesteps with bias correction (over
            batches where they are observed without :func:`tfmq_fx.calibrate`); ``"minmax"``, of all batches together;
            ``"mse"`` (L2.4 search); or a name of :func:`tfmq_fx.observers.register_activation_observer`.
        activation_groups: How many groups of timesteps have activation ranges of their own, outside the temporal
            block: the timesteps in the order of their noise are cut into this many contiguous groups, each with one
            per-tensor range (ADP-DM, arXiv 2305.18723); as many as timesteps or more is one range per timestep (TDQ,
            NeurIPS 2023). 1 is one range for all. None is 50 groups where ``temporal`` makes a table, those of few
            calibration items with their neighbours' ranges; 1 where activations are symmetric or it makes none.
        symmetric_weights: Whether weights have zero point 0; ``None`` takes True at 8 bits and more, where
            an asymmetric weight would not fit the integer kernels, and False below, where it does.
        symmetric_activations: Whether activations get the zero point in the middle of the integer range (128 at 8
            bits, so they still lower) and a range ``[-max|x|, max|x|]``. Softmax outputs, which are never negative,
            and activations with parameters per timestep stay asymmetric. Source: PTQ4DM (CVPR 2023).
        defer_softmax: Whether attention divides by the sum of a softmax behind its second product: what is quantized
            are the numerators ``exp(s - max s)``, whose range is ``[0, 1]`` whatever the scores are. False quantizes
            the softmax, by an observed range.
        symmetric_attention: The same for the operands of attention's two matrix products alone: engines with integer
            products (``backend="openvino"``) take symmetric ones, and then run the whole of attention in integers.
        softmax_bits: Width of the attention weights (the softmax output that multiplies the values): 8, or 16,
            which is computed in float; None takes ``activation_bits``. Where ``keep_float`` has ``"attention"`` or
            activations are float, it stands unused. Source: Q-Diffusion (ICCV 2023), section 4.
        shortcut_bits: Width of the activations that projection shortcuts read (the role ``"shortcut"``: pointwise
            convolutions beside a residual branch), where they are quantized and ``activation_bits`` is less. No norm
            bounds a residual stream, and what rounding it loses goes into the sum as it is; such layers have few
            products, and our kernels multiply both bytes. Other engines compute them in float. None takes
            ``activation_bits``.
        output_bits: Width of the model's result, rounded by a quantize/dequantize at the end of the graph, one range
            per tensor: 2 to 8 or 16; None leaves it float. Source: PTQ4DM (CVPR 2023), which quantizes the network's
            noise, mean and variance.
        keep_float: What stays float: roles (``"input"``, ``"output"``: the layers that touch the model's
            sample and its result; ``"attention"``: the two matrix products of attention; ``"shortcut"``), or patterns
            of fully qualified names such as ``"mid_block.*"``.
        overrides: Per role or pattern of fully qualified names, as in ``keep_float``, other values of
            ``weight_bits``, ``activation_bits``, ``weight_range``, ``symmetric_weights``, ``low_rank`` or
            ``shortcut_bits``; the first match holds. ``{"input": {"weight_bits": 8}, "output": {"weight_bits": 8}}``
            with ``keep_float=()`` is the first and last layer at 8 bits. What ``keep_float`` names stays float all the
            same.
        scale_channels: Whether channels of an activation that do not share a range are scaled, by factors that the
            weights behind them take back, where that leaves less rounding noise in the layer's output; the float
            function stays as it is. It needs ranges by timestep (``activation_groups``), ``"ema"`` or ``"minmax"``.
            Source: SmoothQuant (ICML 2023).
        low_rank: Rank of a branch beside each layer, which takes the largest part of its weight over and reads its
            input unquantized: what is quantized is small then. It has 8-bit weights, and half the work of its layer at
            most: in narrow layers its rank is lower. Grouped convolutions and the temporal block have none. It helps
            activations of few bits, and costs time and size; None is no branch. Source: SVDQuant (ICLR 2025).
        split_concatenations: Whether a conv that reads a concatenation gets a scale per part.
        unknown_timestep: What a timestep outside the table does: ``"extend"`` computes it with exact parameters of its
            own, which takes no data, and keeps the result; ``"error"`` names it; ``"nearest"`` takes the parameters
            (lowered: the features) of the closest row. A graph that is called by itself, without a denoiser or a
            program, cannot extend its table: there ``"extend"`` is ``"error"``.
        reconstruction: How weights are rounded: a :class:`ReconstructionConfig`, its fields, or a name (``"nearest"``,
            ``"gptq"``, ``"efficientdm"``, ``"tfmq-dm"``, ``"brecq"``, ``"adaround"``, ``"tiar"``). With None,
            :func:`tfmq_fx.quantize` takes GPTQ where weights have 6 bits or fewer, in an override too, else it rounds
            to nearest. Stage by stage, weights are rounded to nearest unless :func:`tfmq_fx.reconstruct` is called.

    Raises:
        ConfigError: A value is of another type than its field or outside what it admits.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    temporal: Temporal = "fsc"
    table: TableStorage | None = None
    weight_range: WeightRange | None = None
    activation_range: str = "ema"
    activation_groups: int | None = None
    symmetric_weights: bool | None = None
    symmetric_activations: bool = False
    symmetric_attention: bool = False
    defer_softmax: bool = True
    softmax_bits: int | None = None
    shortcut_bits: int | None = 16
    output_bits: int | None = None
    keep_float: tuple[str, ...] = ("input", "output")
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=FrozenMapping)
    scale_channels: bool = True
    low_rank: int | None = None
    split_concatenations: bool = True
    unknown_timestep: UnknownTimestep = "extend"
    reconstruction: ReconstructionConfig | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name, check in FIELD_CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        check_activation_observer(self.activation_range, grouped=(self.activation_groups or 1) > 1)
        object.__setattr__(self, "reconstruction", ReconstructionConfig.of(self.reconstruction))
        if self.symmetric_weights is False and self.weight_bits == 8:
            msg = (
                "symmetric_weights=False needs weight_bits of at most 7: "
                "an asymmetric 8-bit weight does not fit the integer kernels"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "overrides", freeze(checked_overrides(self)))

    @classmethod
    def of(cls, value: Any) -> QuantizationConfig:
        """``value``, or the default for None.

        Raises:
            ConfigError: It is something else, such as a dictionary.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        hint = "pass QuantizationConfig(**values)" if isinstance(value, dict) else "pass a tfmq_fx.QuantizationConfig"
        msg = f"the configuration is a {type(value).__name__}; {hint}"
        raise ConfigError(msg)

    @classmethod
    def preset(cls, name: str, **values: Any) -> QuantizationConfig:
        """Return the configuration of a published method with ``values`` on top.

        :data:`tfmq_fx.config.presets.PRESETS` lists the methods, with what each needs beside its configuration (how
        calibration timesteps are drawn, a wrapped scheduler). Those that learn rounding bring their
        ``reconstruction``; ``reconstruction="nearest"`` rounds to nearest instead.

        Raises:
            ConfigError: There is no such preset.
        """
        return cls(**find_preset(name).with_values(values))

    def keeps_float(self, fqn: str, roles: frozenset[str]) -> str | None:
        """The entry of ``keep_float`` that keeps a layer with this name and these roles, or None."""
        return next((entry for entry in self.keep_float if names_layer(entry, fqn, roles)), None)

    def for_layer(self, fqn: str, roles: frozenset[str] = frozenset()) -> QuantizationConfig:
        """This configuration with the first override applied that matches a layer of this name and these roles."""
        values = next((own for entry, own in self.overrides.items() if names_layer(entry, fqn, roles)), None)
        layer = self if values is None else dataclasses.replace(self, overrides={}, **values)
        wide = layer.activation_bits if "shortcut" not in roles else layer.of_shortcuts(layer.activation_bits)
        return layer if wide == layer.activation_bits else dataclasses.replace(layer, activation_bits=wide)

    def of_shortcuts(self, activation_bits: int) -> int:
        """The width of what a shortcut reads, where its activations would have this one."""
        return max(activation_bits, self.shortcut_bits or 0)

    @property
    def quantizes_attention(self) -> bool:
        """Whether a product of attention may be quantized: by the width of all, or by that of its role."""
        if "attention" in self.keep_float:
            return False
        if "attention" not in self.overrides:
            return self.activation_bits < FLOAT_BITS
        # A pattern that stands before the role may name some products too.
        first = list(self.overrides)[: list(self.overrides).index("attention") + 1]
        return any(self.overrides[entry].get("activation_bits", self.activation_bits) < FLOAT_BITS for entry in first)

    @property
    def lookup(self) -> Lookup:
        """What a lookup inside a graph does with a timestep outside the table."""
        return "nearest" if self.unknown_timestep == "nearest" else "error"

    @property
    def tabulates(self) -> bool:
        """Whether conversion turns the temporal block into a table."""
        return self.temporal in ("cache", "auto")

    @property
    def resolved_table(self) -> TableStorage:
        """``table`` with its default filled in."""
        return self.table or ("int8" if self.tabulates else "float32")

    @property
    def resolved_weight_range(self) -> WeightRange:
        """``weight_range`` with its default filled in."""
        return self.weight_range or ("minmax" if self.weight_bits >= 8 else "mse")

    @property
    def resolved_symmetric_weights(self) -> bool:
        """``symmetric_weights`` with its default filled in."""
        return self.weight_bits >= 8 if self.symmetric_weights is None else self.symmetric_weights

    @property
    def resolved_reconstruction(self) -> ReconstructionConfig | None:
        """``reconstruction`` with its default filled in; None for rounding to nearest."""
        widths = (self.weight_bits, *(values.get("weight_bits", FLOAT_BITS) for values in self.overrides.values()))
        default = "gptq" if min(widths) <= NARROW_BITS else "nearest"
        chosen = self.reconstruction or RECONSTRUCTIONS[default]
        return None if chosen.method == "nearest" else chosen

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain JSON values."""
        fields: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        if self.reconstruction is not None:
            fields["reconstruction"] = dataclasses.asdict(self.reconstruction)
        plain: dict[str, Any] = json.loads(json.dumps(thaw(fields)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: A field is unknown or its value not valid.
        """
        return cls(**check_fields(values, [entry.name for entry in dataclasses.fields(cls)], "configuration"))
