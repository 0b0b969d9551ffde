import pytest
import torch
from torch import fx, nn

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import InlineRegions
from tfmq_fx.testing import assert_pass_contract

aten, higher_order = torch.ops.aten, torch.ops.higher_order


class Regions(nn.Module):
    """Two layers, the second of them inside what ``around`` returns."""

    def __init__(self, *around):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.around = around

    def forward(self, x):
        x = self.first(x)
        return self.inside(x, list(self.around)) + 1

    def inside(self, x, around):
        if not around:
            y = self.second(x).reshape(x.shape[0], 2, 2)
            return y + y.sin()
        with around.pop()():
            return self.inside(x, around)


def exported(*around, dynamic=True):
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(Regions(*around).eval(), (torch.randn(3, 4),), dynamic_shapes=shapes)
    return program.module(check_guards=False)


def off():
    return torch.autocast("cpu", enabled=False)


def elsewhere():
    return torch.autocast("cuda", dtype=torch.float16)


def on():
    return torch.autocast("cpu", dtype=torch.bfloat16)


HARMLESS = [(torch.enable_grad,), (off,), (elsewhere,), (off, torch.enable_grad), (torch.enable_grad, off)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("around", HARMLESS)
def test_fires(around):
    graph_module = exported(*around)
    assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph_module.graph.nodes)
    assert InlineRegions()(graph_module).modified
    assert operators(graph_module)[aten.linear.default] == 2
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph_module.graph.nodes)
    assert [name for name, _ in graph_module.named_children()] == ["first", "second"]
    linear = [node for node in graph_module.graph.nodes if node.target is aten.linear.default][-1]
    assert list(linear.meta["nn_module_stack"].values())[-1][0] == "second"
    x = torch.randn(5, 4)
    assert torch.equal(graph_module(x), Regions()(x))


def test_does_not_fire_without_regions_or_on_autocast_that_is_on():
    assert unchanged(InlineRegions(), exported())
    assert unchanged(InlineRegions(), exported(on))


def test_what_stands_in_a_harmless_region_stays_where_it_cannot_be_inlined():
    graph_module = exported(on, torch.enable_grad)
    x = torch.randn(3, 4)
    before = graph_module(x)
    InlineRegions()(graph_module)
    kinds = [
        node.target for node in graph_module.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)
    ]
    assert kinds == [higher_order.wrap_with_autocast]
    assert torch.equal(graph_module(x), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("around", HARMLESS)
def test_numerics(around):
    more = [(torch.randn(size, 4),) for size in (1, 7)]
    assert_pass_contract(InlineRegions, exported(*around), (torch.randn(3, 4),), exact=True, more_inputs=more)


def test_several_users_and_results():
    class Two(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                y, z = x.sin(), x.cos()
            return y + z, y * 2, z

    with torch.no_grad():
        graph_module = torch.export.export(Two(), (torch.randn(2, 3),)).module(check_guards=False)
    assert_pass_contract(InlineRegions, graph_module, (torch.randn(2, 3),), exact=True)


def test_a_body_that_is_called_twice_is_copied_twice():
    body = fx.symbolic_trace(nn.Sequential(nn.SiLU()))
    root, graph = nn.Module(), fx.Graph()
    root.add_module("body", body)
    x = graph.placeholder("x")
    read = graph.get_attr("body")
    once = graph.call_function(higher_order.tag_activation_checkpoint, (read, x))
    graph.output(graph.call_function(higher_order.tag_activation_checkpoint, (read, once)))
    graph_module = fx.GraphModule(root, graph)
    InlineRegions()(graph_module)
    assert sum(node.op == "call_module" for node in graph_module.graph.nodes) == 2
    value = torch.randn(3)
    assert torch.equal(graph_module(value), nn.functional.silu(nn.functional.silu(value)))
