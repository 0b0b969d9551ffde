"""Compute in float32 what a model computes in another floating-point type, and keep that type at its interface."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tfmq_fx._torch import pytree
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.arguments import called_operator
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, insert_call, read_attribute
from tfmq_fx.passes.support.predicates import is_attention, is_call, is_matmul, is_weighted, node_value

__all__ = ["ComputeInFloat32", "foreign_dtypes"]

aten = torch.ops.aten

#: Types of less precision than float32: where layers compute in one of them, all of them go.
NARROW = frozenset(
    (
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    )
)
#: Complex types by the type of their parts.
COMPLEX = {torch.float16: torch.complex32, torch.float64: torch.complex128}


def foreign_dtypes(graph_module: fx.GraphModule) -> frozenset[torch.dtype]:
    """The floating-point types beside float32 that the layers of a graph compute in.

    Returns:
        float64 where a layer has an operand of it, and all :data:`NARROW` ones where a layer has an operand of one. A
        type that only occurs between layers, such as the float64 of position embeddings, is none.
    """
    dtypes = set()
    for node in graph_module.graph.nodes:
        if is_weighted(node) or is_matmul(node) or is_attention(node):
            values = (node_value(operand) for operand in node.all_input_nodes)
            dtypes |= {value.dtype for value in values if isinstance(value, Tensor)}
    narrow = NARROW if dtypes & NARROW else frozenset()
    return narrow | ({torch.float64} & dtypes)


class ComputeInFloat32(GraphPass):
    """Turn a graph of bfloat16, float16 or float64 layers into one of float32 layers.

    Before::

        %x = placeholder                               # bfloat16, like the weights
        %s = to(%t, bfloat16)      %y = linear(%x, %w, %b)      return %y

    After::

        %x = placeholder                               # bfloat16; the weights are float32
        %f = to(%x, float32)       %s = to(%t, float32)      %y = linear(%f, %w, %b)
        %r = to(%y, bfloat16)      return %r

    Legality: the same operators on the same values without the roundings in between. Inputs and results keep their
    types. This changes numerics: it is what the model computes after ``model.float()``, on inputs that are rounded.
    Why: layers are calibrated, quantized and reconstructed in float32.
    Meta: values are computed anew; the casts of an input and of a result take the module stack of neither.
    """

    id: ClassVar[str] = "tfmq::compute_in_float32"
    numerics: ClassVar[Numerics] = Numerics.CHANGED

    def requires(self, graph_module: fx.GraphModule) -> None:
        """That no operator reads the bits of a type that goes."""
        super().requires(graph_module)
        foreign = foreign_dtypes(graph_module)
        for node in graph_module.graph.nodes:
            read = node.all_input_nodes if is_call(node, aten.view.dtype) else ()
            if read and {node_value(node).dtype, node_value(read[0]).dtype} & foreign:
                msg = f"{self.id}: node {node.name!r} reads the bits of a number, which float32 has others of"
                raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Change every type, then compute the values anew."""
        foreign = foreign_dtypes(graph_module)
        if not foreign:
            return False
        graph = graph_module.graph
        outputs = graph.output_node()
        results = {
            node: node_value(node).dtype for node in outputs.all_input_nodes if _is_of(node_value(node), foreign)
        }
        _widen_state(graph_module, foreign)
        changed = _widen_inputs(graph, foreign)
        for node in graph.nodes:
            if node.op == "get_attr" and _is_of(node_value(node), foreign):
                value = read_attribute(graph_module, str(node.target))
                node.meta["val"] = fake_mode_of(graph).from_tensor(value, static_shapes=True)
                changed.add(node)
            elif node.op == "call_function":
                self._widen(graph, node, foreign, changed)
        with graph.inserting_before(outputs):
            for node, dtype in results.items():
                if node.op != "placeholder":
                    cast = insert_call(graph, aten.to.dtype, (node, dtype), anchor=outputs)
                    outputs.replace_input_with(node, cast)
        return True

    def _widen(self, graph: fx.Graph, node: fx.Node, foreign: Collection[torch.dtype], changed: set[fx.Node]) -> None:
        """Let one operator compute in float32."""
        leaves = pytree.tree_leaves(node_value(node))
        own = any(_is_of(leaf, foreign) for leaf in leaves)
        if not own and not changed.intersection(node.all_input_nodes):
            return
        types = {dtype: torch.float32 for dtype in foreign}
        types |= {COMPLEX[dtype]: torch.complex64 for dtype in foreign if dtype in COMPLEX}
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: _as_float32(leaf, types))
        node.args, node.kwargs = args, kwargs
        if not any(isinstance(leaf, Tensor) for leaf in leaves):  # a size, or an assertion about the type
            return
        values = fx.node.map_arg((args, kwargs), lambda source: source.meta["val"])
        try:
            node.meta["val"] = compute_value(fake_mode_of(graph), called_operator(node), *values)
        except (RuntimeError, TypeError, ValueError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            msg = f"{self.id}: node {node.name!r} ({node.target}) cannot compute in float32: {first}"
            raise PassError(msg) from error
        changed.add(node)


def _is_of(value: Any, dtypes: Collection[torch.dtype]) -> bool:
    complex_types = {COMPLEX[dtype] for dtype in dtypes if dtype in COMPLEX}
    return isinstance(value, Tensor) and (value.dtype in dtypes or value.dtype in complex_types)


def _as_float32(leaf: Any, types: dict[torch.dtype, torch.dtype]) -> Any:
    """An argument for an operator on float32: the lowest number of float64 is none of float32."""
    if isinstance(leaf, float) and abs(leaf) != float("inf"):
        limit = torch.finfo(torch.float32).max
        return max(-limit, min(limit, leaf)) if leaf == leaf else leaf
    return types.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _widen_state(graph_module: fx.GraphModule, foreign: Collection[torch.dtype]) -> None:
    """Replace what the graph reads by float32 copies, one for each tensor however many names it has."""
    copies: dict[int, Tensor] = {}
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"):
        value = read_attribute(graph_module, name)
        if not isinstance(value, Tensor) or not _is_of(value, foreign):
            continue
        if id(value) not in copies:
            wide = value.detach().to(torch.complex64 if value.is_complex() else torch.float32)
            is_parameter = isinstance(value, nn.Parameter)
            copies[id(value)] = nn.Parameter(wide, value.requires_grad) if is_parameter else wide
        path, _, leaf = name.rpartition(".")
        setattr(graph_module.get_submodule(path), leaf, copies[id(value)])


def _widen_inputs(graph: fx.Graph, foreign: Collection[torch.dtype]) -> set[fx.Node]:
    """Cast the inputs for those who read their values; sizes are read off the inputs themselves."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    casts = set()
    with graph.inserting_before(inputs[-1].next if inputs else None):
        for node in inputs:
            readers = [user for user in node.users if isinstance(node_value(user), Tensor | tuple | list)]
            if readers and _is_of(node_value(node), foreign):
                wide = torch.complex64 if node_value(node).is_complex() else torch.float32
                cast = insert_call(graph, aten.to.dtype, (node, wide), anchor=node)
                for reader in readers:
                    reader.replace_input_with(node, cast)
                casts.add(cast)
    return casts
