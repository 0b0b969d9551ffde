"""The passes that put a graph on our integer kernels, on generated stacks of quantized layers."""

import copy

import torch
from hypothesis import event, given

from tfmq_fx.passes import (
    NARROW_ACTIVATIONS,
    NATIVE_KERNELS,
    FuseGroupNorms,
    LowerIntegerAttention,
    LowerIntegerConvs,
    NarrowActivations,
)
from tfmq_fx.testing import assert_pass_contract, quantized_graphs

aten = torch.ops.aten
#: Another order of float operations may turn a rounding, which is one step of one activation, and then of what reads it
TOLERANCES = {LowerIntegerConvs: 0.15, FuseGroupNorms: 0.15, LowerIntegerAttention: 0.15, NarrowActivations: 0.3}


@given(quantized_graphs())
def test_every_pass_keeps_the_contract_in_order(generated):
    graph_module, example, more = generated.graph_module, generated.example_inputs, generated.more_inputs
    for make in (*NATIVE_KERNELS, *NARROW_ACTIVATIONS):
        tolerance = TOLERANCES.get(make, 1e-3)
        result = assert_pass_contract(make, graph_module, example, rtol=tolerance, atol=tolerance, more_inputs=more)
        event(f"{make.__name__} {'fired' if result.modified else 'did not fire'}")
        graph_module = copy.deepcopy(result.graph_module)
    for node in graph_module.graph.nodes:
        if node.target is aten.conv2d.default:  # 24 channels, read or made, are no multiple of what the kernel takes
            assert 24 in (node.args[0].meta["val"].shape[1], node.meta["val"].shape[1])
