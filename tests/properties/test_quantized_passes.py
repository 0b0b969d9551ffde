"""Rewrites of quantize/dequantize pairs are equal to the bit, on generated stacks of quantized layers."""

import pytest
from hypothesis import given

from tfmq_fx.passes import DequantizeWeights, FoldWeightZeroPoints, HoistQuantizers
from tfmq_fx.passes.support.predicates import is_conv, is_weighted
from tfmq_fx.testing import assert_pass_contract, quantized_graphs

REWRITES = {
    "DequantizeWeights": (lambda: DequantizeWeights(is_weighted), "conv"),
    "DequantizeWeights of convs": (lambda: DequantizeWeights(is_conv), "shift"),
    "FoldWeightZeroPoints": (FoldWeightZeroPoints, "asymmetric"),
    "HoistQuantizers": (HoistQuantizers, "resize"),
}


@pytest.mark.parametrize("make, favour", REWRITES.values(), ids=REWRITES)
def test_a_rewrite_of_pairs_is_equal_to_the_bit(make, favour):
    fired = []

    @given(quantized_graphs(max_layers=3, favour=(favour,)))
    def check(generated):
        inputs, more = generated.example_inputs, generated.more_inputs
        fired.append(assert_pass_contract(make, generated.graph_module, inputs, exact=True, more_inputs=more).modified)

    check()
    assert sum(fired) >= len(fired) / 2
