import copy
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import ReplaceInPlace
from tfmq_fx.passes.canonical.replace_in_place import functional_overload
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def chain():
    """``h`` is written to twice, and read before, between and after."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 4))
    h = builder.call(aten.linear.default, x, builder.weight("fc.weight", (4, 4)))
    before = builder.call(aten.sin.default, h)
    added = builder.call(aten.add_.Tensor, h, x)
    between = builder.call(aten.cos.default, h)
    builder.call(aten.relu_.default, added)
    parts = [before, between, h, added]
    return builder.build(builder.call(aten.cat.default, parts, 1)), (torch.randn(3, 4),)


def test_fires():
    graph_module, inputs = chain()
    result = assert_pass_contract(ReplaceInPlace, graph_module, inputs, exact=True)
    assert result.modified
    found = operators(result.graph_module)
    assert found[aten.add.Tensor] == 1 and found[aten.relu.default] == 1
    assert not any(target._schema.is_mutable for target in found)


def test_several_users_read_what_was_there_when_they_read_it():
    graph_module, inputs = chain()
    changed = copy.deepcopy(graph_module)
    ReplaceInPlace()(changed)
    assert torch.equal(changed(*inputs), graph_module(*inputs))


def test_a_model_with_plain_in_place_code():
    class Model(torch.nn.Module):
        def forward(self, x):
            h = x.sin()
            h += x
            h = torch.nn.functional.relu(h, inplace=True)
            a, b = (h * 2).chunk(2, 1)
            return torch.cat([a.mul(b).clamp_(-1, 1), h], 1)

    graph_module = torch.export.export(Model(), (torch.randn(3, 4),)).module(check_guards=False)
    wanted = graph_module(torch.ones(3, 4))
    assert ReplaceInPlace()(graph_module).modified
    assert not any(t._schema.is_mutable for t in operators(graph_module) if t is not operator.getitem)
    assert torch.equal(graph_module(torch.ones(3, 4)), wanted)


def written(kind):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    h = builder.call(aten.sin.default, x)
    if kind == "an input":
        return builder.build(builder.call(aten.relu_.default, x))
    if kind == "a view of an input":
        return builder.build(builder.call(aten.relu_.default, builder.call(aten.view.default, x, [4, 2])))
    if kind == "a weight":
        return builder.build(builder.call(aten.relu_.default, builder.weight("w", (2, 4))))
    if kind == "a view that is made otherwise, whose base is read":
        builder.call(aten.relu_.default, builder.call(aten.view.default, h, [4, 2]))
        return builder.build(h)
    if kind == "a part of an input":
        builder.call(aten.copy_.default, builder.call(aten.slice.Tensor, x, 1, 0, 4), h)
        return builder.build(x)
    if kind == "a base whose other view is read":
        view = builder.call(aten.view.default, h, [4, 2])
        builder.call(aten.add_.Tensor, h, 1)
        return builder.build(view)
    if kind == "a dropout that drops nothing":
        builder.call(aten.mul_.Tensor, builder.call(aten.dropout.default, h, 0.1, False), 3.0)
        return builder.build(h)
    if kind == "one part of a split":
        whole = builder.call(aten.split.Tensor, h, 2, 1)
        builder.call(aten.relu_.default, builder.call(operator.getitem, whole, 0))
        return builder.build(h)
    return builder.build(builder.call(aten.relu.default, h))


@pytest.mark.parametrize(
    "kind",
    [
        "an input",
        "a view of an input",
        "a weight",
        "a view that is made otherwise, whose base is read",
        "a part of an input",
        "a base whose other view is read",
        "a dropout that drops nothing",
        "one part of a split",
        "nothing",
    ],
)
def test_does_not_fire_on(kind):
    assert unchanged(ReplaceInPlace(), written(kind))


@pytest.mark.parametrize("written_part", [True, False])
def test_a_part_beside_what_is_written_is_a_part_of_the_new_value(written_part):
    builder = GraphBuilder()
    h = builder.call(aten.sin.default, builder.placeholder("x", (2, 4)))
    before = builder.call(aten.slice.Tensor, h, 1, 1, 3)
    inner = builder.call(aten.select.int, before, 0, 1)
    early = builder.call(aten.neg.default, before)
    builder.call(aten.mul_.Tensor, builder.call(aten.slice.Tensor, h, 1, 0, 2) if written_part else h, 3.0)
    graph_module = builder.build((before, inner, early))
    result = assert_pass_contract(ReplaceInPlace, graph_module, (torch.randn(2, 4),), exact=True)
    assert result.modified and not any(target._schema.is_mutable for target in operators(result.graph_module))


class Crossed(torch.nn.Module):
    """Two halves of one value, each changed by what the other was made of, as in LTX-2's rotary embedding."""

    def forward(self, x, sin):
        out = x * 2.0
        first, second = out[:, :, :2], out[:, :, 2:]
        first.addcmul_(-sin, x[:, :, 2:])
        second.addcmul_(sin, x[:, :, :2])
        return out, second.sum(-1)


def test_halves_that_are_written_in_turn():
    batch = {0: torch.export.Dim("batch", min=2)}
    inputs = (torch.randn(3, 4, 4), torch.randn(2))
    program = torch.export.export(Crossed(), inputs, dynamic_shapes=(batch, None))
    graph_module = program.module(check_guards=False)
    result = assert_pass_contract(ReplaceInPlace, graph_module, inputs, exact=True)
    assert not any(target._schema.is_mutable for target in operators(result.graph_module) if hasattr(target, "_schema"))
    more = (torch.randn(5, 4, 4), torch.randn(2))
    for ours, theirs in zip(result.graph_module(*more), Crossed()(*more), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wider_operand_does_not_change_the_dtype():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4), torch.float32)
    h = builder.call(aten.to.dtype, builder.call(aten.sin.default, x), torch.bfloat16)
    builder.call(aten.add_.Tensor, h, x)  # add would give float32
    assert unchanged(ReplaceInPlace(), builder.build(h))


def test_a_constant_that_a_model_makes_is_only_detached_by_name():
    class Model(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor([0.5, 2.0])

    graph_module = torch.export.export(Model(), (torch.randn(3, 2),)).module(check_guards=False)
    assert aten.detach_.default in operators(graph_module)
    result = assert_pass_contract(ReplaceInPlace, graph_module, (torch.randn(3, 2),), exact=True)
    assert result.modified and aten.detach_.default not in operators(result.graph_module)


def test_overloads():
    assert functional_overload(aten.add_.Tensor) is aten.add.Tensor
    for target in (aten.add.Tensor, aten.add.out, operator.iadd):
        assert functional_overload(target) is None


class Rotated(torch.nn.Module):
    """Writes its result part by part into memory that it made, as rotary embeddings do."""

    def forward(self, x, cos):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2]
        out[..., 1::2] = x[..., 1::2].double()
        out[0, :, :1] += 1.0
        part = out[1]
        part[0] = 3.0
        part.mul_(2.0)
        return out, part, out.sum(-1)


def test_parts_that_are_written_to_are_parts_of_a_new_whole():
    batch = {0: torch.export.Dim("batch", min=2)}
    inputs = (torch.randn(3, 4, 6), torch.randn(3))
    program = torch.export.export(Rotated(), inputs, dynamic_shapes=(batch, None))
    graph_module = program.module(check_guards=False)
    result = assert_pass_contract(ReplaceInPlace, graph_module, inputs, exact=True)
    found = operators(result.graph_module)
    assert result.modified and found[aten.slice_scatter.default] >= 3 and found[aten.select_scatter.default] >= 2
    assert not any(target._schema.is_mutable for target in found if target is not operator.getitem)
    more = (torch.randn(5, 4, 6), torch.randn(3))
    for ours, theirs in zip(result.graph_module(*more), Rotated()(*more), strict=True):
        assert torch.equal(ours, theirs)


STEPS = ("sin", "view", "slice", "select", "relu_", "add_", "mul_", "copy_")


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=10))
def test_whatever_shares_memory_the_results_are_the_same(steps):
    builder = GraphBuilder()
    pool = [builder.call(aten.cos.default, builder.placeholder("x", (4, 4)))]
    for kind, first, second in steps:
        x, y = pool[first % len(pool)], pool[second % len(pool)]
        if kind == "sin":
            pool.append(builder.call(aten.sin.default, x))
        elif kind == "view":
            pool.append(builder.call(aten.reshape.default, x, [-1, 2]))
        elif kind == "slice":
            pool.append(builder.call(aten.slice.Tensor, x, 0, second % 2, 4, 2))
        elif kind == "select":
            pool.append(builder.call(aten.unsqueeze.default, builder.call(aten.select.int, x, 0, 0), 0))
        elif kind == "relu_":
            pool.append(builder.call(aten.relu_.default, x))
        elif list(x.meta["val"].shape) == list(y.meta["val"].shape) and x is not y:
            pool.append(
                builder.call(getattr(aten, kind).default if kind == "copy_" else getattr(aten, kind).Tensor, x, y)
            )
    graph_module = builder.build(
        builder.call(aten.cat.default, [builder.call(aten.flatten.using_ints, p) for p in pool])
    )
    inputs = (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)),)
    assert_pass_contract(ReplaceInPlace, graph_module, inputs, exact=True)
