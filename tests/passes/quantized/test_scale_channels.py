import pytest
import torch
from torch import nn

from tests.passes.helpers import calls, unchanged
from tfmq_fx.passes import ScaleChannels
from tfmq_fx.passes.quantized.scale_channels import scalable_weights
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
FACTORS = torch.tensor([1.0, 2.0, 0.25, 1024.0])


class Observer(nn.Module):
    def forward(self, x):
        return x


def observed(build, *, inputs=("x",), shape=(2, 4, 5, 5)):
    """A graph whose layers read observers: ``build(builder, observed inputs)`` returns its outputs."""
    builder = GraphBuilder()
    sources = [builder.placeholder(name, shape) for name in inputs]
    seen = [builder.call_module(f"observer_{number}", Observer(), x) for number, x in enumerate(sources)]
    return builder.build(build(builder, seen))


def conv(builder, x, name, channels=6, groups=1):
    weight = builder.parameter(f"{name}.weight", torch.randn(channels, 4 // groups, 3, 3))
    with builder.inside(name):
        return builder.call(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], [1, 1], groups)


def two_readers(builder, sources):
    return [conv(builder, sources[0], "one"), conv(builder, sources[0], "two", channels=3)]


def test_fires_and_keeps_numerics_to_the_bit_with_several_readers():
    torch.manual_seed(0)
    graph_module = observed(two_readers)
    x = torch.randn(2, 4, 5, 5)
    scale = lambda: ScaleChannels({"observer_0": FACTORS})  # noqa: E731
    result = assert_pass_contract(scale, graph_module, (x,), exact=True).graph_module
    (product,) = calls(result, aten.mul.Tensor)
    (observer,) = result.graph.find_nodes(op="call_module")
    assert observer.args[0] is product and len(observer.users) == 2
    names = [name for name, _ in (*result.named_parameters(), *result.named_buffers())]
    assert len(names) == 3 and not any(name.endswith(".weight") for name in names)


def test_scales_the_last_axis_of_what_linears_read():
    torch.manual_seed(0)

    def linear(builder, sources):
        weight = builder.parameter("layer.weight", torch.randn(6, 4))
        return [builder.call(aten.linear.default, sources[0], weight, None)]

    graph_module = observed(linear, shape=(7, 4))
    x = torch.randn(7, 4)
    assert_pass_contract(lambda: ScaleChannels({"observer_0": FACTORS}), graph_module, (x,), exact=True)


def test_does_not_fire_without_factors_or_where_a_weight_cannot_take_them():
    torch.manual_seed(0)
    assert unchanged(ScaleChannels({}), observed(two_readers))
    assert unchanged(ScaleChannels({"observer_7": FACTORS}), observed(two_readers))

    def grouped(builder, sources):
        return [conv(builder, sources[0], "grouped", channels=4, groups=2)]

    def tied(builder, sources):
        weight = builder.parameter("tied.weight", torch.randn(6, 4, 3, 3))
        return [builder.call(aten.conv2d.default, x, weight, None) for x in sources]

    for build, inputs in ((grouped, ("x",)), (tied, ("x", "y"))):
        graph_module = observed(build, inputs=inputs)
        (first, *_) = graph_module.graph.find_nodes(op="call_module")
        assert scalable_weights(first) == []
        assert unchanged(ScaleChannels({"observer_0": FACTORS}), graph_module)


@pytest.mark.parametrize("wrong", [0.0, -2.0, float("inf"), float("nan")])
def test_factors_are_positive_and_finite(wrong):
    with pytest.raises(ValueError, match="must be positive and finite"):
        ScaleChannels({"observer_0": torch.tensor([1.0, wrong])})


def test_factors_of_any_size_keep_numerics_close():
    torch.manual_seed(0)
    factors = torch.tensor([0.3, 1.7, 90.0, 1e-3])
    scale = lambda: ScaleChannels({"observer_0": factors})  # noqa: E731
    assert_pass_contract(scale, observed(two_readers), (torch.randn(2, 4, 5, 5),), rtol=1e-5)
