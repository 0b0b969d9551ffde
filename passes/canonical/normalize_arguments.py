"""Pass every argument of an ATen call by position."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.base import GraphPass, Numerics

__all__ = ["NormalizeArguments"]


def positional_arguments(node: Any) -> tuple[Any, ...] | None:
    """The arguments of ``node`` in schema order, or None when nothing has to move.

    Only calls with a graph node among their keyword arguments move; keyword-only arguments cannot.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(node.kwargs)):
        return None
    args = list(node.args)
    left = dict(node.kwargs)
    for argument in schema_of(node.target).arguments[len(args) :]:
        if argument.kwarg_only:
            break
        if not left:
            break
        if argument.name in left:
            args.append(left.pop(argument.name))
        elif argument.has_default_value():
            args.append(argument.default_value)
        else:
            return None
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(left)):
        return None
    return tuple(args)


class NormalizeArguments(GraphPass):
    """Move graph nodes from keyword to positional arguments.

    Before::

        %y = conv2d(%x, %w, bias=%b)

    After::

        %y = conv2d(%x, %w, %b)

    Legality: the operator's schema gives each argument one position; arguments between are filled with
    the schema's defaults. PT2E refuses a node among the keyword arguments of an annotated op. Numerics
    are preserved to the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::normalize_arguments"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite the argument lists."""
        modified = False
        for node in graph_module.graph.nodes:
            args = positional_arguments(node)
            if args is None:
                continue
            names = {argument.name for argument in schema_of(node.target).arguments[: len(args)]}
            node.args = args
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in names}
            modified = True
        return modified
