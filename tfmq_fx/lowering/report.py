"""The lowering report: which layers run on integer kernels, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tfmq_fx.passes.nodes import read_attribute
from tfmq_fx.passes.predicates import is_call, is_conv, is_matmul, is_weighted, module_path, node_value
from tfmq_fx.temporal_choice import TemporalChoice

__all__ = [
    "LoweringReport",
    "Measurement",
    "ReportEntry",
    "classify",
    "in_float",
    "layers",
    "match_kernels",
    "read_kernels",
    "reads_one_channel",
]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
WEIGHT = decomposed.dequantize_per_channel.default
PER_TENSOR = (decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_tensor.tensor)
PER_ITEM = decomposed.dequantize_per_channel.default
#: What oneDNN's integer kernels cover through Inductor.
INTEGER_OPERATORS = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)


@dataclass(frozen=True)
class ReportEntry:
    """One layer: its name, its operator, the kernel it runs on (``"integer"`` or ``"float"``), and why."""

    name: str
    operator: str
    kernel: str
    reason: str = ""
    eligible: bool = False


@dataclass(frozen=True)
class Measurement:
    """What ``backend="auto"`` found out about a candidate: its median time a call, or why it has none."""

    backend: str
    precision: str | None
    milliseconds: float | None
    reason: str = ""

    def __str__(self) -> str:
        """One line."""
        name = self.backend if self.precision is None else f"{self.backend} ({self.precision})"
        return f"{name}: {self.reason}" if self.milliseconds is None else f"{name}: {self.milliseconds:.2f} ms"


@dataclass(frozen=True)
class LoweringReport:
    """What lowering did to every conv, linear and attention product.

    Attributes:
        backend: The backend.
        entries: One per layer that multiplies, in graph order.
        temporal_layers: Layers of the temporal block that run at inference; 0 when it is tabulated.
        table_rows: Timesteps in the table.
        parity_error: Relative error of the lowered program against the reference on the example inputs.
        parity_floor: The same between two reference runs whose inputs differ by float rounding.
        conditioning: Which layers depend on the timestep and the conditioning alone, in a sentence.
        kernels: Whose integer kernels these are, where a backend has several, and what passes between them.
        measured: With ``backend="auto"``, the candidates that were timed in turn on the example inputs, the fastest
            first, which is the one that was taken; then those that dropped out.
        temporal_choices: With ``temporal="auto"``, whose rows the table holds, feature by feature.
    """

    backend: str
    entries: tuple[ReportEntry, ...] = field(default=())
    temporal_layers: int = 0
    table_rows: int = 0
    parity_error: float = 0.0
    parity_floor: float = 0.0
    conditioning: str = ""
    kernels: str = ""
    measured: tuple[Measurement, ...] = field(default=())
    temporal_choices: tuple[TemporalChoice, ...] = ()

    @property
    def eligible(self) -> int:
        """Layers whose operands are quantized in a form that the backend has an integer kernel for."""
        return sum(entry.eligible for entry in self.entries)

    @property
    def integer_kernels(self) -> int:
        """Layers that run on integer kernels."""
        return sum(entry.kernel == "integer" for entry in self.entries)

    @property
    def annotated(self) -> int:
        """Layers with at least one quantized operand."""
        return sum(entry.eligible or entry.reason in UNSUPPORTED for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "backend": self.backend,
            "integer_kernels": self.integer_kernels,
            "eligible": self.eligible,
            "annotated": self.annotated,
            "temporal_layers": self.temporal_layers,
            "table_rows": self.table_rows,
            "parity_error": self.parity_error,
            "parity_floor": self.parity_floor,
            "conditioning": self.conditioning,
            "kernels": self.kernels,
            "measured": [asdict(measurement) for measurement in self.measured],
            "temporal_choices": [choice.to_dict() for choice in self.temporal_choices],
            "entries": [asdict(entry) for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoweringReport:
        """The inverse of :meth:`to_dict`."""
        entries = tuple(ReportEntry(**entry) for entry in values["entries"])
        measured = tuple(Measurement(**measurement) for measurement in values.get("measured", ()))
        names = ("backend", "temporal_layers", "table_rows", "parity_error", "parity_floor", "conditioning")
        choices = tuple(TemporalChoice(**choice) for choice in values.get("temporal_choices", ()))
        scalars = {name: values[name] for name in names} | {"kernels": values.get("kernels", "")}
        return cls(entries=entries, measured=measured, temporal_choices=choices, **scalars)

    def __str__(self) -> str:
        """A summary line, then every layer that stays float with its reason."""
        kernels = f" of {self.kernels}" if self.kernels else ""
        lines = [
            f"{self.backend}: {self.integer_kernels} of {self.eligible} eligible layers on integer kernels{kernels}, "
            f"{self.temporal_layers} temporal layers at run time ({self.table_rows} table rows), "
            f"parity error {self.parity_error:.1e} (rounding alone: {self.parity_floor:.1e})"
        ]
        lines += [f"  conditioning: {self.conditioning}"] if self.conditioning else []
        if self.measured:
            best, *others = self.measured
            lines.append(f"  fastest of {len(self.measured)}, timed in turn, median: {best}")
            lines += [f"    {other}" for other in others]
        lines += [f"  table: {choice}" for choice in self.temporal_choices]
        lines += [f"  float: {e.name} ({e.operator}): {e.reason}" for e in self.entries if e.kernel == "float"]
        return "\n".join(lines)


INTEGER_DTYPES = (torch.uint8, torch.int8)
NO_MATMUL = "its operands are quantized, but this backend has no integer kernel for a product of two activations"
NO_EXACT_BYTES = "this processor has no VNNI: oneDNN's sums of bytes could saturate, so it is computed in float"
NO_ACTIVATION = "only its weight is quantized"
NO_WEIGHT = "only its activation is quantized"
PER_ROW = "its activation has parameters per timestep, and the kernels take one set per call"
WIDE = "its operands are wider than 8 bits"
ONE_CHANNEL = "its input has one channel, whose memory layout the compiler of the integer kernel takes for another"
NO_OPERATOR = "its operands are quantized, but there is no integer kernel for this operator"
MISSED = "eligible, but the compiler left it in float"
EAGER = "the reference backend computes quantize/dequantize in float"
UNSUPPORTED = (NO_MATMUL, NO_ACTIVATION, NO_WEIGHT, PER_ROW, WIDE, ONE_CHANNEL, NO_OPERATOR)


def reads_one_channel(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution of a one-channel input: channels last and first are one layout there."""
    source = node.args[0]
    return is_conv(node) and isinstance(source, fx.Node) and node_value(source).shape[1] == 1


def _weight_fits(graph_module: fx.GraphModule, weight: fx.Node) -> bool:
    zero_points = read_attribute(graph_module, str(weight.args[2].target))  # type: ignore[union-attr]
    return weight.args[6] == torch.int8 and not bool(zero_points.any())


def _reason(graph_module: fx.GraphModule, node: fx.Node, kept_float: Mapping[str, str], name: str) -> str:
    """Why ``node`` cannot run on an integer kernel, or ``""``."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    quantized_left = is_call(left, *PER_TENSOR, PER_ITEM)
    quantized_right = is_call(right, *PER_TENSOR, PER_ITEM)
    if not (quantized_left or quantized_right):
        return kept_float.get(name) or "it was not annotated"
    if is_matmul(node):
        wide = [side for side in (left, right) if is_call(side, *PER_TENSOR) and side.args[5] not in INTEGER_DTYPES]
        return WIDE if wide else NO_MATMUL
    if not quantized_right:
        return NO_WEIGHT
    if not quantized_left:
        return NO_ACTIVATION
    if is_call(left, PER_ITEM):
        return PER_ROW
    if not is_call(right, WEIGHT) or not _weight_fits(graph_module, right) or left.args[5] not in INTEGER_DTYPES:
        return WIDE
    if node.target not in INTEGER_OPERATORS:
        return NO_OPERATOR
    return ONE_CHANNEL if reads_one_channel(node) else ""


def layers(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Every node that multiplies, in graph order: what :func:`classify` has an entry for."""
    nodes = graph_module.graph.nodes
    return [node for node in nodes if (is_weighted(node) or is_matmul(node)) and node_value(node) is not None]


def classify(graph_module: fx.GraphModule, kept_float: Mapping[str, str]) -> list[ReportEntry]:
    """List every layer that multiplies; an eligible one is expected on an integer kernel, the others say why not.

    Args:
        graph_module: The q/dq graph that is about to be compiled.
        kept_float: Names of layers that stay float on purpose, with reasons.
    """
    entries = []
    for node in layers(graph_module):
        operator = str(node.target).removeprefix("aten.").split(".")[0]
        name = module_path(node) or operator
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight"):
            name = str(weight.target).removesuffix(".weight")
        reason = _reason(graph_module, node, kept_float, name)
        kernel = "float" if reason else "integer"
        entries.append(ReportEntry(name, operator, kernel, reason, eligible=not reason))
    return entries


def _enclosing(name: str) -> list[str]:
    """The paths of the modules around ``name``, the closest one first, ``""`` last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def match_kernels(entries: list[ReportEntry], found: Counter[str]) -> tuple[ReportEntry, ...]:
    """Hold what was expected against the integer kernels that the compiled graph really has.

    Args:
        entries: What :func:`classify` expects.
        found: Integer kernels of the compiled graph by module path (``""`` where it has none). A kernel that took
            in the addition behind its layer has the path of the module that adds, around the layer's own.
    """
    left = Counter(found)
    matched = list(entries)
    pending = []
    for index, entry in enumerate(matched):
        if not entry.eligible or entry.kernel == "float":
            continue
        if left[entry.name] > 0:
            left[entry.name] -= 1
        else:
            pending.append(index)
    for index, entry in enumerate(matched):
        if entry.reason == NO_MATMUL and left[entry.name] > 0:
            left[entry.name] -= 1
            matched[index] = replace(entry, kernel="integer", reason="", eligible=True)
    for index in pending:
        place = next((path for path in _enclosing(matched[index].name) if left[path] > 0), None)
        if place is None:
            matched[index] = replace(matched[index], kernel="float", reason=MISSED)
        else:
            left[place] -= 1
    return tuple(matched)


def read_kernels(entries: list[ReportEntry], nodes: list[str], integer: Container[str]) -> tuple[ReportEntry, ...]:
    """The entries as an engine runs them, which names the layers that it has on integer kernels.

    Args:
        entries: What :func:`classify` expects.
        nodes: The names of their nodes (:func:`layers`).
        integer: Names of the nodes on integer kernels.
    """
    read = []
    for entry, node in zip(entries, nodes, strict=True):
        if node in integer and (entry.eligible or entry.reason == NO_MATMUL):
            read.append(replace(entry, kernel="integer", reason="", eligible=True))
        else:
            read.append(replace(entry, kernel="float", reason=MISSED) if entry.eligible else entry)
    return tuple(read)


def in_float(entries: list[ReportEntry], reason: str) -> list[ReportEntry]:
    """The entries where nothing runs on integer kernels, for ``reason``."""
    return [replace(e, kernel="float", reason=reason) if e.eligible else e for e in entries]
