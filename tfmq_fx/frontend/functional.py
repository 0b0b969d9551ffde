"""An exported program whose operators write into each other's memory, as one of functions."""

from __future__ import annotations

import copy

import torch
from torch import fx
from torch.export import ExportedProgram

from tfmq_fx.errors import CaptureError
from tfmq_fx.passes import ReplaceInPlace
from tfmq_fx.passes.canonical.replace_in_place import DETACH
from tfmq_fx.passes.support.memory import memory_of
from tfmq_fx.passes.support.predicates import is_call, is_idle_dropout, writes_in_place

__all__ = ["without_writes"]


def without_writes(program: ExportedProgram) -> ExportedProgram:
    """The program, traced anew as functions where its writes are more than ``ReplaceInPlace`` takes apart.

    Writes through any view are left to torch's functionalization then, which knows what shares memory; it turns views
    into other operators, so a program without such writes stays as it is. A dropout that drops nothing returns its
    argument, and so shares its memory, which its operator does not say.

    Args:
        program: As exported; it is not changed.

    Raises:
        CaptureError: It writes into one of its inputs too.
    """
    graph = program.graph
    if not any(map(_writes, graph.nodes)):
        return program
    if _is_written_behind_dropout(graph):
        program = copy.deepcopy(program)
        for node in list(program.graph.nodes):
            if is_idle_dropout(node):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
    else:
        names = set(map(str, program.graph_signature.user_inputs))
        tried = fx.GraphModule(program.graph_module, copy.deepcopy(graph))
        ReplaceInPlace()(tried)
        # What is left may change what the model was given alone: that is no memory of its own, and stays a write.
        given = [node for node in tried.graph.find_nodes(op="placeholder") if node.name in names]
        inputs = {memory for node in given for memory in memory_of(node)}
        if all(_changed_memory(node) <= inputs for node in tried.graph.nodes if _writes(node)):
            return program
    with torch.no_grad():
        traced: ExportedProgram = program.run_decompositions({})
    if traced.graph_signature.buffers_to_mutate:
        return program  # check_state names the buffer, as the model does
    if changed := traced.graph_signature.user_inputs_to_mutate:
        msg = (
            f"the model writes into its input {next(iter(changed.values()))!r}, and into memory of its own through "
            "views: compute a new value in the place of the input"
        )
        raise CaptureError(msg)
    return traced


def _is_written_behind_dropout(graph: fx.Graph) -> bool:
    """Whether a dropout's result, or what it was given, is written to behind it: both are one tensor then."""
    shared: set[int] = set()
    for node in graph.nodes:
        if is_idle_dropout(node):
            shared |= memory_of(node) | memory_of(node.args[0])
        elif _writes(node) and shared & _changed_memory(node):
            return True
    return False


def _writes(node: fx.Node) -> bool:
    return writes_in_place(node) and not is_call(node, DETACH)


def _changed_memory(node: fx.Node) -> set[int]:
    """The storages of what a call changes: its first argument, or where that is a list whatever it is given."""
    changed = [node.args[0]] if isinstance(node.args[0], fx.Node) else node.all_input_nodes
    return set[int]().union(*map(memory_of, changed))
