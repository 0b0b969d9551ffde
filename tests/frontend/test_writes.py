"""Whatever a model writes in place, its program computes the same, or a sentence says why there is none."""

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import tfmq_fx
from tests.models import TIMESTEPS, TimePath, batch, relative
from tfmq_fx.passes.support.predicates import writes_in_place

FLOAT = tfmq_fx.QuantizationConfig(weight_bits=32, activation_bits=32)


def written_chunk(h):
    first, second = h.chunk(2, 1)
    first.addcmul_(second, second)
    return h


def dropped(h, change):
    other = dropout(h, 0.1, training=False)
    change(other)
    return h


def read_after_dropout(h):
    other = dropout(h, 0.1, training=False)
    h[:, 0] = 1.0
    return h + other


def local_constant(h):
    constant = torch.tensor([0.5, 2.0, 1.0])
    constant[2] = 9.0
    return h * constant.sum()


def then(change):
    """A write into a part, and one through a view of another kind behind it."""

    def written(h):
        h[:, 0] = 1.0
        change(h)
        return h

    return written


def alone(change):
    def written(h):
        change(h)
        return h

    return written


CHANGES = {
    "view": lambda h: h.view(-1).clamp_(-0.3, 0.3),
    "flatten": lambda h: h.flatten(1).mul_(2),
    "mT": lambda h: h.mT.mul_(2),
    "permute": lambda h: h.permute(0, 2, 3, 1)[..., 1].add_(1),
    "unsqueeze": lambda h: h.unsqueeze(1)[:, 0, 3].fill_(4.0),
    "chunk": written_chunk,
    "diagonal": lambda h: h.diagonal(dim1=-2, dim2=-1).zero_(),
}
CASES = {
    **{f"{name}, alone": alone(change) for name, change in CHANGES.items()},
    **{f"{name}, behind a part": then(change) for name, change in CHANGES.items()},
    "dropout": lambda h: dropped(h, lambda other: other.mul_(3)),
    "a part of a dropout": lambda h: dropped(h, lambda other: other[:, 0].fill_(1.0)),
    "what a dropout shares": read_after_dropout,
    "a local constant": local_constant,
}


class Writing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.time, self.change = TimePath(), change
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.embed = nn.Linear(16, 8)

    def forward(self, sample, timestep):
        h = self.enter(sample) + self.embed(self.time(timestep))[:, :, None, None]
        return self.leave(self.change(h))


@pytest.mark.parametrize("name", CASES)
def test_a_write_is_never_lost(name):
    torch.manual_seed(0)
    model = Writing(CASES[name]).eval()
    batches = [batch(4, seed) for seed in range(2)]
    program = tfmq_fx.quantize(model, FLOAT, batches, timesteps=TIMESTEPS, progress=False)
    assert not any(map(writes_in_place, program.graph_module.graph.nodes))
    denoiser = tfmq_fx.lower(program, "reference")
    for size in (1, 3):
        given = batch(size, seed=9)
        with torch.no_grad():
            wanted = model(*given)
        assert relative(program(*given), wanted) < 1e-5 and relative(denoiser(*given), wanted) < 1e-5


def test_a_program_without_hard_writes_is_not_traced_again():
    model = Writing(lambda h: nn.functional.silu(h, inplace=True)).eval()
    captured = tfmq_fx.capture(model, batch(2))
    names = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    assert "aten.silu.default" in names and "aten.view.default" not in names


def test_a_write_into_an_input_beside_others_is_a_sentence():
    class Both(Writing):
        def forward(self, sample, timestep):
            sample.mul_(2.0)
            return super().forward(sample, timestep)

    model = Both(CASES["view, alone"]).eval()
    with pytest.raises(tfmq_fx.CaptureError, match="writes into its input 'sample'"):
        tfmq_fx.capture(model, batch(2))
