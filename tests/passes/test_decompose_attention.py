import pytest
import torch
from tfmq_fx.passes import DecomposeAttention

from tests.passes.helpers import operators, unchanged
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
FUSED = aten.scaled_dot_product_attention.default


def attention(*, mask=None, mask_by_name=True, dynamic=False, heads=2, **options):
    builder = GraphBuilder(dynamic_batch=dynamic)
    shape = (builder.batch, heads, 5, 8) if heads else (builder.batch, 5, 8)
    q, k, v = (builder.placeholder(name, shape) for name in "qkv")
    arguments = [q, k, v]
    if mask is not None:
        node = builder.buffer("mask", mask)
        if mask_by_name:
            options["attn_mask"] = node
        else:
            arguments.append(node)
    with builder.inside("block.attention"):
        return builder.build(builder.call(FUSED, *arguments, **options))


def inputs(batch=2, heads=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, 5, 8) if heads else (batch, 5, 8)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


ADDITIVE = torch.linspace(-3, 3, 25).reshape(5, 5)
PLAIN = [
    {},
    {"scale": 0.3},
    {"scale": 0.0},
    {"dropout_p": 0.0, "is_causal": False},
    {"mask": ADDITIVE},
    {"mask": ADDITIVE, "mask_by_name": False, "scale": 2.0},
    {"heads": 0},
]


@pytest.mark.parametrize("options", PLAIN)
def test_fires(options):
    graph_module = attention(**options)
    assert DecomposeAttention()(graph_module).modified
    found = operators(graph_module)
    assert found[FUSED] == 0 and found[aten.matmul.default] == 2 and found[aten.softmax.int] == 1
    assert found[aten.add.Tensor] == ("mask" in options)


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"dropout_p": 0.5}, {"mask": torch.ones(5, 5, dtype=torch.bool)}, {"enable_gqa": True}],
)
def test_does_not_fire(options):
    assert unchanged(DecomposeAttention(), attention(**options))


def test_does_not_fire_on_tensors_given_by_name():
    builder = GraphBuilder()
    q = builder.placeholder("q", (2, 5, 8))
    assert unchanged(DecomposeAttention(), builder.build(builder.call(FUSED, q, key=q, value=q)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", PLAIN)
def test_numerics(options, dynamic):
    heads = options.get("heads", 2)
    more = [inputs(1, heads), inputs(5, heads)] if dynamic else []
    graph_module = attention(dynamic=dynamic, **options)
    assert_pass_contract(DecomposeAttention, graph_module, inputs(heads=heads), rtol=1e-5, more_inputs=more)


def test_several_users_of_query_and_result():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 5, 8))
    first = builder.call(FUSED, x, x, x)
    second = builder.call(FUSED, first, x, first)
    graph_module = builder.build((first, builder.call(aten.add.Tensor, first, second), second))
    result = assert_pass_contract(DecomposeAttention, graph_module, (torch.randn(2, 5, 8),), rtol=1e-5)
    assert operators(result.graph_module)[aten.matmul.default] == 4
