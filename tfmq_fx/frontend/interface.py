"""What a captured program was captured with: one object, made at capture, that every later call is bound with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.leaf_names import leaf_names
from tfmq_fx.frontend.plain_config import plain_config
from tfmq_fx.frontend.sizes import BatchSize, Size, batch_axis, check_one_symbol, sizes_of, text_of_sizes
from tfmq_fx.passes.analysis.mask_inputs import mask_inputs
from tfmq_fx.passes.support.predicates import node_value

__all__ = [
    "INTERFACE_KEY",
    "BatchSize",
    "ConstantInput",
    "Input",
    "Interface",
    "Parameter",
    "TensorInput",
    "interface_of",
    "refresh_interface",
]

#: Where a captured graph carries its interface.
INTERFACE_KEY = "tfmq_fx.interface"

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class TensorInput:
    """A tensor among the inputs.

    Attributes:
        name: Argument, with the path inside it: ``"sample"``, ``"added_cond_kwargs['time_ids']"``.
        sizes: Its sizes, numbers or multiples of the batch.
        dtype: Its dtype.
        device: Type of its device.
        mask: Whether it is an additive attention mask, in which -inf is normal.
    """

    name: str
    sizes: tuple[Size, ...]
    dtype: torch.dtype
    device: str = "cpu"
    mask: bool = False

    @property
    def batch_axis(self) -> int | None:
        """The axis that grows with the batch, or None."""
        return batch_axis(self.sizes)

    def shape(self, batch: int | None) -> list[int]:
        """The shape for a batch."""
        return [size if isinstance(size, int) else size.times * (batch or 1) for size in self.sizes]

    def __str__(self) -> str:
        """``[batch, 4, 64, 64] float32``."""
        return text_of_sizes(self.sizes, self.dtype)


@dataclass(frozen=True)
class ConstantInput:
    """An input that is no tensor: its value is part of the program.

    Attributes:
        name: As in :class:`TensorInput`.
        value: The value.
    """

    name: str
    value: Scalar


Input = TensorInput | ConstantInput


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's own ``forward``.

    Attributes:
        name: Its name.
        required: Whether it has no default.
        plain: Whether the default is a number, a string, a bool or None, so that a call can be held against it.
        default: The default, where it is plain.
        positional: Whether it can be given by position.
    """

    name: str
    required: bool = True
    plain: bool = False
    default: Scalar = None
    positional: bool = True


@dataclass(frozen=True)
class Interface:
    """The interface of a captured program.

    Attributes:
        names: The captured arguments, in order.
        spec: Their structure, ``((args), {kwargs})``.
        inputs: What each leaf of that structure was, in order.
        parameters: What the model's ``forward`` takes, in order; empty where that is not known.
        results: Per leaf of the result, the axis that grows with the batch; None for one without.
        model_class: Class name of the model that came in.
        config: Its diffusers configuration, as JSON values.
        max_batch: The largest batch of one call; None without a limit.
        route: How the graph came about, in words.
    """

    names: tuple[str, ...]
    spec: pytree.TreeSpec
    inputs: tuple[Input, ...]
    parameters: tuple[Parameter, ...] = ()
    results: tuple[int | None, ...] = ()
    model_class: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    route: str = ""

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> Interface:
        """The interface that can be read off a graph: all but what only the model knew.

        Raises:
            CaptureError: The graph has lost its calling convention, or its sizes are not those of a batch.
        """
        graph = graph_module.graph
        check_one_symbol(graph)
        names, spec = calling_convention(graph)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        paths = leaf_names(names, spec)
        if len(paths) != len(placeholders):
            msg = f"the graph has {len(placeholders)} inputs, but is called with {len(paths)} values: capture it again"
            raise CaptureError(msg)
        masks = mask_inputs(graph_module)
        inputs = tuple(
            _input_of(node, path, mask=str(node.target) in masks)
            for node, path in zip(placeholders, paths, strict=True)
        )
        return cls(tuple(names), spec, inputs, results=_result_batch_axes(graph))

    def of_model(self, model: Any, *, route: str, max_batch: int | None) -> Interface:
        """This interface with what the model itself knows: its parameters, class and configuration."""
        parameters = parameters_of(model) if isinstance(model, nn.Module) else ()
        return replace(
            self,
            parameters=parameters,
            model_class=type(model).__name__,
            config=plain_config(model),
            max_batch=max_batch,
            route=route,
        )

    def called_like(self, other: Interface) -> Interface:
        """This interface, read off a rewritten graph, with what the model knew of ``other``."""
        return replace(
            self,
            parameters=other.parameters,
            model_class=other.model_class,
            config=other.config,
            max_batch=other.max_batch,
            route=other.route,
        )

    @property
    def fixed_batch(self) -> bool:
        """Whether no input grows with the batch."""
        return all(isinstance(leaf, ConstantInput) or leaf.batch_axis is None for leaf in self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point input; float32 where there is none."""
        tensors = (leaf for leaf in self.inputs if isinstance(leaf, TensorInput))
        return next((leaf.dtype for leaf in tensors if leaf.dtype.is_floating_point), torch.float32)

    def find(self, name: str) -> int | None:
        """The number of the leaf of this name, or None."""
        return next((index for index, leaf in enumerate(self.inputs) if leaf.name == name), None)

    def arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leaves in the captured structure, as ``(args, kwargs)``."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


def interface_of(graph_module: fx.GraphModule) -> Interface:
    """The interface that a graph carries, or what can be read off it; raises as :meth:`Interface.of`."""
    stored = graph_module.meta.get(INTERFACE_KEY)
    return stored if isinstance(stored, Interface) else Interface.of(graph_module)


def refresh_interface(graph_module: fx.GraphModule) -> None:
    """Read the interface that a graph carries off it again, after a rewrite of its inputs."""
    stored = graph_module.meta.get(INTERFACE_KEY)
    if isinstance(stored, Interface):
        graph_module.meta[INTERFACE_KEY] = Interface.of(graph_module).called_like(stored)


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of a model's ``forward``; what ``*args`` and ``**kwargs`` take has no name of its own."""
    parameters = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        is_scalar = not required and (
            parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
        )
        default = parameter.default if is_scalar else None
        parameters.append(Parameter(name, required, is_scalar, default, parameter.kind is not parameter.KEYWORD_ONLY))
    return tuple(parameters)


def _input_of(node: fx.Node, name: str, *, mask: bool) -> Input:
    value = node_value(node)
    if isinstance(value, Tensor):
        return TensorInput(name, sizes_of(value), value.dtype, value.device.type, mask)
    if value is None or isinstance(value, (bool, int, float, str)):
        return ConstantInput(name, value)
    msg = f"input {name!r} was captured as a {type(value).__name__}; pass tensors, numbers, strings, lists or None"
    raise CaptureError(msg)


def _result_batch_axes(graph: fx.Graph) -> tuple[int | None, ...]:
    leaves = pytree.tree_leaves(graph.output_node().args[0])
    values = [node_value(leaf) if isinstance(leaf, fx.Node) else None for leaf in leaves]
    return tuple(batch_axis(sizes_of(value)) if isinstance(value, Tensor) else None for value in values)
