"""Attention whose operands have a row of a table for each item."""

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import LowerIntegerAttention
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import attention, dequantized, quantized_by_rows, rounded

aten = torch.ops.aten
ATTENTION = OPERATORS.integer_attention.rows
QUERY, KEY, SOFTMAX, VALUE = range(4)
#: One weight may round the other way: a step of a softmax that sums to 1.
LOOSE = {"rtol": 1e-3, "atol": 5e-3}


def roundings(rows, tables=range(4), **special):
    """Rounds the operands of attention in turn: those of ``tables`` by rows, the others by one pair of numbers."""
    turn = iter(range(4))

    def rounding(builder, node, scale, zero, *bits):
        operand = next(turn)
        if operand not in tables:
            return rounded(builder, node, scale, zero, *bits)
        zeros = (zero, zero, zero) if operand == SOFTMAX else (zero, zero - 9, zero + 4)
        scales = (scale, 1.5 * scale, scale / 1.2)
        own = special.get(f"rows_of_{operand}", rows)
        scales, zeros = special.get(f"table_of_{operand}", (scales, zeros))
        return dequantized(builder, quantized_by_rows(builder, node, own, scales, zeros))

    return rounding


def graph(*, dynamic=False, sizes=None, batch=2, **options):
    builder = GraphBuilder(dynamic_batch=dynamic, batch=batch)
    sizes = sizes or ((None, 3, 5, 8), (None, 3, 7, 8), (None, 3, 7, 8))
    operands = [
        builder.placeholder(name, [builder.batch if size is None else size for size in shape])
        for name, shape in zip(("query", "key", "value"), sizes, strict=True)
    ]
    rows = builder.placeholder("rows", (builder.batch,), torch.int64)
    rounding = roundings(rows, **options)
    return builder.build(attention(builder, *operands, rounding=rounding))


def inputs(batch=2, sizes=None):
    generator = torch.Generator().manual_seed(batch)
    sizes = sizes or ((None, 3, 5, 8), (None, 3, 7, 8), (None, 3, 7, 8))
    shapes = ([batch if size is None else size for size in shape] for shape in sizes)
    rows = torch.randint(0, 3, (batch,), generator=generator)
    return (*(torch.randn(shape, generator=generator) for shape in shapes), rows)


def test_fires():
    graph_module = graph()
    assert LowerIntegerAttention()(graph_module).modified
    (node,) = calls(graph_module, ATTENTION)
    assert node.args[3] == 0.25 and node.args[6].name == "rows"
    scales, zeros = (graph_module.get_buffer(table.target) for table in node.args[4:6])
    expected = torch.tensor([0.008, 0.03, 1 / 255 / 4, 0.03])
    torch.testing.assert_close(scales, torch.stack([expected, 1.5 * expected, expected / 1.2]))
    assert zeros.tolist() == [[128, 125, 0, 130], [119, 116, 0, 121], [132, 129, 0, 134]]
    assert set(operators(graph_module)) == {ATTENTION, aten.transpose.int}
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "attention"]


@pytest.mark.parametrize("tables", [(QUERY,), (SOFTMAX,), (KEY, VALUE), range(4)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(dynamic, tables):
    more = [inputs(batch) for batch in (1, 4)] if dynamic else []
    graph_module = graph(dynamic=dynamic, tables=tables)
    result = assert_pass_contract(LowerIntegerAttention, graph_module, inputs(), more_inputs=more, **LOOSE)
    assert len(calls(result.graph_module, ATTENTION)) == 1


REFUSED = {
    "a softmax with a zero point": {f"table_of_{SOFTMAX}": ((0.001, 0.002), (0, 1))},
    "a zero point beyond a byte": {f"table_of_{KEY}": ((0.03, 0.02), (0, 256))},
    "a negative zero point": {f"table_of_{VALUE}": ((0.03, 0.02), (-1, 4))},
    "tables of two lengths": {f"table_of_{VALUE}": ((0.03, 0.02), (100, 140))},
}


@pytest.mark.parametrize("case", REFUSED)
def test_does_not_fire(case):
    assert unchanged(LowerIntegerAttention(), graph(**REFUSED[case]))


def test_does_not_fire_on_rows_of_two_kinds():
    builder = GraphBuilder()
    operands = [builder.placeholder(name, (2, 3, 7, 8)) for name in ("query", "key", "value")]
    rows, other = (builder.placeholder(name, (2,), torch.int64) for name in ("rows", "other"))
    rounding = roundings(rows, **{f"rows_of_{VALUE}": other})
    assert unchanged(LowerIntegerAttention(), builder.build(attention(builder, *operands, rounding=rounding)))


def test_does_not_fire_where_a_weight_is_too_small_for_an_int32_in_one_row():
    keys, small = 40000, 2e-7
    sizes = ((None, 1, 1, 4), (None, 1, keys, 4), (None, 1, keys, 4))
    options = {f"table_of_{SOFTMAX}": ((0.001, small, 0.001), (0, 0, 0))}
    assert unchanged(LowerIntegerAttention(), graph(sizes=sizes, **options))


ONE_IMAGE = ((None, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8))


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_and_values_of_one_image_have_one_pair_of_numbers(dynamic):
    graph_module = graph(dynamic=dynamic, sizes=ONE_IMAGE, tables=(QUERY, SOFTMAX))
    more = [inputs(batch, ONE_IMAGE) for batch in (1, 4)] if dynamic else []
    result = assert_pass_contract(LowerIntegerAttention, graph_module, inputs(2, ONE_IMAGE), more_inputs=more, **LOOSE)
    (node,) = calls(result.graph_module, ATTENTION)
    scales, zeros = (result.graph_module.get_buffer(table.target) for table in node.args[4:6])
    for place in (KEY, VALUE):
        assert len(set(scales[:, place].tolist())) == len(set(zeros[:, place].tolist())) == 1


def test_does_not_fire_on_a_table_for_keys_of_one_image():
    """One image for all items would have to be quantized once for each row."""
    builder = GraphBuilder()
    operands = [builder.placeholder(name, (n, 3, 7, 8)) for name, n in (("query", 2), ("key", 1), ("value", 1))]
    rows = builder.placeholder("rows", (1,), torch.int64)
    both = builder.call(aten.expand.default, rows, [2])
    rounding = roundings(both, **{f"rows_of_{place}": rows for place in (KEY, VALUE)})
    assert unchanged(LowerIntegerAttention(), builder.build(attention(builder, *operands, rounding=rounding)))


def test_a_batch_of_one_item():
    sizes = ((1, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8))
    result = assert_pass_contract(LowerIntegerAttention, graph(sizes=sizes, batch=1), inputs(1), **LOOSE)
    assert len(calls(result.graph_module, ATTENTION)) == 1


def test_several_users_of_the_inputs_the_table_and_the_result():
    builder = GraphBuilder()
    x, rows = builder.placeholder("x", (2, 3, 6, 8)), builder.placeholder("rows", (2,), torch.int64)
    first = attention(builder, x, x, x, rounding=roundings(rows))
    second = attention(builder, first, x, x, rounding=roundings(rows))
    shared = quantized_by_rows(builder, x, rows)
    graph_module = builder.build([first, second, builder.call(aten.neg.default, first), x, shared])
    x, *_, rows = inputs(sizes=((None, 3, 6, 8),) * 3)
    result = assert_pass_contract(LowerIntegerAttention, graph_module, (x, rows), rtol=1e-3, atol=2e-2)
    assert len(calls(result.graph_module, ATTENTION)) == 2
