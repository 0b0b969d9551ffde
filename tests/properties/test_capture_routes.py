"""The temporal block is the same whichever way a model was captured (P9)."""

import copy

import torch
from hypothesis import assume, given, settings
from torch import fx

import tfmq_fx
from tfmq_fx.passes.analysis import find_conditional_part, find_temporal_block
from tfmq_fx.passes.support.predicates import weight_node
from tfmq_fx.testing import temporal_graphs


def weights(program, model):
    """The weights of h and of the g_i, by name: nodes have other names in every capture."""
    block = find_temporal_block(program, model.path.timestep_name)
    assert block.reason == ""
    embedding = [layer.linear for layer in block.embedding_layers]
    graph_module = program if isinstance(program, fx.GraphModule) else program.module(check_guards=False)
    part = find_conditional_part(graph_module, {"sample"}, model.path.timestep_name)
    assert part.conditions == model.expected_part.conditions
    kinds = (block.time_embedding, embedding, part.joint)
    return [sorted(str(weight_node(node).target) for node in nodes) for nodes in kinds]


@settings(max_examples=10)
@given(temporal_graphs(dynamic_batch=False))
def test_tracing_by_symbols_and_by_running_find_the_same(model):
    wanted = weights(model.graph_module, model)
    inputs = model.example_inputs()
    for source in (model.graph_module, fx.symbolic_trace(copy.deepcopy(model.graph_module))):
        assert weights(tfmq_fx.capture(source, inputs, dynamic_batch=False), model) == wanted


@settings(max_examples=10)
@given(temporal_graphs(dynamic_batch=False))
def test_exported_and_decomposed_programs_have_the_same(model):
    assume(not model.path.asserts)
    wanted = weights(model.graph_module, model)
    program = torch.export.export(copy.deepcopy(model.graph_module), model.example_inputs())
    assert weights(program, model) == wanted
    decomposed = program.run_decompositions()
    assert not [n for n in decomposed.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert weights(decomposed, model) == wanted
    assert weights(tfmq_fx.capture(decomposed), model) == wanted
