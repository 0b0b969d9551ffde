import pytest
import torch
from torch import nn

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import AddLowRankBranches
from tfmq_fx.passes.layout.add_low_rank_branches import LowRankFactors, branched_weight, is_branch
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


class Observer(nn.Module):
    """Returns what it is given; a quantizer in its place would round it."""

    def forward(self, x):
        return x


class Rounding(nn.Module):
    def forward(self, x):
        return x.round()


def layer(*, kernel=3, observer=Observer, groups=1, bias=True, reads=1, geometry=([2, 2], [1, 1], [1, 1])):
    """A convolution behind an observer (``kernel=0``: a linear), ``reads`` times with one weight."""
    torch.manual_seed(0)
    builder = GraphBuilder()
    shape = (2, 6, 9, 9) if kernel else (5, 6)
    x = builder.placeholder("x", shape)
    weight = builder.parameter("layer.weight", torch.randn(8, 6 // groups, *[kernel] * (2 if kernel else 0)))
    arguments = [builder.call_module("observer_0", observer(), x), builder.call_module("weight_0", Observer(), weight)]
    arguments.append(builder.parameter("layer.bias", torch.randn(8)) if bias else None)
    with builder.inside("layer"):
        if kernel:
            target, arguments = aten.conv2d.default, [*arguments, *geometry, groups]
        else:
            target = aten.linear.default
        return builder.build([builder.call(target, *arguments) for _ in range(reads)]), torch.randn(shape)


def factors(graph_module, rank=2):
    weight = graph_module.get_parameter("layer.weight")
    torch.manual_seed(1)
    return {"layer.weight": LowRankFactors(torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank))}


@pytest.mark.parametrize("options", [{}, {"kernel": 1}, {"kernel": 0}, {"bias": False}])
def test_fires_and_keeps_numerics(options):
    graph_module, x = layer(**options)
    operator = aten.linear.default if options.get("kernel") == 0 else aten.conv2d.default
    given = factors(graph_module)
    result = assert_pass_contract(lambda: AddLowRankBranches(given, lambda layer: Observer()), graph_module, (x,))
    assert result.modified
    main, down, up = calls(result.graph_module, operator)
    assert [is_branch(node) for node in (main, down, up)] == [False, True, True]
    assert up.args[0] is down and down.args[0].op == "placeholder" and main.args[0].op == "call_module"
    assert all(node.meta["nn_module_stack"] == main.meta["nn_module_stack"] for node in (down, up))
    assert operators(result.graph_module)[aten.add.Tensor] == 1
    # The weight is gone, and each layer gets one branch.
    assert not any(name == "layer.weight" for name, _ in result.graph_module.named_parameters())
    assert branched_weight(main) is None and branched_weight(down) is None


def test_the_branch_reads_what_the_layer_does_not_see_any_more():
    graph_module, x = layer(observer=Rounding, kernel=0, bias=False)
    given = factors(graph_module)
    weight, part = graph_module.get_parameter("layer.weight"), given["layer.weight"].product()
    AddLowRankBranches(given, lambda layer: Observer())(graph_module)
    expected = x.round() @ (weight - part).T + x @ part.T
    assert torch.allclose(graph_module(x)[0], expected, atol=1e-5)


def test_does_not_fire_without_factors_for_grouped_convolutions_or_tied_weights():
    graph_module, _ = layer()
    assert unchanged(AddLowRankBranches({}, lambda layer: Observer()), graph_module)
    for options in ({"groups": 2}, {"reads": 2}):
        graph_module, _ = layer(**options)
        assert unchanged(AddLowRankBranches(factors(graph_module), lambda layer: Observer()), graph_module)


def test_the_result_may_have_several_users():
    builder = GraphBuilder()
    torch.manual_seed(0)
    x = builder.placeholder("x", (3, 4))
    y = builder.call(aten.linear.default, x, builder.parameter("layer.weight", torch.randn(6, 4)))
    graph_module = builder.build([builder.call(aten.add.Tensor, y, y), y])
    given = factors(graph_module)
    result = assert_pass_contract(
        lambda: AddLowRankBranches(given, lambda layer: Observer()), graph_module, (torch.randn(3, 4),)
    )
    assert result.modified and operators(result.graph_module)[aten.linear.default] == 3


def test_factors_have_the_shape_of_their_weight():
    graph_module, _ = layer(kernel=0)
    wrong = {"layer.weight": LowRankFactors(torch.zeros(2, 5), torch.zeros(8, 2))}
    with pytest.raises(ValueError, match=r"\[8, 2\] and \[2, 5\] do not make up 'layer.weight' of \[8, 6\]"):
        AddLowRankBranches(wrong, lambda layer: Observer())(graph_module)
