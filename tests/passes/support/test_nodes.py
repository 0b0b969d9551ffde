"""What new nodes carry."""

import torch

from tfmq_fx.passes import REWRITE_FOR_ANNOTATION
from tfmq_fx.testing import GraphBuilder, assert_pipeline_contract

aten = torch.ops.aten


def test_a_name_that_fx_gives_away_again_is_no_second_source():
    """The first pass replaces a conv and goes on under its name; the second one's new node gets that very name."""
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 1, 1, 1))
    joined = builder.call(aten.cat.default, [x, x], 1)
    with builder.inside("a"):
        image = builder.call(aten.conv2d.default, joined, builder.weight("a.weight", (2, 2, 1, 1)))
    video = builder.call(aten.unsqueeze.default, image, 2)
    with builder.inside("f"):
        weight = builder.weight("f.weight", (2, 2, 3, 1, 1))
        result = builder.call(aten.conv3d.default, video, weight, None, [1, 1, 1], [1, 0, 0], [1, 1, 1], 1)
    graph_module = builder.build(result)
    inputs = (torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0)),)
    assert_pipeline_contract(REWRITE_FOR_ANNOTATION, graph_module, inputs, rtol=1e-3, atol=1e-3)
