import pytest
import torch

from tfmq_fx.passes.support.byte_quantizers import byte_quantizer, dequantized_bytes, row_table
from tfmq_fx.testing import GraphBuilder
from tfmq_fx.testing.quantized_layers import dequantized, quantized, quantized_by_rows

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
BY_ROWS = decomposed.quantize_per_channel.default


def of_rows(count=2, **options):
    """A builder, an input of ``count`` items, and their rows."""
    builder = GraphBuilder(**options)
    size = builder.batch if options else count
    return builder, builder.placeholder("x", (size, 16, 4)), builder.placeholder("rows", (size,), torch.int64)


def by_index(builder, x, index, *, axis=0, bounds=(0, 255), dtype=torch.uint8, tables=None):
    """The quantize node of ``x`` by rows of a table at ``index``, a node for both or one for each."""
    indices = index if isinstance(index, tuple) else (index, index)
    tables = tables or (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([3, 128, 0]))
    gathered = [
        builder.call(aten.index_select.default, builder.buffer(name, value), 0, place)
        for name, value, place in zip(("scales", "zeros"), tables, indices, strict=True)
    ]
    return builder.call(BY_ROWS, x, *gathered, axis, *bounds, dtype)


def finished(builder, node):
    builder.build(node)  # a table is read off the module that the graph belongs to
    return node


def test_one_pair_of_numbers():
    builder, x, _ = of_rows()
    found = byte_quantizer(finished(builder, quantized(builder, x, 0.25, 7)))
    assert found.one == (0.25, 7) and found.table is None and found.operands == (0.25, 7)
    assert found.scales == [0.25] and found.zero_points == [7]


@pytest.mark.parametrize("parameters", [(0.1, 256), (0.1, -1), (0.1, 3, 0, 127), (0.1, 3, -128, 127, torch.int8)])
def test_no_byte(parameters):
    builder, x, _ = of_rows()
    assert byte_quantizer(finished(builder, quantized(builder, x, *parameters))) is None


def test_a_row_for_each_item():
    builder, x, rows = of_rows()
    found = byte_quantizer(finished(builder, by_index(builder, x, rows)))
    assert found.one is None and found.table.rows is rows
    assert found.operands == (found.table.scales, found.table.zero_points, rows)
    assert found.scales == torch.tensor([0.1, 0.2, 0.3]).tolist() and found.zero_points == [3, 128, 0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("each", [1, 4])
def test_rows_that_are_repeated_item_by_item(each, dynamic):
    builder, x, rows = of_rows(**({"dynamic_batch": True} if dynamic else {}))
    flat = builder.call(aten.reshape.default, x, [-1, 64 // each])
    assert row_table(finished(builder, quantized_by_rows(builder, flat, rows, each=each))).rows is rows


def test_rows_that_are_repeated_twice():
    """Axes before and behind: all entries of an item are still behind each other."""
    builder, x, rows = of_rows()
    flat = builder.call(aten.reshape.default, x, [-1, 4])
    index = rows
    for times in (2, 8):
        column = builder.call(aten.expand.default, builder.call(aten.unsqueeze.default, index, 1), [-1, times])
        index = builder.call(aten.reshape.default, column, [-1])
    assert row_table(finished(builder, by_index(builder, flat, index))).rows is rows


def test_one_row_for_all():
    builder, x, _ = of_rows()
    one = builder.placeholder("one", (1,), torch.int64)
    node = by_index(builder, x, builder.call(aten.expand.default, one, [2]))
    assert row_table(finished(builder, node)).rows is one


@pytest.mark.parametrize("order", ["repeat", "rows_first"])
def test_rows_in_another_order_are_those_of_each_entry(order):
    builder, x, rows = of_rows()
    flat = builder.call(aten.reshape.default, x, [-1, 16])
    if order == "repeat":
        index = builder.call(aten.repeat.default, rows, [4])
        assert row_table(finished(builder, by_index(builder, flat, index))).rows is index
    else:  # one is not certain: [4, 2] in the place of [2, 4]
        line = builder.call(aten.expand.default, builder.call(aten.unsqueeze.default, rows, 0), [4, -1])
        index = builder.call(aten.reshape.default, line, [-1])
        assert row_table(finished(builder, by_index(builder, flat, index))) is None


WRONG = {
    "rows of two kinds": lambda b, x, rows: by_index(b, x, (rows, b.call(aten.clone.default, rows))),
    "another axis": lambda b, x, rows: by_index(b, b.call(aten.transpose.int, x, 0, 1), rows, axis=1),
    "a smaller range": lambda b, x, rows: by_index(b, x, rows, bounds=(0, 127)),
    "signed bytes": lambda b, x, rows: by_index(b, x, rows, bounds=(-128, 127), dtype=torch.int8),
    "rows in int32": lambda b, x, rows: by_index(b, x, b.call(aten.to.dtype, rows, torch.int32)),
    "one row in int32": lambda b, x, rows: by_index(
        b, x, b.call(aten.expand.default, b.placeholder("one", (1,), torch.int32), [2])
    ),
    "a zero point beyond a byte": lambda b, x, rows: by_index(
        b, x, rows, tables=(torch.ones(2), torch.tensor([0, 256]))
    ),
    "a negative zero point": lambda b, x, rows: by_index(b, x, rows, tables=(torch.ones(2), torch.tensor([-1, 0]))),
    "a scale of zero": lambda b, x, rows: by_index(b, x, rows, tables=(torch.tensor([1.0, 0]), torch.tensor([1, 0]))),
    "an infinite scale": lambda b, x, rows: by_index(
        b, x, rows, tables=(torch.tensor([1.0, torch.inf]), torch.tensor([1, 0]))
    ),
    "double scales": lambda b, x, rows: by_index(
        b, x, rows, tables=(torch.ones(2, dtype=torch.float64), torch.tensor([1, 0]))
    ),
    "tables of two lengths": lambda b, x, rows: by_index(b, x, rows, tables=(torch.ones(3), torch.tensor([1, 0]))),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_table_of_bytes(case):
    builder, x, rows = of_rows()
    assert byte_quantizer(finished(builder, WRONG[case](builder, x, rows))) is None


def test_a_table_that_is_computed_is_none():
    builder, x, rows = of_rows()
    scales = builder.call(aten.mul.Tensor, builder.buffer("scales", torch.ones(3)), 0.5)
    zeros = builder.buffer("zeros", torch.tensor([1, 2, 3]))
    gathered = [builder.call(aten.index_select.default, table, 0, rows) for table in (scales, zeros)]
    assert row_table(finished(builder, builder.call(BY_ROWS, x, *gathered, 0, 0, 255, torch.uint8))) is None


def test_parameters_that_nothing_gathers_are_no_table():
    builder, x, _ = of_rows()
    own = builder.buffer("scales", torch.ones(2)), builder.buffer("zeros", torch.tensor([1, 2]))
    assert row_table(finished(builder, builder.call(BY_ROWS, x, *own, 0, 0, 255, torch.uint8))) is None


def test_bytes_are_dequantized_by_what_quantized_them():
    builder, x, rows = of_rows()
    once, other, one = by_index(builder, x, rows), quantized_by_rows(builder, x, rows), quantized(builder, x)
    right = [dequantized(builder, node) for node in (once, one)]
    wrong = [
        builder.call(decomposed.dequantize_per_channel.default, once, *other.args[1:]),
        builder.call(decomposed.dequantize_per_tensor.default, one, 0.5, *one.args[2:]),
    ]
    builder.build([*right, *wrong])
    assert [dequantized_bytes(node).node for node in right] == [once, one]
    assert [dequantized_bytes(node) for node in (*wrong, once, None, 3)] == [None] * 5
