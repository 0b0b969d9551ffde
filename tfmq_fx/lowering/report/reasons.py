"""Why a layer does not run on an integer kernel, as the report says it."""

from __future__ import annotations

__all__ = [
    "BRANCH",
    "EAGER",
    "FUSED_ATTENTION",
    "MISSED",
    "NO_ACTIVATION",
    "NO_EXACT_BYTES",
    "NO_MATMUL",
    "NO_OPERATOR",
    "NO_RULE",
    "NO_WEIGHT",
    "ONE_CHANNEL",
    "PER_ROW",
    "ROWS_UNCOVERED",
    "TOO_DEEP",
    "UNSUPPORTED",
    "WIDE",
]

NO_MATMUL = "its operands are quantized, but this backend has no integer kernel for a product of two activations"
NO_EXACT_BYTES = "this processor has no VNNI: sums of bytes could saturate there, so it is computed in float"
BRANCH = "it is the low-rank branch of a layer, which reads float activations on purpose"
NO_ACTIVATION = "only its weight is quantized"
NO_WEIGHT = "only its activation is quantized"
PER_ROW = "its activation has parameters per timestep, and the kernels take one set per call"
ROWS_UNCOVERED = "its activation has parameters per timestep, which only our own kernels take, and they do not cover it"
TOO_DEEP = "it adds up more products than a 32-bit integer can hold"
WIDE = "its operands are wider than 8 bits"
ONE_CHANNEL = "its input has one channel, whose memory layout the compiler of the integer kernel takes for another"
NO_OPERATOR = "its operands are quantized, but there is no integer kernel for this operator"
NO_RULE = "no rule quantizes this operator"
FUSED_ATTENTION = "it was left fused: only attention without causal, boolean or grouped masking becomes two products"
MISSED = "eligible, but the compiler left it in float"
EAGER = "the reference backend computes quantize/dequantize in float"
#: Of layers that have quantized operands.
UNSUPPORTED = (NO_MATMUL, NO_ACTIVATION, NO_WEIGHT, PER_ROW, ROWS_UNCOVERED, TOO_DEEP, WIDE, ONE_CHANNEL, NO_OPERATOR)
