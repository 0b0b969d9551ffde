"""Timestep-indexed quantization in the plainest words: one item of the batch at a time, no table in the graph."""

import torch
from torch import fx, nn


def fake_quantize(x, scale, zero_point):
    """Round ``x`` to the 8-bit grid of ``scale`` and ``zero_point`` and back."""
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


class IndexedFakeQuantize(nn.Module):
    """What ObserveTemporalBlock can insert: each item is quantized with the parameters of its row."""

    def __init__(self, scales, zero_points):
        super().__init__()
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)

    def forward(self, x, rows):
        shape = (-1, *[1] * (x.ndim - 1))
        return fake_quantize(x, self.scales[rows].reshape(shape), self.zero_points[rows].reshape(shape))


class NaiveReference(fx.Interpreter):
    """Runs a float graph and quantizes the inputs of the given linears, looking parameters up by timestep value."""

    def __init__(self, graph_module, linears, parameters, timesteps):
        super().__init__(graph_module)
        self.linears = set(linears)
        #: {timestep value: (scale, zero point)}
        self.parameters = parameters
        self.timesteps = timesteps

    def run_node(self, n):
        if n.name not in self.linears:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, *rest = args
        steps = self.timesteps if len(self.timesteps) == len(x) else self.timesteps[:1]
        items = [fake_quantize(item, *self.parameters[t]) for item, t in zip(x, steps, strict=True)]
        return n.target(torch.stack(items), *rest, **kwargs)
