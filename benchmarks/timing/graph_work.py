"""What a captured UNet has to compute and to move, counted from its graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import tfmq_fx
from tfmq_fx.frontend.roles import find_roles
from tfmq_fx.passes.support.predicates import is_attention, is_conv, is_linear, is_matmul, node_value
from timing.unets import UNETS

__all__ = ["BYTES", "Product", "count", "floor_seconds", "products", "totals"]

#: Bytes of a value by arithmetic.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Product:
    """One convolution, linear layer or pair of attention products.

    Attributes:
        kind: ``"conv"``, ``"linear"``, ``"attention"``, ``"temporal"`` (a layer that only the timestep reaches), or
            ``"ends"`` (the layers at the sample and at the result, which by default stay float).
        operations: Multiply-accumulates.
        values: Values read and written, weights included.
        weights: Of these, the weights.
    """

    kind: str
    operations: int
    values: int
    weights: int

    @property
    def integer(self) -> bool:
        """Whether an integer kernel can compute it."""
        return self.kind in ("conv", "linear")


def _size(value: Any) -> int:
    return math.prod(value.shape)


def _product(node: fx.Node, kind: str) -> Product:
    result = _size(node_value(node))
    operands = [node_value(argument) for argument in node.all_input_nodes]
    values = sum(_size(value) for value in operands if isinstance(value, Tensor)) + result
    if is_conv(node):
        weight = node_value(node.args[1])
        return Product(kind, result * _size(weight) // weight.shape[0], values, _size(weight))
    if is_linear(node):
        weight = node_value(node.args[1])
        return Product(kind, result * weight.shape[-1], values, _size(weight))
    if is_attention(node):
        query, key = node_value(node.args[0]), node_value(node.args[1])
        return Product(kind, 2 * _size(query) * key.shape[-2], values, 0)
    return Product(kind, result * node_value(node.args[0]).shape[-1], values, 0)


def products(captured: fx.GraphModule) -> list[Product]:
    """The products of a captured graph.

    Args:
        captured: With a fixed batch, so that every size is a number.
    """
    temporal = set(tfmq_fx.find_temporal_block(captured).linears)
    roles = find_roles(captured)
    found = []
    for node in captured.graph.nodes:
        if not (is_conv(node) or is_linear(node) or is_matmul(node) or is_attention(node)):
            continue
        kind = "conv" if is_conv(node) else "linear" if is_linear(node) else "attention"
        if node in temporal:
            kind = "temporal"
        elif roles.get(node, frozenset()) & {"input", "output"}:
            kind = "ends"
        found.append(_product(node, kind))
    return found


def count(name: str, batch: int) -> list[Product]:
    """The products of a UNet for one batch size."""
    unet = UNETS[name]
    example = {**unet.normal(batch, 0), "timestep": torch.zeros(batch, dtype=torch.int64)}
    return products(tfmq_fx.capture(unet.build(), example_kwargs=example, dynamic_batch=False))


def floor_seconds(work: Iterable[Product], ceilings: Mapping[str, float], arithmetic: str) -> float:
    """Seconds that the products take at the machine's ceilings, each bound by arithmetic or by memory.

    At ``"int8"`` what no integer kernel computes is held against bfloat16, and the temporal block, which becomes a
    table, counts for nothing. Normalization and activations count for nothing in any arithmetic: a perfect compiler
    would do them on the way, so the floor cannot be reached.

    Args:
        work: As :func:`count` gives it.
        ceilings: As :func:`timing.ceilings.ceilings` gives them.
        arithmetic: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
    """
    seconds = 0.0
    for product in work:
        if arithmetic == "int8" and product.kind == "temporal":
            continue
        chosen = arithmetic if arithmetic != "int8" or product.integer else "bfloat16"
        moving = product.values * BYTES[chosen] / ceilings["bandwidth"]
        seconds += max(product.operations / ceilings[chosen], moving)
    return seconds


def totals(work: Iterable[Product]) -> dict[str, dict[str, int]]:
    """Sums by kind: how many, multiply-accumulates, values moved, weights."""
    sums: dict[str, dict[str, int]] = {}
    for product in work:
        row = sums.setdefault(product.kind, {"count": 0, "operations": 0, "values": 0, "weights": 0})
        row["count"] += 1
        for key in ("operations", "values", "weights"):
            row[key] += getattr(product, key)
    return sums
