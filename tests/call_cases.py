"""A denoiser with every kind of argument, and what its lowered forms are called with."""

import functools

import torch
from torch import Tensor, nn

import tfmq_fx
from tests.models import TIMESTEPS, Block, TimePath, batch
from tfmq_fx.lowering.backends.registry import available_backends

ENGINES = tuple(name for name in ("openvino", "onnxruntime") if name in available_backends())
BACKENDS = ("reference", "inductor", "aot", *ENGINES)


class ManyArguments(nn.Module):
    """Tensors, a dictionary, an optional residual, a flag, a fixed table whose rows are no items of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimePath()
        self.pool, self.tokens = nn.Linear(6, 16), nn.Linear(12, 16)
        self.enter, self.leave = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.block = Block(16, 16)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        prompt: dict[str, Tensor],
        table: Tensor | None = None,
        residual: Tensor | None = None,
        flag: bool = False,
        scale: float = 1.0,
    ) -> Tensor:
        pooled = prompt["pooled"] if table is None else prompt["pooled"] + table.mean(0)
        emb = self.time(timestep) + self.pool(pooled) + self.tokens(prompt["tokens"].mean(1))
        result = self.leave(self.block(self.enter(sample), emb))
        if residual is not None:
            result = result + residual
        return (-result if flag else result) * scale


def many_arguments() -> ManyArguments:
    torch.manual_seed(0)
    return ManyArguments().eval()


def arguments(size: int = 4, seed: int = 1) -> dict[str, object]:
    """Captured by name: the residual was None, the flag False, the table ``[4, 6]`` whatever the batch."""
    generator = torch.Generator().manual_seed(seed)
    sample, timestep = batch(size, seed)
    prompt = {
        "tokens": torch.randn(size, 5, 12, generator=generator),
        "pooled": torch.randn(size, 6, generator=generator),
    }
    table = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return {"sample": sample, "timestep": timestep, "prompt": prompt, "table": table, "residual": None, "flag": False}


@functools.cache
def many_program() -> tfmq_fx.QuantizedProgram:
    batches = [arguments(4, seed) for seed in range(3)]
    captured = tfmq_fx.capture(many_arguments(), example_kwargs=batches[0], batched=("sample", "timestep", "prompt"))
    prepared = tfmq_fx.prepare(captured, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, batches, progress=False)
    return tfmq_fx.convert(prepared)
