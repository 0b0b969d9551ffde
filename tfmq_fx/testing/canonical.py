"""A graph as text that two graphs share exactly when they compute the same thing in the same order."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn

from tfmq_fx._torch.operators import OpOverload
from tfmq_fx._torch.tensors import FakeTensor
from tfmq_fx.passes.support.strides import layout

__all__ = ["canonical_text", "state_digests", "tensor_bytes", "value_signature"]


def value_signature(value: Any, *, strides: bool = False) -> str:
    """Describe a value by what a compiler may rely on: dtype and shape of tensors, symbols of sizes.

    Args:
        value: ``meta["val"]`` of a node: a tensor, a number, a symbolic number, or a nesting of them.
        strides: Whether the strides of tensors are told too; those of axes of size one are nobody's business.
    """
    if isinstance(value, Tensor):
        sizes = ", ".join(value_signature(size) for size in value.shape)
        steps = f" by ({', '.join(layout(value))})" if strides else ""
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]{steps}"
    if isinstance(value, (SymInt, SymFloat, SymBool)):
        return str(value.node.expr)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_signature(item, strides=strides) for item in value)})"
    return repr(value)


def state_digests(graph_module: nn.Module) -> dict[str, str]:
    """Map the name of every parameter, buffer, plain tensor attribute and submodule to a digest of it."""
    tensors: dict[str, Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    tensors |= dict(graph_module.named_buffers(remove_duplicate=False))
    tensors |= {name: value for name, value in vars(graph_module).items() if isinstance(value, Tensor)}
    state = {name: f"{value_signature(tensor)} {_digest(tensor)}" for name, tensor in tensors.items()}
    for name, module in graph_module.named_modules(remove_duplicate=False):
        if name:
            state[name] = type(module).__qualname__
    return dict(sorted(state.items()))


def canonical_text(graph_module: fx.GraphModule) -> str:
    """Write the graph and its state as text.

    Nodes are numbered in order, so their names do not matter; everything that can change a result does:
    operators, arguments, values' dtypes and shapes, and the content of the state.
    """
    numbers = {node: f"%{index}" for index, node in enumerate(graph_module.graph.nodes)}

    def written(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return numbers[argument]
        if isinstance(argument, (tuple, list)):
            return f"[{', '.join(written(item) for item in argument)}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{key}: {written(item)}' for key, item in argument.items())}}}"
        return f"{type(argument).__name__}({argument})" if isinstance(argument, float) else str(argument)

    lines = []
    for node in graph_module.graph.nodes:
        target = "" if node.op == "output" else f"[{_target(node.target)}]"
        arguments = [written(argument) for argument in node.args]
        arguments += [f"{name}={written(argument)}" for name, argument in sorted(node.kwargs.items())]
        value = f" : {value_signature(node.meta['val'])}" if "val" in node.meta else ""
        lines.append(f"{numbers[node]} = {node.op}{target}({', '.join(arguments)}){value}")
    lines += [f"state {name}: {digest}" for name, digest in state_digests(graph_module).items()]
    return "\n".join(lines)


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _digest(tensor: Tensor) -> str:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return "-"
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=8).hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements of ``tensor`` in order, as bytes: equal bytes are equal bits, NaN and ``-0.0`` included."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
