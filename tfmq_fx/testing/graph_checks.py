"""Properties seen by comparing a graph before and after a pass: P1, P4, P5 and P6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import code_generator
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.recomputed_values import recompute_values

from .canonical import value_signature
from .snapshot import GraphSnapshot, Reference
from .violation import fail

__all__ = [
    "check_confinement",
    "check_flag",
    "check_interface",
    "check_metadata",
    "check_module_stack",
    "check_sources",
    "check_values",
    "check_well_formed",
    "first_difference",
]

#: The signature of an output without a recorded value.
UNKNOWN = "a node without value"


def check_well_formed(rewritten: fx.GraphModule, before: GraphSnapshot, after: GraphSnapshot) -> None:
    """P1: it lints, its code is not stale, and every name that was added to the state is read."""
    try:
        rewritten.graph.lint()
    except Exception as error:
        fail("P1", f"the graph does not lint: {error}", rewritten)
    if rewritten.code != after.code:
        fail("P1", "the graph changed without recompile(): its code is stale", rewritten)
    rewritten.recompile()
    read = [str(node.target) for node in rewritten.graph.nodes if node.op in ("get_attr", "call_module")]
    for name in after.state.keys() - before.state.keys():
        # A submodule is needed when something inside it is read, a tensor when a module around it is called.
        if not any(name == r or name.startswith(f"{r}.") or r.startswith(f"{name}.") for r in read):
            fail("P1", f"the pass added state {name!r} that no node reads", rewritten)


def check_flag(result: PassResult, before: GraphSnapshot, after: GraphSnapshot) -> None:
    """P4: ``modified`` says whether the canonical text changed."""
    changed = before.text != after.text
    if bool(result.modified) == changed:
        return
    if changed:
        message = f"modified is False, but the graph changed at {first_difference(before, after)}"
    else:
        message = "modified is True, but the graph is what it was"
    fail("P4", message, result.graph_module)


def first_difference(before: GraphSnapshot, after: GraphSnapshot) -> str:
    """The first line in which two canonical texts differ, as it was and as it is."""
    old, new = before.text.splitlines(), after.text.splitlines()
    index = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return " -> ".join(repr(lines[index]) if index < len(lines) else "nothing" for lines in (old, new))


def check_confinement(
    rewritten: fx.GraphModule, before: GraphSnapshot, after: GraphSnapshot, allowed: set[str]
) -> None:
    """P6: nodes that are not in ``allowed`` keep operator and arguments; what they read there may be replaced."""
    for name, old in before.nodes.items():
        if name in allowed or old.op == "output":
            continue
        new = after.nodes.get(name)
        if new is None:
            fail("P6", f"node {name!r} lies outside the region and is gone", rewritten)
        same = (old.op, old.target) == (new.op, new.target)
        if not same or not _follows(old.arguments, new.arguments, allowed):
            fail("P6", f"node {name!r} lies outside the region and was changed", rewritten)


def _follows(old: Any, new: Any, region: set[str]) -> bool:
    """Whether the arguments are the same, but for what was read from the region: there anything may stand now."""
    before, after = (pytree.tree_flatten(arguments) for arguments in (old, new))
    if before[1] != after[1]:
        return False
    pairs = zip(before[0], after[0], strict=True)
    return all((isinstance(was, Reference) and was.name in region) or was == now for was, now in pairs)


def check_interface(original: fx.GraphModule, rewritten: fx.GraphModule, before: GraphSnapshot) -> None:
    """P5: the same inputs, output tree, recorded output values and calling convention."""
    inputs = [str(node.target) for node in rewritten.graph.nodes if node.op == "placeholder"]
    expected = [str(node.target) for node in before.nodes.values() if node.op == "placeholder"]
    if inputs != expected:
        fail("P5", f"the inputs are {inputs}, they were {expected}", rewritten)
    old, new = (pytree.tree_flatten(_output(gm).args[0]) for gm in (original, rewritten))
    if old[1] != new[1]:
        fail("P5", f"the output tree is {new[1]}, it was {old[1]}", rewritten)
    # Kernels return the layout that they work in; a copy of every result would cost what they save.
    strides = not any(_is_kernel(node) for node in rewritten.graph.nodes)
    for was, now in zip(old[0], new[0], strict=True):
        before_it, after_it = (_leaf_signature(leaf, strides) for leaf in (was, now))
        if before_it not in (UNKNOWN, after_it):
            fail("P5", f"output {now} is {after_it}, it was {before_it}", rewritten)
    for was, now in zip(_calling_convention(original), _calling_convention(rewritten), strict=True):
        if was != now:
            fail("P5", f"the calling convention is {now}, it was {was}", rewritten)


def _output(graph_module: fx.GraphModule) -> fx.Node:
    return graph_module.graph.output_node()


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") in ("tfmq", "onednn")


def _leaf_signature(leaf: Any, strides: bool) -> str:
    if not isinstance(leaf, fx.Node):
        return repr(leaf)
    return value_signature(leaf.meta["val"], strides=strides) if "val" in leaf.meta else UNKNOWN


def _calling_convention(graph_module: fx.GraphModule) -> tuple[str, str]:
    codegen = code_generator(graph_module.graph)
    return type(codegen).__name__, str(getattr(codegen, "pytree_info", None))


def check_metadata(
    rewritten: fx.GraphModule, before: GraphSnapshot, after: GraphSnapshot, may_set: frozenset[str]
) -> None:
    """P5: nodes that stay keep their metadata, the keys in ``may_set`` apart."""
    for name, old in before.nodes.items():
        new = after.nodes.get(name)
        if new is None or (old.op, old.target) != (new.op, new.target):
            continue
        for key in (old.meta.keys() | new.meta.keys()) - may_set:
            if not _same(old.meta.get(key), new.meta.get(key)):
                message = f"meta[{key!r}] of node {name!r} changed from {old.meta.get(key)} to {new.meta.get(key)}"
                fail("P5", message, rewritten)


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    try:
        return bool(old == new)
    except Exception:
        return repr(old) == repr(new)


def check_values(rewritten: fx.GraphModule, before: GraphSnapshot, inputs: Sequence[Any]) -> None:
    """P5: each recorded value has the dtype, shape and strides that the node computes; new nodes have one."""
    try:
        values = recompute_values(rewritten, inputs)
    except PassError as error:
        fail("P5", str(error), rewritten)
    for node, value in values.items():
        if node.op == "output":
            continue
        if "val" not in node.meta:
            if node.op in ("call_function", "call_module") and node.name not in before.nodes:
                fail("P5", f"new node {node.name!r} has no meta['val']", rewritten)
            continue
        recorded, computed = (value_signature(v, strides=True) for v in (node.meta["val"], value))
        if recorded != computed:
            message = f"meta['val'] of node {node.name!r} says {recorded}, the node computes {computed}"
            fail("P5", message, rewritten)


def check_module_stack(rewritten: fx.GraphModule, before: GraphSnapshot, after: GraphSnapshot) -> None:
    """New nodes know their module when all computing nodes that they stand for or in front of do."""
    computing = [name for name, node in before.nodes.items() if node.op == "call_function"]
    touched = [name for name in computing if _is_changed(name, before, after)]
    if not touched or not all("nn_module_stack" in before.nodes[name].meta for name in touched):
        return
    for name in after.nodes:
        if name not in before.nodes and "nn_module_stack" not in after.nodes[name].meta:
            message = f"new node {name!r} has no nn_module_stack, though the nodes that it replaces have one"
            fail("P5", message, rewritten)


def check_sources(rewritten: fx.GraphModule, before: GraphSnapshot) -> None:
    """P5: a new node joins no layer that it is not: its source belongs to its like, and to no other node of the graph.

    Quantizers group nodes by source, and refuse a group in which they find an operator that they do not expect.
    """
    claimed: dict[tuple[str, str], fx.Node] = {}
    kinds = {_source(node): node.target for node in before.nodes.values() if node.op == "call_function"}
    for node in rewritten.graph.nodes:
        source = _source(node)
        if node.op != "call_function" or source is None:
            continue
        new = node.name not in before.nodes
        if new and kinds.get(source, node.target) != node.target:
            fail(
                "P5",
                f"new node {node.name!r} says that it is from {source[0]!r}, which was another operator",
                rewritten,
            )
        other = claimed.setdefault(source, node)
        if other is not node and (new or other.name not in before.nodes):
            fail("P5", f"nodes {other.name!r} and {node.name!r} both say that they are from {source[0]!r}", rewritten)


def _source(node: Any) -> tuple[str, str] | None:
    stack = node.meta.get("source_fn_stack")
    return (str(stack[-1][0]), repr(stack[-1][1])) if stack else None


def _is_changed(name: str, before: GraphSnapshot, after: GraphSnapshot) -> bool:
    return name not in after.nodes or after.nodes[name].arguments != before.nodes[name].arguments
