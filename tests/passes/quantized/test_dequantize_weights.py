import torch

from tests.passes.helpers import calls, unchanged
from tests.passes.quantized.test_fold_weight_zero_points import DEQUANTIZE, INTEGERS, ZEROS, quantized_linear
from tfmq_fx.passes import DequantizeWeights, StripDeadState
from tfmq_fx.testing import assert_pass_contract

aten = torch.ops.aten
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def everything(node):
    return True


def test_fires():
    graph_module = quantized_linear(INTEGERS, ZEROS)
    assert DequantizeWeights(everything)(graph_module).modified
    assert not calls(graph_module, DEQUANTIZE)
    (linear,) = calls(graph_module, aten.linear.default)
    scale = torch.linspace(0.1, 0.9, 3)[:, None]
    assert torch.equal(graph_module.get_buffer(str(linear.args[1].target)), (INTEGERS - ZEROS[:, None]) * scale)
    StripDeadState()(graph_module)
    assert {buffer.dtype for buffer in graph_module.buffers()} == {torch.float32}


def test_does_not_fire_on_what_was_not_chosen():
    assert unchanged(DequantizeWeights(lambda node: False), quantized_linear(INTEGERS, ZEROS))


def test_numerics():
    assert_pass_contract(lambda: DequantizeWeights(everything), quantized_linear(INTEGERS, ZEROS), (X,), exact=True)


def test_several_layers_of_one_weight():
    graph_module = quantized_linear(INTEGERS, ZEROS, readers=3)
    assert_pass_contract(lambda: DequantizeWeights(everything), graph_module, (X,), exact=True)


def test_a_layer_that_was_not_chosen_keeps_its_integers():
    graph_module = quantized_linear(INTEGERS, ZEROS)
    (linear,) = calls(graph_module, aten.linear.default)
    with graph_module.graph.inserting_after(linear):
        other = graph_module.graph.call_function(aten.linear.default, linear.args)
        other.meta = dict(linear.meta)
    graph_module.graph.output_node().args = ((linear, other),)
    graph_module.recompile()
    assert DequantizeWeights(lambda node: node is other)(graph_module).modified
    assert [node.target for node in (linear.args[1], other.args[1])] == [DEQUANTIZE, "float_weight"]
    ours, theirs = graph_module(X)
    assert torch.equal(ours, theirs)
