"""Random ATen graphs that are valid by construction: they grow forward over a pool of typed values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import SymInt, Tensor, fx, nn

from tfmq_fx.passes.support.predicates import is_attention, is_conv

from .graph_builder import GraphBuilder
from .tensors import tensor_specs

__all__ = ["OPERATORS", "SPECIAL_OPERATORS", "GeneratedGraph", "aten_graphs"]

aten = torch.ops.aten

#: The kinds of operators; the first ones are what failing examples shrink to.
OPERATORS = (
    "unary",
    "binary",
    "linear",
    "conv",
    "conv_of_concatenation",
    "conv_of_named_padding",
    "concatenation",
    "noop_cast",
    "identity",
    "dropout",
    "guard",
    "group_norm",
    "attention",
    "reshape",
    "transpose",
    "layout",
    "view",
    "unsqueeze",
    "mean",
    "chunk",
    "constant",
    "time",
    "cast",
    "scalar",
)

#: Kinds that are drawn only where they are favoured: forms that canonicalization removes, and layers that few models
#: have. To test a pass that looks for something new, add a kind here, and the method of that name below.
SPECIAL_OPERATORS = ("region", "in_place", "sequence_conv", "frame_conv", "repeated_rows")

#: Products of more factors than this are not drawn: they would overflow.
MAX_DEGREE = 4


@dataclass(frozen=True, repr=False)
class GeneratedGraph:
    """A random graph with inputs that it runs on.

    Attributes:
        graph_module: The graph.
        example_inputs: Positional inputs.
        more_inputs: The same of another batch size, when the batch is symbolic.
        timestep: Name of the timestep placeholder.
    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    more_inputs: tuple[tuple[Tensor, ...], ...]
    timestep: str = "timestep"

    def __repr__(self) -> str:
        """The readable graph and the shapes of its inputs, for the report of a failing example."""
        shapes = [tuple(tensor.shape) for tensor in self.example_inputs]
        return f"GeneratedGraph(inputs {shapes})\n{self.graph_module.graph}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints examples with this; for a dataclass it would write down every weight."""
        printer.text(repr(self))


@st.composite
def aten_graphs(
    draw: st.DrawFn,
    *,
    max_ops: int = 12,
    half: bool = True,
    dynamic_batch: bool | None = None,
    favour: Sequence[str] = (),
) -> GeneratedGraph:
    """Random ATen graphs with everything that rewrites trip over.

    Among it: nodes with several users, dead nodes, aliases, no-op casts, arithmetic by one, idle
    dropouts, assertions, constants, shared weights, values whose channels lie last in memory, readers that take only
    some strides, nodes among keyword arguments, convolutions of
    concatenations, fused attention, unread state, several outputs in any structure, an input that is an
    output, and the timestep as first, middle or last placeholder.

    Args:
        draw: Given by Hypothesis.
        max_ops: How many operators to draw at most; some become two or three nodes.
        half: Whether bfloat16 values occur. They round so coarsely that a pass which changes the order
            of sums cannot be compared within a tight tolerance.
        dynamic_batch: Whether the batch is symbolic; either by default.
        favour: Kinds of operators, out of :data:`OPERATORS` and :data:`SPECIAL_OPERATORS`, that half of the draws are
            taken from: what the pass under test looks for.
    """
    dynamic = draw(st.booleans()) if dynamic_batch is None else dynamic_batch
    growth = _Growth(draw, half, dynamic)
    kinds = st.sampled_from(OPERATORS)
    if favour:
        kinds = st.sampled_from(favour) | kinds
    for _ in range(draw(st.integers(1, max_ops))):
        getattr(growth, draw(kinds))()
    return growth.finish()


class _Growth:
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
        other = self._pick(lambda v: v.dtype == value.dtype and _shape(v) == _shape(value))
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
        fitting = [node for node in read if _shape(node.meta["val"]) == shape]
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

    # -- operators: each adds one or a few nodes, or none when no value fits -------------------------------------

    def unary(self) -> None:
        targets = [aten.silu.default, aten.relu.default, aten.gelu.default, aten.sin.default, aten.cos.default]
        if source := self._pick():
            self._call(self.draw(st.sampled_from(targets)), source)

    def scalar(self) -> None:
        targets = [aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor]
        if source := self._pick():
            self._call(self.draw(st.sampled_from(targets)), source, self.draw(st.sampled_from([2.0, -0.5, 3])))

    def binary(self) -> None:
        if left := self._pick():
            right = self._like(left)
            product = self.degree[left] + self.degree[right]
            if product <= MAX_DEGREE and self._flag():
                self._keep(self.builder.call(aten.mul.Tensor, left, right), product)
            else:
                self._call(aten.add.Tensor, left, right)

    def linear(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2 and v.dtype == torch.float32):
            width = self.draw(st.sampled_from([4, 1, 8]))
            self._weighted(aten.linear.default, source, self._weight(width, int(source.meta["val"].shape[-1])))

    def conv(self) -> None:
        kernel = self.draw(st.sampled_from([1, 3]))
        padding, stride = self.draw(st.integers(0, 1)), self.draw(st.integers(1, 2))
        if source := self._pick(lambda v: _is_image(v) and min(v.shape[2:]) >= kernel - 2 * padding):
            channels = int(source.meta["val"].shape[1])
            groups = self.draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
            weight = self._weight(2 * groups, channels // groups, kernel, kernel)
            options = ([stride, stride], [padding, padding], [1, 1], groups)
            plain = options == ([1, 1], [0, 0], [1, 1], 1)
            self._weighted(aten.conv2d.default, source, weight, *(() if plain else options))

    def concatenation(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2):
            axis = self.draw(st.integers(1, source.meta["val"].ndim - 1))
            parts = [source, *(self._like(source) for _ in range(self.draw(st.integers(1, 2))))]
            self._call(aten.cat.default, parts, axis)

    def conv_of_concatenation(self) -> None:
        first = self._pick(_is_image)
        if first is None:
            return
        shape = _shape(first.meta["val"])
        second = self._pick(lambda v: _is_image(v) and (_shape(v)[0], *_shape(v)[2:]) == (shape[0], *shape[2:]))
        assert second is not None
        cat = self.builder.call(aten.cat.default, [first, second], self.draw(st.sampled_from([1, -3])))
        if self._flag():
            self._keep(cat)
        weight = self._weight(2, int(cat.meta["val"].shape[1]), 1, 1)
        self._weighted(aten.conv2d.default, cat, weight)

    def conv_of_named_padding(self) -> None:
        kernel = [self.draw(st.sampled_from([2, 1, 3])) for _ in range(2)]
        if source := self._pick(
            lambda v: _is_image(v) and all(a >= b for a, b in zip(v.shape[2:], kernel, strict=True))
        ):
            padding, dilation = self.draw(st.sampled_from([("same", 1), ("same", 2), ("valid", 1)]))
            weight = self._weight(2, int(source.meta["val"].shape[1]), *kernel)
            self._weighted(aten.conv2d.padding, source, weight, [1, 1], padding, [dilation, dilation])

    def noop_cast(self) -> None:
        if source := self._pick():
            dtype = source.meta["val"].dtype
            casts: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
                (aten.to.dtype, (dtype,), {}),
                (aten.alias.default, (), {}),
                (aten.detach.default, (), {}),
                (aten.contiguous.default, (), {}),
                (aten._to_copy.default, (), {"dtype": dtype}),
                (aten.to.dtype_layout, (), {"dtype": dtype, "layout": torch.strided}),
            ]
            target, args, kwargs = self.draw(st.sampled_from(casts))
            self._call(target, source, *args, **kwargs)

    def cast(self) -> None:
        if self.half and (source := self._pick()):
            wide = source.meta["val"].dtype == torch.float32
            self._call(aten.to.dtype, source, torch.bfloat16 if wide else torch.float32)

    def identity(self) -> None:
        if source := self._pick():
            self._call(self.draw(st.sampled_from([aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar])), source, 1)

    def dropout(self) -> None:
        if source := self._pick():
            self._call(aten.dropout.default, source, *self.draw(st.sampled_from([(0.0, True), (0.5, False)])))

    def guard(self) -> None:
        if source := self._pick():
            call = self.builder.call
            kind = self.draw(st.sampled_from(["metadata", "size", "elements"]))
            if kind == "metadata":
                call(aten._assert_tensor_metadata.default, source, None, None, source.meta["val"].dtype)
            elif kind == "size" and source.meta["val"].ndim:
                condition = call(operator.ge, call(aten.sym_size.int, source, 0), 1)
                call(aten._assert_scalar.default, condition, "the batch is empty")
            else:
                ones = call(aten.ones_like.default, source, dtype=torch.bool)
                call(aten._assert_async.msg, call(aten.all.default, ones), "not all")

    def group_norm(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 3 and v.dtype == torch.float32):
            channels = int(source.meta["val"].shape[1])
            groups = self.draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            # A large epsilon, because a group of equal values must not turn rounding into a signal.
            self._call(aten.group_norm.default, source, groups, self._weight(channels), self._weight(channels), 0.1)

    def attention(self) -> None:
        if query := self._pick(lambda v: v.ndim >= 3 and v.dtype == torch.float32):
            key, value = self._like(query), self._like(query)
            length = int(query.meta["val"].shape[-2])
            options: dict[str, Any] = {}
            if self._flag():
                options["attn_mask"] = self._weight(length, length)
            if self._flag():
                options["scale"] = 0.5
            elif "attn_mask" not in options and self._flag():
                options["is_causal"] = True
            self._call(aten.scaled_dot_product_attention.default, query, key, value, **options)

    def reshape(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2):
            shape = [int(size) for size in source.meta["val"].shape[1:]]
            cut = self.draw(st.integers(0, len(shape)))
            merged = [math.prod(shape[:cut]), math.prod(shape[cut:])]
            self._call(aten.reshape.default, source, [-1, *merged])

    def transpose(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 3):
            axes = st.integers(1, source.meta["val"].ndim - 1)
            self._call(aten.transpose.int, source, self.draw(axes), self.draw(axes))

    def layout(self) -> None:
        """An image or any other value with its channels last in memory, its shape as before."""
        if source := self._pick(lambda v: v.ndim >= 3):
            order = [0, *range(2, source.meta["val"].ndim), 1]
            if _is_image(source.meta["val"]) and self._flag():
                self._call(aten.contiguous.default, source, memory_format=torch.channels_last)
                return
            turned = self.builder.call(aten.permute.default, source, order)
            dense = self.builder.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
            self._call(aten.permute.default, dense, [order.index(axis) for axis in range(len(order))])

    def view(self) -> None:
        """What takes only some strides: it merges two axes that lie one behind the other."""
        if source := self._pick(_merges_last_axes, settled=True):
            *outer, height, width = self._sizes(source)
            self._call(aten.view.default, source, [*outer, height * width])

    def unsqueeze(self) -> None:
        if source := self._pick(lambda v: 1 <= v.ndim <= 3):
            self._call(aten.unsqueeze.default, source, self.draw(st.integers(1, source.meta["val"].ndim)))

    def mean(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2):
            self._call(aten.mean.dim, source, [-1], True)

    def chunk(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2 and v.shape[1] % 2 == 0):
            halves = self.builder.call(aten.chunk.default, source, 2, 1)
            for index in self.draw(st.sampled_from([(0, 1), (1,)])):
                self._call(operator.getitem, halves, index)

    def constant(self) -> None:
        if source := self._pick(lambda v: v.ndim >= 2 and v.dtype == torch.float32):
            self._call(aten.add.Tensor, source, self._weight(*(int(size) for size in source.meta["val"].shape[1:])))

    def time(self) -> None:
        """A small time path of its own: cast, column, frequencies, sine."""
        shape = [1, 1] if self.scalar_timestep else [-1, 1]
        column = self.builder.call(aten.to.dtype, self.timestep, torch.float32)
        column = self.builder.call(aten.reshape.default, column, shape)
        self._call(aten.sin.default, self.builder.call(aten.mul.Tensor, column, self._weight(4)))

    # -- operators that are drawn only where they are favoured ----------------------------------------------------

    def region(self) -> None:
        """An activation inside a region that records no gradients, as export writes it."""
        if source := self._pick():
            self.count += 1
            flag = self._flag()
            self._keep(self.builder.region(f"region_{self.count}", aten.silu.default, source, records=flag))

    def in_place(self) -> None:
        """An activation that is written into a value of the graph's own, or into a view of it."""
        if source := self._pick():
            fresh = self.builder.call(aten.silu.default, source)
            if self._flag():
                self._keep(fresh)
            target = self.builder.call(aten.alias.default, fresh) if self._flag() else fresh
            self._call(aten.relu_.default, target)

    def sequence_conv(self) -> None:
        """A convolution of a sequence: the pixels of an image, one after the other."""
        if source := self._pick(_is_image):
            channels = int(source.meta["val"].shape[1])
            kernel = self.draw(st.sampled_from([1, 3]))
            pixels = self.builder.call(
                aten.reshape.default, source, [-1, channels, math.prod(_shape(source.meta["val"])[2:])]
            )
            self._weighted(aten.conv1d.default, pixels, self._weight(2, channels, kernel), [1], [kernel // 2], [1], 1)

    def frame_conv(self) -> None:
        """A convolution along the frames of an image that is a video of one frame."""
        if source := self._pick(_is_image):
            video = self.builder.call(aten.unsqueeze.default, source, 2)
            weight = self._weight(2, int(source.meta["val"].shape[1]), 3, 1, 1)
            self._weighted(aten.conv3d.default, video, weight, [1, 1, 1], [1, 0, 0], [1, 1, 1], 1)

    def repeated_rows(self) -> None:
        """A time path whose rows are repeated once per frame in front of its last layer."""
        column = self.builder.call(aten.to.dtype, self.timestep, torch.float32)
        column = self.builder.call(aten.reshape.default, column, [1, 1] if self.scalar_timestep else [-1, 1])
        waves = self.builder.call(aten.sin.default, self.builder.call(aten.mul.Tensor, column, self._weight(4)))
        emb = self._weighted(aten.linear.default, waves, self._weight(8, 4))
        rows = self.builder.call(aten.repeat.default, emb, [3, 1])
        self._weighted(aten.linear.default, self.builder.call(aten.silu.default, rows), self._weight(4, 8))

    # -- the end ----------------------------------------------------------------------------------------------

    def finish(self) -> GeneratedGraph:
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


def _shape(value: Tensor) -> tuple[Any, ...]:
    """The shape in a form that compares without asking a symbolic size anything."""
    return tuple(str(size) if isinstance(size, SymInt) else size for size in value.shape)


def _chooses_strides(node: fx.Node) -> bool:
    """Whether ``node`` is, or reads, an operator that chooses its kernel, and the strides with it, when it runs."""
    return is_attention(node) or is_conv(node) or any(map(_chooses_strides, node.all_input_nodes))


def _merges_last_axes(value: Tensor) -> bool:
    """Whether the last two axes, of fixed sizes, lie one behind the other in memory."""
    fixed = all(isinstance(size, int) for size in value.shape[1:])
    return value.ndim >= 3 and fixed and value.stride(-2) == value.shape[-1] * value.stride(-1)


def _is_image(value: Tensor) -> bool:
    return value.ndim == 4 and value.dtype == torch.float32
