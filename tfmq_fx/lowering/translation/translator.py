"""Walk a graph for one batch size and hand every operator to an engine's table of translations."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.examples import batch_symbol
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["Operator", "Translator"]

#: Called with the translator and the arguments of the ATen operator, under its own argument names.
Operator = Callable[..., Any]


class Translator(ABC):
    """One translation of a graph into an engine's own operators, with every size fixed.

    Constants stay tensors until an operator of the engine reads them; what depends on constants alone is computed
    here, and so are sizes. Equal operators on equal arguments are translated once.

    Args:
        graph_module: The q/dq graph.
        batch: The batch size to translate for; ignored when the graph has a fixed one.

    Attributes:
        node: The node that is being translated.
        results: The engine's values of the graph's results, once :meth:`run` has returned.
    """

    #: The engine's name in messages.
    engine: ClassVar[str]
    #: Translations by ATen operator.
    operators: ClassVar[Mapping[Any, Operator]]

    def __init__(self, graph_module: fx.GraphModule, batch: int) -> None:
        self.graph_module = graph_module
        self.node: fx.Node = next(iter(graph_module.graph.nodes))
        self.results: list[Any] = []
        self._symbol, self._batch = batch_symbol(graph_module), batch
        self._translated: dict[Any, Any] = {}

    @abstractmethod
    def add_input(self, name: str, shape: list[int], dtype: torch.dtype) -> Any:
        """Declare an input and return its value."""

    @abstractmethod
    def constant(self, value: Tensor) -> Any:
        """The engine's value of a constant."""

    def value(self, x: Any, dtype: torch.dtype | None = None) -> Any:
        """The engine's value of an argument: a number becomes a constant of ``dtype``, by default the result's."""
        if isinstance(x, Tensor):
            return self.constant(x)
        if isinstance(x, (bool, int, float)):
            return self.constant(torch.tensor(x, dtype=dtype or self.dtype))
        return x

    @property
    def shape(self) -> list[int]:
        """The shape of the result of the current node."""
        return self.sizes(node_value(self.node).shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result of the current node."""
        dtype: torch.dtype = node_value(self.node).dtype
        return dtype

    def operand_value(self, position: int) -> Tensor:
        """The fake value of an argument of the current node."""
        argument = self.node.args[position]
        if not isinstance(argument, fx.Node):
            msg = f"{self.engine} cannot translate node {self.node.name!r}: its operand {position} is no tensor"
            raise LoweringError(msg)
        value: Tensor = node_value(argument)
        return value

    def sizes(self, sizes: Any) -> list[int]:
        """Sizes in numbers."""
        return [self._size(size) for size in sizes]

    def _size(self, size: Any) -> int:
        if not isinstance(size, SymInt):
            return int(size)
        return int(size.node.expr.subs({self._symbol: self._batch}))

    def run(self) -> None:
        """Translate the whole graph.

        Raises:
            LoweringError: An operator has no translation; the message names it.
        """
        values: dict[fx.Node, Any] = {}
        for node in self.graph_module.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                fake = node_value(node)
                tensor = isinstance(fake, Tensor)
                values[node] = self.add_input(node.name, self.sizes(fake.shape), fake.dtype) if tensor else fake
            elif node.op == "get_attr":
                values[node] = read_attribute(self.graph_module, str(node.target)).detach()
            elif node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                leaves = pytree.tree_leaves(node.args[0])
                self.results = [self.value(values[leaf]) for leaf in leaves if isinstance(leaf, fx.Node)]
            else:
                msg = f"{self.engine} cannot run node {node.name!r}: it is a {node.op}; lower a converted program"
                raise LoweringError(msg)

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if isinstance(node_value(node), (int, float, bool, SymInt)):
            return self._size(node_value(node))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
        key = (node.target, _hashable(args), _hashable(kwargs))
        if key not in self._translated:
            self._translated[key] = self._translate(node, args, kwargs)
        return self._translated[key]

    def _translate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        if not _is_quantization(node) and all(
            isinstance(leaf, CONSTANTS) for leaf in pytree.tree_leaves((args, kwargs))
        ):
            with torch.no_grad():
                target: Any = node.target
                return target(*args, **kwargs)
        translate = self.operators.get(node.target)
        if translate is None:
            msg = (
                f"{self.engine} has no translation of {node.target} (node {node.name!r}); "
                "lower with backend='inductor' instead"
            )
            raise LoweringError(msg)
        return translate(self, *args, **kwargs)


CONSTANTS = (Tensor, int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def _is_quantization(node: fx.Node) -> bool:
    """Whether a node belongs to the integer representation, which constants must keep."""
    return str(node.target).startswith("quantized_decomposed.")


def _hashable(argument: Any) -> Any:
    """A key for arguments: values of the engine and tensors by identity."""
    if isinstance(argument, (list, tuple)):
        return tuple(_hashable(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _hashable(item)) for name, item in argument.items())
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return type(argument), argument
    return id(argument)
