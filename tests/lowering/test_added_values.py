"""No backend writes to what is not its own: a caller's tensors, kept features, constants that are added."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.lowering.test_engines import INSTALLED
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative

BACKENDS = ["reference", "inductor", "aot", *INSTALLED]


class AddsInputs(SmallDenoiser):
    """Layers whose results meet an input of their own shape, and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.image, self.vector = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
        self.pooled, self.position = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(2, 64, 8))

    def forward(self, sample, timestep, tokens, image, vector, pooled):
        emb = self.time(timestep)
        skip = self.enter(sample)
        h = self.down(skip, emb)
        n, c, height, width = h.shape
        sequence = self.tokens(h.flatten(2).transpose(1, 2)) + tokens
        if isinstance(n, int):  # captured with a fixed batch
            sequence = self.tokens(sequence) + self.position
        means = h.mean((2, 3))
        local = self.pooled(means[:, :, None, None]) + pooled
        h = sequence.transpose(1, 2).reshape(n, c, height, width) + (self.image(h) + image)
        h = h + (self.vector(means) + vector)[:, :, None, None] + local
        return self.leave(self.up(torch.cat([h, skip], 1), emb))


def inputs(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sample, timestep = batch(size, seed=seed)
    shapes = ((64, 8), (8, 8, 8), (8,), (8, 1, 1))
    return sample, timestep, *(torch.randn(size, *shape, generator=generator) for shape in shapes)


@pytest.fixture(scope="module", params=[True, False], ids=["dynamic", "fixed"])
def program(request):
    torch.manual_seed(0)
    captured = tfmq_fx.capture(AddsInputs().eval(), inputs(2), dynamic_batch=request.param)
    # One range: where oneDNN's kernels run, a fixed batch cannot be split by timestep groups.
    prepared = tfmq_fx.prepare(captured, tfmq_fx.QuantizationConfig(activation_groups=1), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [inputs(2, seed) for seed in range(4)], progress=False)
    return tfmq_fx.convert(prepared)


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_leave_inputs_and_constants_as_they_were(backend, program, tmp_path):
    path = {"path": tmp_path / "denoiser.pt2"} if backend == "aot" else {}
    denoiser = tfmq_fx.lower(program, backend, **path)
    for size in (2,) if program.interface.fixed_batch else (1, 2, 3):
        given = inputs(size, seed=9)
        before = [value.clone() for value in given]
        first, second = denoiser(*given), denoiser(*given)
        assert all(torch.equal(value, copy) for value, copy in zip(given, before, strict=True))
        assert torch.equal(first, second) and relative(first, program(*before)) < 0.02
