import pytest
import torch

from tfmq_fx.passes.support.predicates import (
    fqn,
    is_attention,
    is_conv,
    is_float_tensor,
    is_getitem,
    is_idle_dropout,
    is_linear,
    is_matmul,
    is_softmax_output,
    is_weighted,
    module_path,
    weight_node,
)
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten


@pytest.fixture
def layers():
    builder = GraphBuilder()
    x, image = builder.placeholder("x", (2, 4)), builder.placeholder("image", (2, 4, 5, 5))
    weight, kernel = builder.weight("fc.weight", (4, 4)), builder.weight("conv.weight", (4, 4, 3, 3))
    bias = builder.weight("fc.bias", (4,))
    turned = builder.call(aten.t.default, weight)
    conv = (kernel, None, [1, 1], [0, 0], [1, 1])
    nodes = {
        "linear": builder.call(aten.linear.default, x, weight, bias),
        "addmm": builder.call(aten.addmm.default, bias, x, turned),
        "addmm of inputs": builder.call(aten.addmm.default, bias, x, builder.call(aten.mm.default, turned, weight)),
        "conv": builder.call(aten.conv2d.default, image, kernel),
        "convolution": builder.call(aten.convolution.default, image, *conv, False, [0, 0], 1),
        "transposed": builder.call(aten.convolution.default, image, *conv, True, [0, 0], 1),
        "conv_transpose": builder.call(aten.conv_transpose2d.input, image, kernel),
        "matmul": builder.call(aten.matmul.default, x, turned),
        "attention": builder.call(aten.scaled_dot_product_attention.default, image, image, image),
        "silu": builder.call(aten.silu.default, x),
        "long": builder.call(aten.argmax.default, x),
    }
    builder.build(tuple(nodes.values()))
    return nodes


@pytest.mark.parametrize(
    "predicate, wanted",
    [
        (is_linear, {"linear", "addmm"}),
        (is_conv, {"conv", "convolution"}),
        (is_weighted, {"linear", "addmm", "conv", "convolution", "transposed", "conv_transpose"}),
        (is_matmul, {"matmul"}),
        (is_attention, {"attention"}),
        (is_getitem, set()),
        (is_idle_dropout, set()),
        (lambda node: not is_float_tensor(node), {"long"}),
    ],
)
def test_kinds_of_nodes(layers, predicate, wanted):
    assert {name for name, node in layers.items() if predicate(node)} == wanted


@pytest.mark.parametrize("predicate", [is_linear, is_conv, is_weighted, is_matmul, is_attention, is_getitem])
def test_what_is_no_node_is_of_no_kind(predicate):
    assert not predicate(None) and not predicate(3) and not predicate([1])


def test_names(layers):
    assert weight_node(layers["addmm"]).target == "fc.weight"
    assert fqn(layers["linear"]) == fqn(layers["addmm"]) == "fc" and fqn(layers["conv"]) == "conv"
    assert fqn(layers["silu"]) == "silu_default" and module_path(layers["silu"]) == ""


def test_a_softmax_is_known_through_reshapes_and_casts_but_not_through_arithmetic():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 4))
    softmax = builder.call(aten.softmax.int, x, -1)
    turned = builder.call(aten.view.default, builder.call(aten.transpose.int, softmax, 1, 2), [1, 2, 4, 4])
    cast = builder.call(aten.to.dtype, turned, torch.float64)
    scaled = builder.call(aten.mul.Tensor, softmax, 2.0)
    assert all(map(is_softmax_output, (softmax, turned, cast)))
    assert not any(map(is_softmax_output, (x, scaled, None, 3)))


def test_the_module_path_is_the_innermost():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    with builder.inside("block"), builder.inside("block.act"):
        node = builder.call(aten.silu.default, x)
    assert module_path(node) == fqn(node) == "block.act"


def test_a_weight_given_by_name_is_not_taken_for_another_argument():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    node = builder.call(aten.linear.default, x, weight=builder.weight("fc.weight", (4, 4)))
    assert weight_node(node) is None and fqn(node) == "linear_default"
