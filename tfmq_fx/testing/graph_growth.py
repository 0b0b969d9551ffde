"""The pool of typed values that a random graph grows over: drawing from it, adding to it, and finishing the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import SymInt, Tensor, fx, nn

from tfmq_fx.passes.support.predicates import is_attention, is_conv

from .generated_graph import GeneratedGraph
from .graph_builder import GraphBuilder
from .tensors import tensor_specs

__all__ = ["GraphGrowth", "is_image", "merges_last_axes", "shape_of"]

aten = torch.ops.aten


class GraphGrowth:
    """A graph in the making, with the values that the next operator may read."""

    def __init__(self, draw: st.DrawFn, half: bool, dynamic: bool) -> None:
        self.draw, self.half, self.dynamic = draw, half, dynamic
        sample = draw(tensor_specs(min_rank=4))
        context = draw(tensor_specs(min_rank=2, max_rank=3))
        batch = max(2, sample.shape[0]) if dynamic else sample.shape[0]
        self.builder = GraphBuilder(batch=batch, dynamic_batch=dynamic, seed=draw(st.integers(0, 1000)))
        self.example_batch = batch
        self.scalar_timestep = draw(st.booleans())
        self.shapes = {"sample": sample.shape[1:], "context": context.shape[1:], "timestep": ()}
        self.pool: list[fx.Node] = []
        self.degree: dict[fx.Node, int] = {}
        self.count = 0
        names = ["sample", "context"]
        names.insert(draw(st.sampled_from([2, 0, 1])), "timestep")
        for name in names:
            scalar = name == "timestep" and self.scalar_timestep
            shape = () if scalar else (self.builder.batch, *self.shapes[name])
            node = self.builder.placeholder(name, shape, torch.int64 if name == "timestep" else torch.float32)
            if name == "timestep":
                self.timestep = node
            else:
                self._keep(node)

    # -- the pool ---------------------------------------------------------------------------------------------

    def _keep(self, node: fx.Node, degree: int | None = None) -> fx.Node:
        inherited = max((self.degree.get(source, 1) for source in node.all_input_nodes), default=1)
        self.degree[node] = inherited if degree is None else degree
        self.pool.append(node)
        return node

    def _pick(self, fits: Callable[[Tensor], bool] = lambda value: True, *, settled: bool = False) -> fx.Node | None:
        """Draw a value from the pool; the latest comes first, so that failing examples shrink to chains.

        What attention and convolutions return has strides that only the run shows: it is not ``settled``.
        """
        fitting = [node for node in reversed(self.pool) if fits(node.meta["val"])]
        if settled:
            fitting = [node for node in fitting if not _chooses_strides(node)]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def _like(self, node: fx.Node) -> fx.Node:
        """Draw a value of the shape and dtype of ``node``, perhaps ``node`` itself."""
        value = node.meta["val"]
        other = self._pick(lambda v: v.dtype == value.dtype and shape_of(v) == shape_of(value))
        assert other is not None
        return other

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._keep(self.builder.call(target, *args, **kwargs))

    def _sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of ``node`` as arguments: a symbolic one is read off it by a node of its own."""
        read = self.builder.call
        return [
            read(aten.sym_size.int, node, axis) if isinstance(size, SymInt) else int(size)
            for axis, size in enumerate(node.meta["val"].shape)
        ]

    def _flag(self) -> bool:
        return self.draw(st.booleans())

    def _weight(self, *shape: int) -> fx.Node:
        """A weight: a new one, or one of that shape that another layer reads already."""
        read = [node for node in self.builder.graph.nodes if node.op == "get_attr" and "val" in node.meta]
        fitting = [node for node in read if shape_of(node.meta["val"]) == shape]
        # Shapes seldom fit, so when one does it is mostly taken.
        if fitting and self.draw(st.sampled_from([False, True, True, True])):
            shared = self.draw(st.sampled_from(fitting))
            return shared if self._flag() else self.builder.read(str(shared.target))
        self.count += 1
        return self.builder.weight(f"layers.{self.count}.weight", shape)

    def _weighted(self, target: Callable[..., Any], source: fx.Node, weight: fx.Node, *rest: Any) -> fx.Node:
        """Call a linear or a convolution with or without bias, the bias by position or by name."""
        bias = self._weight(weight.meta["val"].shape[0]) if self._flag() else None
        with self.builder.inside(f"layers.{self.count}"):
            if bias is not None and not rest and self._flag():
                return self._call(target, source, weight, bias=bias)
            return self._call(target, source, weight, bias, *rest)

    # -- the end ----------------------------------------------------------------------------------------------

    def finish(self) -> GeneratedGraph:
        """The graph, with outputs drawn from the pool and inputs to run on."""
        others = [self._pick() for _ in range(self.draw(st.integers(0, 2)))]
        nodes = [self.pool[-1], *(node for node in others if node is not None)]
        structure = self.draw(st.sampled_from(["plain", "tuple", "dict"]))
        output: Any = tuple(nodes)
        if structure == "plain" and len(nodes) == 1:
            output = nodes[0]
        elif structure == "dict":
            output = {"sample": nodes[0], "others": nodes[1:]}
        graph_module = self.builder.build(output)
        if self._flag():
            graph_module.register_buffer("unread_buffer", torch.ones(2))
            graph_module.add_submodule("unread.inner", nn.Linear(2, 2))
        sizes = (self.example_batch, self.example_batch + 1) if self.dynamic else (self.example_batch,)
        example, *more = (self._inputs(graph_module, size) for size in sizes)
        return GeneratedGraph(graph_module, example, tuple(more))

    def _inputs(self, graph_module: fx.GraphModule, batch: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(batch, *shape, generator=random) for name, shape in self.shapes.items()}
        inputs["timestep"] = torch.tensor(7) if self.scalar_timestep else torch.arange(batch) * 3
        names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
        return tuple(inputs[name] for name in names)


def shape_of(value: Tensor) -> tuple[Any, ...]:
    """The shape in a form that compares without asking a symbolic size anything."""
    return tuple(str(size) if isinstance(size, SymInt) else size for size in value.shape)


def _chooses_strides(node: fx.Node) -> bool:
    """Whether ``node`` is, or reads, an operator that chooses its kernel, and the strides with it, when it runs."""
    return is_attention(node) or is_conv(node) or any(map(_chooses_strides, node.all_input_nodes))


def merges_last_axes(value: Tensor) -> bool:
    """Whether the last two axes, of fixed sizes, lie one behind the other in memory."""
    fixed = all(isinstance(size, int) for size in value.shape[1:])
    return value.ndim >= 3 and fixed and value.stride(-2) == value.shape[-1] * value.stride(-1)


def is_image(value: Tensor) -> bool:
    """Whether a value is a batch of float32 images."""
    return value.ndim == 4 and value.dtype == torch.float32
