import pytest
import torch

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import DecomposeAttention
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
    assert found[aten.add.Tensor] == ("mask" in options) and found[aten.where.ScalarSelf] == 0


def hiding(*shape, rows=(1, 3), value=-torch.inf):
    """A mask that hides all keys from some queries, and the first key from all."""
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mask[..., 0] = -torch.inf
    mask[..., [row for row in rows if row < shape[-2]], :] = value
    return mask


HIDING = [hiding(5, 5), hiding(1, 5), hiding(1, 5, rows=(0,)), hiding(2, 5, 5), hiding(2, 1, 1, 5, rows=(0,))]


@pytest.mark.parametrize("mask", HIDING, ids=lambda mask: str(list(mask.shape)))
@pytest.mark.parametrize("given", ["buffer", "input"])
def test_queries_that_see_nothing_give_zero(mask, given):
    builder = GraphBuilder()
    q, k, v = (builder.placeholder(name, (2, 2, 5, 8)) for name in "qkv")
    node = builder.buffer("mask", mask) if given == "buffer" else builder.placeholder("mask", tuple(mask.shape))
    graph_module = builder.build(builder.call(FUSED, q, k, v, node))
    example = (*inputs(), *((mask,) if given == "input" else ()))
    # Shown once to be what the fused op does, once to be kept by the pass.
    hidden = (mask == -torch.inf).all(-1).expand(2, 2, 5)
    assert torch.equal((graph_module(*example) == 0).all(-1), hidden)
    result = assert_pass_contract(DecomposeAttention, graph_module, example, rtol=1e-5).graph_module
    assert torch.equal((result(*example) == 0).all(-1), hidden)
    second = [node for node in result.graph.nodes if node.target is aten.matmul.default][1]
    assert second.args[0].target is aten.softmax.int
    assert operators(result)[aten.where.ScalarSelf] == (2 if given == "input" or bool(hidden.any()) else 0)


def test_the_smallest_number_hides_nothing():
    mask = hiding(5, 5, value=torch.finfo(torch.float32).min)
    graph_module = attention(mask=mask)
    assert not bool((graph_module(*inputs()) == 0).all(-1).any())
    assert_pass_contract(DecomposeAttention, graph_module, inputs(), rtol=1e-5)


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
