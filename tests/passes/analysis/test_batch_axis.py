"""The axis of the batch is followed, not guessed from sizes."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tfmq_fx import capture
from tfmq_fx.passes.analysis.batch_axis import batch_axes, size_ratio


class Shaped(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, sample):
        return self.shape(sample) * 2.0


def axis_of(shape, *sizes, dynamic=True):
    """The axis of the batch in what ``shape`` returns, the input being ``[N, *sizes]`` with N = 3."""
    example = (torch.randn(3, *sizes),)
    if dynamic:
        exported = torch.export.export(Shaped(shape), example, dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
        graph_module = exported.module(check_guards=False)
    else:
        graph_module = capture(Shaped(shape), example, dynamic_batch=False)
    batch = next(n for n in graph_module.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    result = graph_module.graph.output_node().all_input_nodes[0]
    return batch_axes(graph_module, batch).get(result)


KEPT = {
    "flattened": (lambda x: x.reshape(-1, 8), 0),
    "heads": (lambda x: x.reshape(x.shape[0], 6, 2, 4).transpose(1, 2).reshape(-1, 6, 4), 0),
    "sequence first": (lambda x: x.transpose(0, 1), 1),
    "there and back": (lambda x: x.permute(1, 0, 2).permute(1, 0, 2).flatten(0, 1), 0),
    "normalized": (lambda x: nn.functional.layer_norm(x, [8]).softmax(-1), 0),
    "one of several": (lambda x: x.chunk(2, -1)[1], 0),
    "product": (lambda x: torch.matmul(x, x.transpose(1, 2)), 0),
    "unsqueezed": (lambda x: x[None], 1),
    "concatenated": (lambda x: torch.cat([x, x], 1), 0),
    "looked up": (lambda x: nn.functional.embedding(x.long() % 5, torch.ones(5, 7)), 0),
    "repeated": (lambda x: x.repeat_interleave(2, 0), 0),
}
LOST = {
    "sequence first, flattened": lambda x: x.transpose(0, 1).reshape(-1, 8),
    "items reversed": lambda x: x.flip(0),
    "mixed with its reverse": lambda x: x + x.flip(0),
    "tiled": lambda x: x.repeat(2, 1, 1),
    "two copies": lambda x: torch.cat([x, x], 0),
    "mean over items": lambda x: x.mean(0),
    "rolled": lambda x: x.roll(1, 0),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_keeps_items_together(name, dynamic):
    shape, axis = KEPT[name]
    assert axis_of(shape, 6, 8, dynamic=dynamic) == axis


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_moves_or_copies_items_is_not_guessed(name, dynamic):
    assert axis_of(LOST[name], 6, 8, dynamic=dynamic) is None


def test_size_ratio_of_numbers():
    assert size_ratio(12, 4) == 3 and size_ratio(13, 4) is None and size_ratio(0, 4) is None
