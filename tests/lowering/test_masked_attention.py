"""Attention whose mask hides all keys from some queries: 0, as torch has it, on every backend."""

import pytest
import torch

import tfmq_fx
from tests.lowering.test_engines import INSTALLED
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative

BACKENDS = ["reference", "inductor", *INSTALLED]


class MaskedDenoiser(SmallDenoiser):
    """Its attention takes an additive mask, and one made of truth values."""

    def forward(self, sample, timestep, keep, mask):
        emb = self.time(timestep)
        h = self.down(self.enter(sample), emb)
        n, c, height, width = h.shape
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        computed = torch.where(keep > 0, 0.0, -torch.inf)[:, None, None, :]
        for each in (computed, mask):
            a = torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=each)
            h = h + 3 * a[:, 0].transpose(1, 2).reshape(n, c, height, width)
        return self.leave(self.up(torch.cat([h, h], 1), emb))


def inputs(seed=1):
    """A batch of four: one whose keys are all hidden, one with half of them, one with some, one with blind queries."""
    x, t = batch(4, seed)
    keep, mask = torch.ones(4, 64), torch.zeros(4, 1, 64, 64)
    keep[0] = keep[1, 32:] = 0
    mask[2, :, :, :40], mask[2, :, :, 50:] = -4.0, -torch.inf
    mask[3, :, 5:50] = -torch.inf
    return x, t, keep, mask


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = MaskedDenoiser().eval()
    graph = tfmq_fx.prepare(tfmq_fx.capture(model, inputs()), timesteps=TIMESTEPS)
    for seed in range(3):
        graph(*inputs(seed))
    program = tfmq_fx.convert(graph)
    given = inputs(seed=2)
    with torch.no_grad():
        return program, given, model(*given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_queries_give_zero(backend, case):
    program, given, wanted = case
    assert bool(wanted.isfinite().all())
    denoiser = tfmq_fx.lower(program, backend)
    for item in range(4):
        assert relative(denoiser(*given)[item], wanted[item]) < 0.03


def test_a_saved_artefact_keeps_them(case, tmp_path):
    program, given, _ = case
    tfmq_fx.save(program, tmp_path / "masked")
    assert torch.equal(tfmq_fx.load(tmp_path / "masked")(*given), program(*given))
