"""Which convolutions carry a residual stream past a branch."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx.frontend.roles import find_roles
from tfmq_fx.passes.analysis import find_shortcuts, layer_name

CHANNELS = 8


def point(channels=CHANNELS, out=CHANNELS):
    return nn.Conv2d(channels, out, 1)


class Model(nn.Module):
    """A function of an image with some convolutions of its own."""

    def __init__(self, function, **convs):
        super().__init__()
        self.function = function
        for name, conv in convs.items():
            setattr(self, name, conv)

    def forward(self, x, timestep):
        return self.function(self, x) + timestep


def wide():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


CASES = {
    "a residual block": (lambda m, x: m.one(x) + m.two(x.sigmoid()), {"one": point(), "two": wide()}, ["one"]),
    "from the other side": (lambda m, x: m.two(x.sigmoid()) + m.one(x), {"one": point(), "two": wide()}, ["one"]),
    "behind another sum": (
        lambda m, x: m.two(x.sigmoid()) + (m.one(x).contiguous() + 1.0 * m.two.bias[:, None, None].expand(x.shape)),
        {"one": point(), "two": wide()},
        ["one"],
    ),
    "two beside each other": (lambda m, x: m.one(x) + m.two(x), {"one": point(), "two": point()}, ["one", "two"]),
    "a wide one": (lambda m, x: m.one(x) + x.sigmoid(), {"one": wide()}, []),
    "a feed-forward": (lambda m, x: x + m.two(m.one(x).relu()), {"one": point(), "two": point()}, []),
    "one that nothing else meets": (lambda m, x: m.one(x), {"one": point()}, []),
    "a product": (lambda m, x: m.one(x) * x.sigmoid(), {"one": point()}, []),
    "a sum with what was before": (lambda m, x: x + m.one(x.sigmoid()), {"one": point()}, []),
}


@pytest.mark.parametrize("function, convs, wanted", CASES.values(), ids=CASES)
def test_finds(function, convs, wanted):
    model = Model(function, **convs).eval()
    graph_module = tfmq_fx.capture(model, (torch.randn(2, CHANNELS, 6, 6), torch.tensor([1.0])), dynamic_batch=False)
    assert [layer_name(node) for node in find_shortcuts(graph_module.graph)] == wanted
    roles = find_roles(graph_module)
    assert [layer_name(node) for node, names in roles.items() if "shortcut" in names] == wanted


def shortcuts(graph_module):
    return sorted(layer_name(node) for node in find_shortcuts(graph_module.graph))


def test_it_holds_in_every_stage_of_a_model():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    found = shortcuts(captured)
    prepared = tfmq_fx.prepare(captured, None, timesteps=TIMESTEPS)
    assert found and sorted(set(shortcuts(prepared))) == found
    tfmq_fx.calibrate(prepared, [batch(seed=seed) for seed in range(3)], progress=False)
    assert sorted(set(shortcuts(prepared))) == found
    assert len(find_shortcuts(tfmq_fx.convert(prepared).graph_module.graph)) >= len(found)
