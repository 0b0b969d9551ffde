"""The temporal block is found exactly, and it stays what it is when the graph is written differently (P9)."""

import copy
import random

import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from tfmq_fx.passes.analysis import (
    conditioning_inputs,
    data_dependence,
    find_conditional_part,
    find_temporal_block,
)
from tfmq_fx.passes.support.nodes import insert_call, read_attribute
from tfmq_fx.testing import temporal_graphs

aten = torch.ops.aten

#: Where a node keeps the name that it was made with, however it is called later.
ORIGIN = "tests.origin"


def tagged(model):
    """A copy of the model whose nodes remember their names."""
    graph_module = copy.deepcopy(model.graph_module)
    for node in graph_module.graph.nodes:
        node.meta[ORIGIN] = node.name
    return graph_module


def finite(model):
    return ("class_labels",) if model.path.class_embedding != "none" else ()


def found(graph_module, model, inputs=()):
    return find_temporal_block(graph_module, model.path.timestep_name, finite=inputs)


def prompt(model):
    return ("pooled",) if model.path.prompt != "none" else ()


def part_of(graph_module, model):
    return find_conditional_part(graph_module, {"sample"}, model.path.timestep_name)


def origins(nodes):
    return [node.meta[ORIGIN] for node in nodes if ORIGIN in node.meta]


def assert_same_structure(block, expected):
    assert set(origins(block.nodes)) == expected.nodes
    assert_same_linears(block, expected)
    assert set(origins(block.features)) == set(expected.features)


def assert_same_linears(block, expected):
    assert set(origins(block.time_embedding)) == set(expected.time_embedding)
    assert set(origins(layer.linear for layer in block.embedding_layers)) == set(expected.embedding_layers)


def assert_same_part(graph_module, model):
    """The conditional part and the inputs that it depends on, and with them the whole time path."""
    part, expected = part_of(graph_module, model), model.expected_part
    assert set(origins(part.per_prompt)) == expected.per_prompt
    assert set(origins(part.per_timestep)) == expected.per_timestep
    assert set(origins(part.joint)) == set(expected.joint)
    assert part.conditions == expected.conditions
    conditions = conditioning_inputs(graph_module, {"sample"}, model.path.timestep_name)
    assert conditions == expected.conditions
    assert_same_structure(found(graph_module, model, conditions), model.expected_whole)


@given(temporal_graphs())
def test_the_block_is_what_the_model_was_built_with(model):
    event(f"classes: {model.path.class_embedding}, prompt: {model.path.prompt}")
    whole = (*finite(model), *prompt(model))
    answers = [((), model.expected), (finite(model), model.expected_finite), (whole, model.expected_whole)]
    for inputs, expected in answers:
        block = found(model.graph_module, model, inputs)
        assert {node.name for node in block.nodes} == expected.nodes
        assert tuple(node.name for node in block.time_embedding) == expected.time_embedding
        assert tuple(layer.linear.name for layer in block.embedding_layers) == expected.embedding_layers
        assert tuple(node.name for node in block.features) == expected.features
        assert all(node in block for node in block.nodes) and block.reason == ""


@given(temporal_graphs())
def test_the_conditional_part_is_what_the_model_was_built_with(model):
    part, expected = part_of(model.graph_module, model), model.expected_part
    event(f"layers of timestep and conditioning: {len(part.joint)}")
    assert {node.name for node in part.per_prompt} == expected.per_prompt
    assert {node.name for node in part.per_timestep} == expected.per_timestep
    assert tuple(node.name for node in part.joint) == expected.joint
    assert part.conditions == expected.conditions
    assert conditioning_inputs(model.graph_module, {"sample"}, model.path.timestep_name) == expected.conditions


@given(temporal_graphs())
def test_names_do_not_matter(model):
    graph_module = tagged(model)
    for index, node in enumerate(reversed(graph_module.graph.nodes)):
        if node.op != "placeholder":
            node._rename(f"z{index}")
        node.meta.pop("nn_module_stack", None)
        if node.op == "get_attr":
            state = read_attribute(graph_module, node.target)
            graph_module.register_buffer(f"timestep_{index}", state.detach())
            node.target = f"timestep_{index}"
    graph_module.graph.lint()
    assert_same_structure(found(graph_module, model), model.expected)
    assert_same_part(graph_module, model)


@given(temporal_graphs(), st.randoms(use_true_random=False))
def test_the_order_of_independent_nodes_does_not_matter(model, shuffle):
    graph_module = tagged(model)
    reorder(graph_module.graph, shuffle)
    graph_module.graph.lint()
    block = found(graph_module, model, finite(model))
    assert_same_structure(block, model.expected_finite)
    assert_same_part(graph_module, model)


def reorder(graph, shuffle: random.Random):
    """Bring the nodes between placeholders and output into another topological order."""
    waiting = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    placed = {node for node in graph.nodes if node.op == "placeholder"}
    while waiting:
        node = shuffle.choice([node for node in waiting if placed.issuperset(node.all_input_nodes)])
        last.append(node)
        last = node
        placed.add(node)
        waiting.remove(node)


IDENTITIES = {
    "cast": lambda graph, node: insert_call(graph, aten.to.dtype, (node, node.meta["val"].dtype), anchor=node),
    "times one": lambda graph, node: insert_call(graph, aten.mul.Tensor, (node, 1), anchor=node),
    "dropout": lambda graph, node: insert_call(graph, aten.dropout.default, (node, 0.0, True), anchor=node),
    "alias": lambda graph, node: insert_call(graph, aten.alias.default, (node,), anchor=node),
}


def computed_tensors(graph_module):
    """The nodes that compute a tensor."""
    tensors = [node for node in graph_module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return [node for node in tensors if node.op == "call_function"]


@given(temporal_graphs(), st.data())
def test_identities_do_not_matter(model, data):
    graph_module = tagged(model)
    chosen = data.draw(st.lists(st.sampled_from(computed_tensors(graph_module)), min_size=1, max_size=6, unique=True))
    for node in chosen:
        kind = data.draw(st.sampled_from(sorted(IDENTITIES)))
        if kind == "dropout" and not node.meta["val"].is_floating_point():
            continue
        with graph_module.graph.inserting_after(node):
            padded = IDENTITIES[kind](graph_module.graph, node)
        node.replace_all_uses_with(padded, delete_user_cb=lambda user, new=padded: user is not new)
        padded.meta["tests.stands_for"] = node.meta[ORIGIN]
    graph_module.graph.lint()
    block = found(graph_module, model)
    assert set(origins(block.nodes)) == model.expected.nodes
    assert_same_linears(block, model.expected)
    features = {node.meta.get(ORIGIN) or node.meta["tests.stands_for"] for node in block.features}
    assert features == set(model.expected.features)
    part = part_of(graph_module, model)
    assert set(origins(part.per_prompt)) == model.expected_part.per_prompt
    assert set(origins(part.per_timestep)) == model.expected_part.per_timestep
    assert set(origins(part.joint)) == set(model.expected_part.joint)
    conditions = conditioning_inputs(graph_module, {"sample"}, model.path.timestep_name)
    assert conditions == model.expected_part.conditions
    assert_same_linears(found(graph_module, model, conditions), model.expected_whole)


@given(temporal_graphs(), st.data())
def test_dead_branches_do_not_matter(model, data):
    graph_module = tagged(model)
    # Not behind constants: one that is read outside the block, be it in vain, is no longer the block's own.
    dependence = data_dependence(graph_module)
    nodes = [node for node in computed_tensors(graph_module) if dependence[node]]
    for node in data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=4, unique=True)):
        with graph_module.graph.inserting_after(node):
            insert_call(graph_module.graph, aten.sin.default, (node,), anchor=node)
    assert_same_structure(found(graph_module, model), model.expected)


@given(temporal_graphs())
def test_dead_code_elimination_does_not_matter(model):
    graph_module = tagged(model)
    graph_module.graph.eliminate_dead_code()
    left = {node.meta[ORIGIN] for node in graph_module.graph.nodes}
    block = found(graph_module, model)
    assert set(origins(block.nodes)) == model.expected.nodes & left
    assert_same_linears(block, model.expected)
    assert set(origins(block.features)) == set(model.expected.features)


@given(temporal_graphs())
def test_common_subexpression_elimination_does_not_matter(model):
    graph_module = tagged(model)
    result = CSEPass(banned_ops=get_CSE_banned_ops())(graph_module)
    event(f"merged: {result.modified}")
    for inputs, expected in (((), model.expected), (finite(model), model.expected_finite)):
        assert_same_linears(found(result.graph_module, model, inputs), expected)


@settings(max_examples=15)
@given(temporal_graphs(dynamic_batch=False))
def test_detection_commutes_with_decomposition(model):
    assume(not model.path.asserts)
    inputs = model.example_inputs()
    decomposed = make_fx(copy.deepcopy(model.graph_module), decomposition_table=core_aten_decompositions())(*inputs)
    names = [str(node.target) for node in model.graph_module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(decomposed.graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name
    assert not decomposed.graph.find_nodes(op="call_function", target=aten.linear.default)
    block = find_temporal_block(decomposed, model.path.timestep_name)
    assert len(block.time_embedding) == len(model.expected.time_embedding)
    assert len(block.embedding_layers) == len(model.expected.embedding_layers)
    name = model.path.timestep_name
    conditions = conditioning_inputs(decomposed, {"sample"}, name)
    assert conditions == model.expected_part.conditions
    whole = find_temporal_block(decomposed, name, finite=conditions)
    assert len(whole.time_embedding) == len(model.expected_whole.time_embedding)
    assert len(whole.embedding_layers) == len(model.expected_whole.embedding_layers)
    assert len(part_of(decomposed, model).joint) == len(model.expected_part.joint)


@given(temporal_graphs(conditional=True))
def test_more_finite_inputs_never_make_the_block_smaller(model):
    alone, together = (found(model.graph_module, model, inputs) for inputs in ((), ("class_labels",)))
    assert set(alone.nodes) <= set(together.nodes)
    assert len(alone.linears) <= len(together.linears)
