"""What new nodes carry."""

import torch

from tfmq_fx.passes import FlattenFrameConvs, SplitConcatenatedConvs
from tfmq_fx.testing import GraphBuilder

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
    assert SplitConcatenatedConvs()(graph_module).modified
    assert FlattenFrameConvs()(graph_module).modified
    sources = [
        node.meta["source_fn_stack"][-1][0] for node in graph_module.graph.nodes if "source_fn_stack" in node.meta
    ]
    assert len(sources) == len(set(sources))
