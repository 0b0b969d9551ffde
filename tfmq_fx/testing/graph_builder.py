"""Build exact ATen graphs by hand, without ``torch.export``: about a millisecond each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tfmq_fx._torch.modules import children_by_name
from tfmq_fx._torch.tensors import ConstantSource, FakeTensorMode
from tfmq_fx.passes.support.nodes import compute_value

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Grows one ATen graph node by node; every node gets its ``meta["val"]`` as it is made.

    A test that builds its graph does not depend on what export happens to produce. Placeholders may be
    asked for at any time: they are kept in front of everything else, in the order of the calls.

    Args:
        batch: The batch size, or the example of it when it is symbolic; at least 2 then.
        dynamic_batch: Whether :attr:`batch` is a symbol of a ``ShapeEnv`` instead of a number.
        seed: Seed of the weights that :meth:`weight` draws.

    Attributes:
        batch: The size to write into shapes: an ``int``, or a ``SymInt`` with ``dynamic_batch``.
        graph: The graph so far.

    Example::

        builder = GraphBuilder()
        x = builder.placeholder("x", (2, 4))
        y = builder.call(torch.ops.aten.linear.default, x, builder.weight("fc.weight", (3, 4)))
        graph_module = builder.build(y)
    """

    def __init__(self, *, batch: int = 2, dynamic_batch: bool = False, seed: int = 0) -> None:
        if dynamic_batch and batch < 2:
            msg = "a symbolic batch needs an example of at least 2: sizes 0 and 1 are constants to ShapeEnv"
            raise ValueError(msg)
        self.graph = fx.Graph()
        self.batch: int | SymInt = batch
        self._root = nn.Module()
        self._random = torch.Generator().manual_seed(seed)
        self._stack: list[str] = []
        self._last_placeholder: fx.Node | None = None
        shape_env = ShapeEnv() if dynamic_batch else None
        self._mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
        if shape_env is not None:
            self.batch = _symbolic_size(shape_env, batch)

    def placeholder(self, name: str, shape: Sequence[int | SymInt], dtype: torch.dtype = torch.float32) -> fx.Node:
        """Add an input.

        Args:
            name: Name and target of the placeholder.
            shape: Its shape; use :attr:`batch` for the batch axis, ``()`` for a 0-dim input.
            dtype: Its dtype.
        """
        first = next(iter(self.graph.nodes), None)
        if self._last_placeholder is not None:
            context = self.graph.inserting_after(self._last_placeholder)
        else:
            context = self.graph.inserting_before(first)
        with context:
            node = self.graph.placeholder(name)
        with self._mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        self._last_placeholder = node
        return node

    def parameter(self, name: str, value: Tensor) -> fx.Node:
        """Register ``value`` as a parameter at the dotted path ``name`` and read it."""
        owner, leaf = self._owner(name)
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
        return self.read(name)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """Register ``value`` as a buffer at the dotted path ``name`` and read it."""
        owner, leaf = self._owner(name)
        owner.register_buffer(leaf, value)
        return self.read(name)

    def weight(self, name: str, shape: Sequence[int]) -> fx.Node:
        """Register a random parameter, scaled so that a layer keeps the magnitude of its input, and read it."""
        fan_in = max(1, int(torch.Size(shape[1:]).numel()))
        return self.parameter(name, torch.randn(tuple(shape), generator=self._random) / fan_in**0.5)

    def read(self, name: str) -> fx.Node:
        """Read registered state; a second read of one name is a second ``get_attr`` node."""
        node = self.graph.create_node("get_attr", name)
        owner, leaf = self._owner(name)
        node.meta["val"] = self._mode.from_tensor(getattr(owner, leaf), static_shapes=True)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add ``target(*args, **kwargs)``; nodes among the arguments stand for their values.

        Raises:
            Exception: Whatever ``target`` raises when the arguments do not fit; no node is left behind.
        """
        values = fx.node.map_arg((tuple(args), kwargs), lambda node: node.meta["val"])
        value = compute_value(self._mode, target, *values)
        node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta["val"] = value
        node.meta["source_fn_stack"] = [(node.name, target)]
        self._add_module_stack(node)
        return node

    def call_module(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Register ``module`` under ``name`` and call it; it must return its first argument, as an observer does."""
        owner, leaf = self._owner(name)
        owner.register_module(leaf, module)
        node = self.graph.call_module(name, tuple(args))
        node.meta["val"] = args[0].meta["val"]
        self._add_module_stack(node)
        return node

    def region(self, name: str, target: Callable[..., Any], source: fx.Node, *, records: bool = False) -> fx.Node:
        """Call ``target(source)`` in a region of its own, as export writes ``with torch.set_grad_enabled(records)``.

        Args:
            name: Where the graph of the region is registered.
            target: The operator.
            source: Its argument.
            records: Whether gradients are recorded in the region.

        Returns:
            The value of the region.
        """
        body = fx.Graph()
        inner = body.placeholder("value")
        inner.meta["val"] = source.meta["val"]
        result = body.call_function(target, (inner,))
        result.meta["val"] = compute_value(self._mode, target, (source.meta["val"],), {})
        self._add_module_stack(result)
        body.output((result,))
        owner, leaf = self._owner(name)
        owner.register_module(leaf, fx.GraphModule(nn.Module(), body))
        wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
        region = self.graph.call_function(wrap, (records, self.graph.create_node("get_attr", name), source))
        region.meta["val"] = (result.meta["val"],)
        node = self.graph.call_function(operator.getitem, (region, 0))
        node.meta["val"] = result.meta["val"]
        return node

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """Give the calls made in this context the ``nn_module_stack`` of the module at ``path``, as export does."""
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    def build(self, output: Any) -> fx.GraphModule:
        """Close the graph with ``output`` (nodes in any nesting of tuples, lists, dicts) and return it, linted."""
        self.graph.output(output)
        self.graph.lint()
        graph_module = fx.GraphModule(self._root, self.graph)
        # The constructor makes modules for the paths of attributes, and they start out in training mode.
        graph_module.eval()
        return graph_module

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        owner = self._root
        for part in path:
            if part not in children_by_name(owner):
                owner.register_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf

    def _add_module_stack(self, node: fx.Node) -> None:
        if self._stack:
            root = {"L__self__": ("", "torch.nn.Module")}
            node.meta["nn_module_stack"] = root | {path: (path, "torch.nn.Module") for path in self._stack}


def _symbolic_size(shape_env: ShapeEnv, example: int) -> SymInt:
    source = ConstantSource("batch")
    symbol = shape_env.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = shape_env.create_symintnode(symbol, hint=example, source=source)
    assert isinstance(size, SymInt)
    return size
