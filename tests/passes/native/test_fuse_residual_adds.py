import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseResidualAdds, LowerIntegerConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import conv, linear

aten = torch.ops.aten
CONV = OPERATORS.integer_conv.default
IMAGE, ROWS = (16, 4, 6), (5, 16)


def with_image(*, dynamic=False, left=False):
    """An image plus a convolution of it."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, *IMAGE))
    y = conv(builder, x, "conv", 16)
    graph_module = builder.build(builder.call(aten.add.Tensor, *((y, x) if left else (x, y))))
    LowerIntegerConvs()(graph_module)
    return graph_module


def with_rows(*, image=False):
    """A sequence, or an image as one, plus a linear of it."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, *(IMAGE if image else ROWS)))
    count = builder.call(aten.sym_size.int, x, 0)
    sequence = builder.call(aten.permute.default, x, [0, 2, 3, 1]) if image else x
    y = linear(builder, builder.call(aten.reshape.default, sequence, [-1, 16]), "to_out", 16)
    y = builder.call(aten.view.default, y, [count, -1, 16])
    if image:
        y = builder.call(aten.reshape.default, builder.call(aten.transpose.int, y, -1, -2), [count, *IMAGE])
    graph_module = builder.build(builder.call(aten.add.Tensor, y, x))
    LowerIntegerConvs()(graph_module)
    return graph_module


def test_fires():
    graph_module = with_image()
    assert FuseResidualAdds()(graph_module).modified
    (node,) = calls(graph_module, CONV)
    assert node.args[4] is not None and not operators(graph_module)[aten.add.Tensor]
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "conv"]


def test_does_not_fire_on_shifts_or_shared_results():
    builder = GraphBuilder()
    x, shift = builder.placeholder("x", (2, *IMAGE)), builder.placeholder("shift", (2, 16, 1, 1))
    shared = conv(builder, x, "shared", 16)
    outputs = [builder.call(aten.add.Tensor, conv(builder, x, "conv", 16), shift)]
    outputs += [builder.call(aten.add.Tensor, shared, x), shared]
    twice = conv(builder, x, "twice", 16)
    graph_module = builder.build([*outputs, builder.call(aten.add.Tensor, twice, twice)])
    LowerIntegerConvs()(graph_module)
    assert unchanged(FuseResidualAdds(), graph_module)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_result_that_is_broadcast_is_not_added_in_the_kernel(dynamic):
    """A time embedding: one row of the linear for a whole image, or for all rows of a sequence."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x, time = builder.placeholder("x", (builder.batch, *IMAGE)), builder.placeholder("time", (builder.batch, 16))
    rows = builder.placeholder("rows", (builder.batch, *ROWS))
    shift = builder.call(aten.unsqueeze.default, linear(builder, time, "shift", 16), -1)
    shifted = builder.call(aten.add.Tensor, x, builder.call(aten.unsqueeze.default, shift, -1))
    moved = builder.call(aten.unsqueeze.default, linear(builder, time, "move", 16), 1)
    graph_module = builder.build([shifted, builder.call(aten.add.Tensor, moved, rows)])
    LowerIntegerConvs()(graph_module)
    assert len(calls(graph_module, CONV)) == 2
    assert unchanged(FuseResidualAdds(), graph_module)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(dynamic, left):
    more = [(torch.randn(5, *IMAGE),)] if dynamic else []
    graph_module = with_image(dynamic=dynamic, left=left)
    assert_pass_contract(FuseResidualAdds, graph_module, (torch.randn(2, *IMAGE),), rtol=1e-6, more_inputs=more)


@pytest.mark.parametrize("image", [False, True])
def test_rows_of_a_linear(image):
    shape = IMAGE if image else ROWS
    more = [(torch.randn(3, *shape),)]
    example = (torch.randn(2, *shape),)
    result = assert_pass_contract(FuseResidualAdds, with_rows(image=image), example, rtol=1e-6, more_inputs=more)
    assert not calls(result.graph_module, aten.add.Tensor)


def test_rows_in_another_order_are_not_added():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 16))
    y = linear(builder, builder.call(aten.reshape.default, x, [-1, 16]), "to_out", 16)
    turned = builder.call(aten.transpose.int, builder.call(aten.view.default, y, [2, 16, 16]), 1, 2)
    graph_module = builder.build(builder.call(aten.add.Tensor, turned, x))
    LowerIntegerConvs()(graph_module)
    assert unchanged(FuseResidualAdds(), graph_module)


def test_two_convolutions_and_several_users_of_the_sum():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, *IMAGE))
    total = builder.call(aten.add.Tensor, conv(builder, x, "first", 16), conv(builder, x, "second", 16, kernel=1))
    third = builder.call(aten.add.Tensor, conv(builder, x, "third", 16), total)
    graph_module = builder.build([total, third, builder.call(aten.neg.default, total)])
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseResidualAdds, graph_module, (torch.randn(2, *IMAGE),), rtol=1e-6)
    assert not calls(result.graph_module, aten.add.Tensor)
    assert [node.args[4] is None for node in calls(result.graph_module, CONV)] == [True, False, False]
