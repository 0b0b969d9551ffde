import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import DecomposeAttention, DeferSoftmaxNormalization
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def attention(*, dynamic=False, axis=-1, shape=(2, 5, 7), product=aten.matmul.default, dtype=torch.float32):
    builder = GraphBuilder(dynamic_batch=dynamic)
    scores = builder.placeholder("scores", (builder.batch, *shape), dtype)
    value = builder.placeholder("value", (builder.batch, *shape[:-2], shape[-1], 4), dtype)
    with builder.inside("block.attention"):
        weights = builder.call(aten.softmax.int, scores, axis)
        return builder.build(builder.call(product, weights, value))


def inputs(batch=2, shape=(2, 5, 7), scale=3.0):
    generator = torch.Generator().manual_seed(batch)
    scores = scale * torch.randn(batch, *shape, generator=generator)
    return scores, torch.randn(batch, *shape[:-2], shape[-1], 4, generator=generator)


FORMS = {
    "heads": {},
    "the axis from the front": {"axis": 3},
    "bmm": {"shape": (5, 7), "product": aten.bmm.default},
}


@pytest.mark.parametrize("form", FORMS)
def test_fires(form):
    graph_module = attention(**FORMS[form])
    assert DeferSoftmaxNormalization()(graph_module).modified
    found = operators(graph_module)
    assert found[aten.softmax.int] == 0 and found[aten.exp.default] == found[aten.div.Tensor] == 1
    (division,) = calls(graph_module, aten.div.Tensor)
    product, total = division.args
    assert product.args[0] is total.args[0] and product.args[0].target is aten.exp.default
    assert list(division.meta["nn_module_stack"]) == ["L__self__", "block.attention"]


@pytest.mark.parametrize(
    "options",
    [{"axis": 2}, {"axis": -2}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}],
    ids=str,
)
def test_does_not_fire(options):
    assert unchanged(DeferSoftmaxNormalization(), attention(shape=(2, 7, 7), **options))


def other_readers(read):
    builder = GraphBuilder()
    scores, value = builder.placeholder("scores", (2, 7, 7)), builder.placeholder("value", (2, 7, 7))
    weights = builder.call(aten.softmax.int, scores, -1)
    return builder.build(read(builder, weights, value))


OTHER_READERS = {
    "read twice": lambda b, w, v: [b.call(aten.matmul.default, w, v), w],
    "by two products": lambda b, w, v: [b.call(aten.matmul.default, w, v), b.call(aten.matmul.default, w, v)],
    "the second operand": lambda b, w, v: b.call(aten.matmul.default, v, w),
    "both operands": lambda b, w, v: b.call(aten.matmul.default, w, w),
    "returned": lambda b, w, v: [w, v],
    "a sum": lambda b, w, v: b.call(aten.add.Tensor, w, v),
    "broadcast by the product": lambda b, w, v: b.call(aten.matmul.default, w, b.call(aten.unsqueeze.default, v, 0)),
}


@pytest.mark.parametrize("case", OTHER_READERS)
def test_what_else_reads_a_softmax_keeps_it(case):
    assert unchanged(DeferSoftmaxNormalization(), other_readers(OTHER_READERS[case]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [0.1, 3.0, 90.0])
def test_numerics(dynamic, scale):
    more = [inputs(batch, scale=scale) for batch in (1, 5)] if dynamic else []
    graph_module = attention(dynamic=dynamic)
    assert_pass_contract(
        DeferSoftmaxNormalization, graph_module, inputs(scale=scale), rtol=1e-4, atol=1e-6, more_inputs=more
    )


def test_keys_that_a_mask_hides_weigh_nothing():
    scores, value = inputs()
    scores[..., 2:] = -torch.inf
    assert_pass_contract(DeferSoftmaxNormalization, attention(), (scores, value), rtol=1e-5)


def test_several_users_of_the_scores_and_the_result():
    builder = GraphBuilder()
    scores, value = builder.placeholder("scores", (2, 7, 7)), builder.placeholder("value", (2, 7, 7))
    first = builder.call(aten.matmul.default, builder.call(aten.softmax.int, scores, -1), value)
    second = builder.call(aten.matmul.default, builder.call(aten.softmax.int, scores, -1), first)
    graph_module = builder.build([first, builder.call(aten.neg.default, first), second, scores])
    example = (torch.randn(2, 7, 7), torch.randn(2, 7, 7))
    result = assert_pass_contract(DeferSoftmaxNormalization, graph_module, example, rtol=1e-4, atol=1e-6)
    assert operators(result.graph_module)[aten.div.Tensor] == 2


def test_behind_fused_attention():
    builder = GraphBuilder(dynamic_batch=True)
    q, k, v = (builder.placeholder(name, (builder.batch, 2, 5, 8)) for name in "qkv")
    mask = builder.placeholder("mask", (builder.batch, 1, 5, 5))
    graph_module = builder.build(builder.call(aten.scaled_dot_product_attention.default, q, k, v, mask))
    example = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    hiding = torch.zeros(2, 1, 5, 5)
    hiding[0, :, 2], hiding[1, :, :, 3] = -torch.inf, -torch.inf
    wanted = graph_module(*example, hiding)
    DecomposeAttention()(graph_module)
    result = assert_pass_contract(DeferSoftmaxNormalization, graph_module, (*example, hiding), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.graph_module(*example, hiding), wanted, rtol=1e-4, atol=1e-6)
