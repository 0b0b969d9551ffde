"""Programs that were decomposed before we saw them: their readers take only the strides that they were traced with."""

import operator

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser, tiny_unet
from tfmq_fx.passes import DecomposeAttention, GraphPass, SplitConcatenatedConvs
from tfmq_fx.passes.support.nodes import insert_call
from tfmq_fx.passes.support.strides import layout
from tfmq_fx.testing import ContractViolation, GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def result_of(value):
    return value if isinstance(value, torch.Tensor) else value.sample


@torch.no_grad()
@pytest.mark.parametrize("table", [None, {}], ids=["core", "inference"])
@pytest.mark.parametrize("make", [small_denoiser, tiny_unet])
def test_a_decomposed_program_is_quantized(make, table):
    model, inputs = make().eval(), batch()
    exported = torch.export.export(model, inputs).run_decompositions(table)
    prepared = tfmq_fx.prepare(tfmq_fx.capture(exported), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [inputs], progress=False)
    quantized = tfmq_fx.convert(prepared)
    error = relative(result_of(quantized(*inputs)), result_of(model(*inputs)))
    assert 0 < error < 0.04


def attention_before(reader):
    """Fused attention, whose result lies head by head in each row, and a reader that counts on it."""
    builder = GraphBuilder()
    q, k, v = (builder.placeholder(name, (2, 4, 6, 8)) for name in "qkv")
    fused = builder.call(aten.scaled_dot_product_attention.default, q, k, v)
    with torch.no_grad():
        strided = torch.empty_strided((2, 4, 6, 8), (192, 8, 32, 1))
    fused.meta["val"] = fused.meta["val"].fake_mode.from_tensor(strided)
    rows = builder.call(aten.transpose.int, fused, 1, 2)
    return builder.build(reader(builder, rows)), [torch.randn(2, 4, 6, 8) for _ in range(3)]


def test_attention_is_decomposed_in_front_of_a_view():
    graph_module, inputs = attention_before(lambda b, rows: b.call(aten.view.default, rows, [2, 6, 32]))
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs).transpose(1, 2).reshape(2, 6, 32)
    result = DecomposeAttention()(graph_module)
    torch.testing.assert_close(result.graph_module(*inputs), wanted)


def test_no_copy_is_made_where_any_layout_will_do():
    graph_module, _ = attention_before(lambda b, rows: b.call(aten.reshape.default, rows, [2, 6, 32]))
    rewritten = DecomposeAttention()(graph_module).graph_module
    assert not [n for n in rewritten.graph.nodes if n.target is aten.contiguous.default]
    rows = next(n for n in rewritten.graph.nodes if n.name == "transpose_int")
    assert layout(rows.meta["val"]) == ("192", "8", "48", "1")


def test_a_split_conv_in_front_of_a_norm_that_takes_only_dense_values():
    builder = GraphBuilder()
    x, y = (builder.placeholder(name, (2, 4, 3, 5)) for name in "xy")
    turned = [builder.call(aten.permute.default, n, [0, 1, 3, 2]) for n in (x, y)]
    cat = builder.call(aten.cat.default, turned, 1)
    conv = builder.call(aten.conv2d.default, cat, builder.weight("w", (4, 8, 1, 1)))
    shape = (2, 4, 15, 2, 1e-5)
    norm = builder.call(aten.native_group_norm.default, conv, None, None, *shape)
    graph_module = builder.build(builder.call(aten.relu.default, builder.call(operator.getitem, norm, 0)))
    inputs = [torch.randn(2, 4, 3, 5) for _ in "xy"]
    assert assert_pass_contract(SplitConcatenatedConvs, graph_module, inputs).modified


class TurnsMemory(GraphPass):
    """Deliberately broken: its result has the right values in another order of memory."""

    id = "tests::turns_memory"

    def rewrite(self, graph_module):
        graph, node = graph_module.graph, next(n for n in graph_module.graph.nodes if n.target is aten.relu.default)
        users = list(node.users)
        with graph.inserting_before(node.next):
            turned = insert_call(graph, aten.permute.default, (node, [1, 0]), anchor=node)
            dense = insert_call(graph, aten.contiguous.default, (turned,), anchor=node)
            back = insert_call(graph, aten.permute.default, (dense, [1, 0]), anchor=node)
        for user in users:
            user.replace_input_with(node, back)
        return True


def test_the_contract_sees_strides():
    builder = GraphBuilder()
    x = builder.placeholder("x", (3, 4))
    graph_module = builder.build(builder.call(aten.relu.default, x))
    with pytest.raises(ContractViolation, match=r"P5 .*output .* by \(1, 3\), it was .* by \(4, 1\)"):
        assert_pass_contract(TurnsMemory, graph_module, [torch.randn(3, 4)])
