"""The count of multiply-adds, against counting by hand."""

import pytest
import torch

from tfmq_fx.passes.analysis.multiply_adds import multiply_adds
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten


def counted(target, *shapes, dynamic=False, wrap=lambda *operands: operands, weights=()):
    """The counts in a graph of one call of tensors of these shapes; those in ``weights`` are parameters."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    operands = [
        builder.weight(f"w{place}", shape) if place in weights else builder.placeholder(f"x{place}", shape)
        for place, shape in enumerate([(builder.batch, *shape[1:]) if shape[0] == "N" else shape for shape in shapes])
    ]
    return list(multiply_adds(builder.build(builder.call(target, *wrap(*operands)))).values())


@pytest.mark.parametrize(
    "target, shapes, count",
    [
        (aten.linear.default, [(2, 5, 4), (6, 4)], 2 * 5 * 4 * 6),
        (aten.conv2d.default, [(1, 4, 8, 8), (6, 4, 3, 3)], 6 * 6 * 6 * 4 * 9),
        (aten.conv_transpose2d.input, [(1, 4, 8, 8), (4, 6, 3, 3)], 64 * 4 * 6 * 9),
        (aten.matmul.default, [(2, 3, 4), (4, 6)], 2 * 3 * 4 * 6),
        (aten.baddbmm.default, [(2, 3, 6), (2, 3, 4), (2, 4, 6)], 2 * 3 * 4 * 6),
        (aten.addbmm.default, [(3, 6), (2, 3, 4), (2, 4, 6)], 2 * 3 * 4 * 6),
        (aten.bilinear.default, [(3, 4), (3, 5), (6, 4, 5)], 3 * 4 * 5 * 6),
        (aten.mv.default, [(3, 4), (4,)], 12),
        (aten.scaled_dot_product_attention.default, [(1, 2, 8, 4), (1, 2, 6, 4), (1, 2, 6, 4)], 2 * 2 * 8 * 6 * 4),
    ],
)
def test_counts(target, shapes, count):
    assert counted(target, *shapes) == [count]


def test_einsum_and_a_recurrent_layer():
    assert counted(aten.einsum.default, (2, 3, 4), (6, 4), wrap=lambda x, w: ("bnc,oc->bno", [x, w])) == [2 * 3 * 4 * 6]
    shapes = [(5, 1, 4), (1, 1, 6), (1, 1, 6), (24, 4), (24, 6), (24,), (24,)]

    def lstm(x, h, c, *weights):
        return x, [h, c], list(weights), True, 1, 0.0, False, False, False

    assert counted(aten.lstm.input, *shapes, wrap=lstm) == [5 * (24 * 4 + 24 * 6)]


def test_grouped_queries_and_causal_attention_count_too():
    builder = GraphBuilder()
    q, k, v = (builder.placeholder(name, (1, heads, 8, 4)) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    options = {"is_causal": True, "enable_gqa": True}
    graph_module = builder.build(builder.call(aten.scaled_dot_product_attention.default, q, k, v, **options))
    assert list(multiply_adds(graph_module).values()) == [2 * 4 * 8 * 8 * 4]


def test_a_symbolic_batch_counts_for_one_item():
    assert counted(aten.linear.default, ("N", 5, 4), (6, 4), dynamic=True) == [5 * 4 * 6]


def test_what_adds_up_no_products_does_not_count():
    assert counted(aten.mul.Tensor, (2, 4), (2, 4)) == counted(aten.add.Tensor, (2, 4), (2, 4)) == []
    assert counted(aten.cat.default, (2, 4), (2, 4), wrap=lambda *parts: (list(parts),)) == []
    assert counted(aten.group_norm.default, (2, 4, 3), (4,), (4,), wrap=lambda x, w, b: (x, 2, w, b)) == []
    assert counted(aten.embedding.default, (9, 4), (2,), wrap=lambda w, i: (w, torch.tensor([1, 2]))) == []


def test_an_operator_of_others_that_reads_a_matrix_of_weights_is_listed():
    assert counted(mystery, (2, 4), (4, 4), weights=(1,)) == [0]
    assert counted(mystery, (2, 4), (4, 4)) == []


@torch.library.custom_op("tfmq_tests::mystery", mutates_args=())
def _mystery(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


_mystery.register_fake(lambda x, weight: torch.empty_like(x))
mystery = torch.ops.tfmq_tests.mystery.default
