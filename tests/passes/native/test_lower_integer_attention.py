import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import LowerIntegerAttention
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import attention

aten = torch.ops.aten
ATTENTION = OPERATORS.integer_attention.default


def graph(*, dynamic=False, keys=7, depth=8, **options):
    sizes = ((None, 3, 5, depth), (None, 3, keys, depth), (None, 3, keys, depth))
    return graph_of(sizes, dynamic=dynamic, **options)


def graph_of(sizes, *, dynamic=False, **options):
    """Attention over inputs of these sizes, of which None is the batch."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    operands = [
        builder.placeholder(name, [builder.batch if size is None else size for size in shape])
        for name, shape in zip(("query", "key", "value"), sizes, strict=True)
    ]
    return builder.build(attention(builder, *operands, **options))


def drawn(sizes, batch=2):
    return tuple(torch.randn([batch if size is None else size for size in shape]) for shape in sizes)


def inputs(batch=2, keys=7, depth=8):
    return tuple(torch.randn(batch, 3, count, depth) for count in (5, keys, keys))


def test_fires():
    graph_module = graph()
    assert LowerIntegerAttention()(graph_module).modified
    (node,) = calls(graph_module, ATTENTION)
    assert node.args[3:] == (0.25, [0.008, 0.03, 1 / 255 / 4, 0.03], [128, 125, 130], False)
    assert set(operators(graph_module)) == {ATTENTION, aten.transpose.int}
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "attention"]


def test_fires_where_the_division_is_deferred():
    graph_module = graph(deferred=True)
    assert LowerIntegerAttention()(graph_module).modified
    (node,) = calls(graph_module, ATTENTION)
    assert node.args[3:] == (0.25, [0.008, 0.03, 1 / 255, 0.03], [128, 125, 130], True)
    assert set(operators(graph_module)) == {ATTENTION, aten.transpose.int}


def test_does_not_fire_where_a_deferred_division_is_not_by_its_own_sum():
    for change in ("more readers", "another sum", "other scores"):
        graph_module = graph(deferred=True)
        (total,), (output,) = calls(graph_module, aten.sum.dim_IntList), [graph_module.graph.output_node()]
        if change == "more readers":
            output.args = ((output.args[0], total),)
        elif change == "another sum":
            total.update_arg(1, [-2])
        else:
            (top,) = calls(graph_module, aten.amax.default)
            top.update_arg(2, False)
        graph_module.recompile()
        assert unchanged(LowerIntegerAttention(), graph_module), change


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("options", [{"depth": 6}, {"softmax_zero": 3}, {"bits": (0, 65535, torch.uint16)}])
def test_does_not_fire_on_what_the_kernel_does_not_cover(options, deferred):
    assert unchanged(LowerIntegerAttention(), graph(**options, deferred=deferred))


def test_does_not_fire_on_a_mask():
    builder = GraphBuilder()
    query, key, value, mask = (
        builder.placeholder(name, shape)
        for name, shape in (("query", (2, 3, 5, 8)), ("key", (2, 3, 7, 8)), ("value", (2, 3, 7, 8)), ("mask", (5, 7)))
    )
    assert unchanged(LowerIntegerAttention(), builder.build(attention(builder, query, key, value, mask=mask)))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keys", [7, 16, 33])
def test_numerics(dynamic, keys, deferred):
    more = [inputs(batch, keys) for batch in (1, 4)] if dynamic else []
    # One weight may round the other way: a step of a softmax that sums to 1.
    graph_module = graph(dynamic=dynamic, keys=keys, deferred=deferred)
    assert_pass_contract(LowerIntegerAttention, graph_module, inputs(2, keys), rtol=1e-3, atol=5e-3, more_inputs=more)


def test_several_users_of_the_inputs_and_the_result():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 3, 6, 8))
    first = attention(builder, x, x, x)
    second = attention(builder, first, x, x)
    graph_module = builder.build([first, second, builder.call(aten.neg.default, first), x])
    example = (torch.randn(2, 3, 6, 8),)
    result = assert_pass_contract(LowerIntegerAttention, graph_module, example, rtol=1e-3, atol=2e-2)
    assert len(calls(result.graph_module, ATTENTION)) == 2


def test_a_softmax_that_something_else_reads_stays():
    graph_module = graph()
    (softmax,) = calls(graph_module, aten.softmax.int)
    output = graph_module.graph.output_node()
    output.args = ((output.args[0], softmax),)
    graph_module.recompile()
    assert unchanged(LowerIntegerAttention(), graph_module)


SHARED = {
    "one head of keys and values": ((None, 4, 5, 8), (None, 1, 7, 8), (None, 1, 7, 8)),
    "one image of keys and values": ((None, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "one head, of one image, of values": ((None, 3, 5, 8), (None, 3, 7, 8), (1, 1, 7, 8)),
    "one query for all": ((1, 1, 5, 8), (None, 3, 7, 8), (None, 3, 7, 8)),
    "one image": ((1, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", SHARED)
def test_operands_that_matmul_broadcasts(case, dynamic):
    sizes = SHARED[case]
    more = [drawn(sizes, batch) for batch in (1, 4)] if dynamic else []
    example, graph_module = drawn(sizes), graph_of(sizes, dynamic=dynamic)
    result = assert_pass_contract(LowerIntegerAttention, graph_module, example, rtol=1e-3, atol=5e-3, more_inputs=more)
    assert len(calls(result.graph_module, ATTENTION)) == 1


@pytest.mark.parametrize("axis", [1, -3])
def test_grouped_queries_are_repeated_by_the_kernel(axis):
    builder = GraphBuilder(dynamic_batch=True)
    sizes = ((None, 6, 5, 8), (None, 2, 7, 8), (None, 2, 7, 8))
    query, key, value = (
        builder.placeholder(name, [builder.batch if size is None else size for size in shape])
        for name, shape in zip(("query", "key", "value"), sizes, strict=True)
    )
    repeated = [builder.call(aten.repeat_interleave.self_int, x, 3, axis) for x in (key, value)]
    graph_module = builder.build(attention(builder, query, *repeated))
    result = assert_pass_contract(
        LowerIntegerAttention, graph_module, drawn(sizes), rtol=1e-3, atol=5e-3, more_inputs=[drawn(sizes, 3)]
    )
    assert set(operators(result.graph_module)) == {ATTENTION, aten.transpose.int}


def test_heads_that_only_keys_repeat_or_that_meet_one_query_are_not_peeled():
    for heads, of_values in ((6, 6), (1, 2)):
        builder = GraphBuilder()
        sizes = ((2, heads, 5, 8), (2, 2, 7, 8), (2, of_values, 7, 8))
        query, key, value = (
            builder.placeholder(name, size) for name, size in zip(("query", "key", "value"), sizes, strict=True)
        )
        key = builder.call(aten.repeat_interleave.self_int, key, 3, 1)
        value = value if of_values == 6 else builder.call(aten.repeat_interleave.self_int, value, 3, 1)
        graph_module = builder.build(attention(builder, query, key, value))
        result = assert_pass_contract(LowerIntegerAttention, graph_module, drawn(sizes), rtol=1e-3, atol=5e-3)
        assert len(calls(result.graph_module, ATTENTION)) == 1
        assert calls(result.graph_module, aten.repeat_interleave.self_int)


@pytest.mark.parametrize(
    "sizes",
    [
        ((1, 1, 5, 33028), (1, 1, 7, 33028), (1, 1, 7, 33028)),  # a sum of products that no int32 holds
        ((1, 1, 5, 8), (1, 1, 9_000_000, 8), (1, 1, 9_000_000, 8)),  # the same of the second product
        ((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 16)),  # another depth of the values than of the result
    ],
)
def test_does_not_fire_where_the_kernel_would_be_wrong(sizes):
    assert unchanged(LowerIntegerAttention(), graph_of(sizes))


def test_does_not_fire_on_as_many_keys_as_there_are_images():
    """How many there are is not known, so neither is whether their sum fits."""
    builder = GraphBuilder(dynamic_batch=True)
    query = builder.placeholder("query", (1, 3, 5, 8))
    key, value = (builder.placeholder(name, (1, 3, builder.batch, 8)) for name in ("key", "value"))
    assert unchanged(LowerIntegerAttention(), builder.build(attention(builder, query, key, value)))
