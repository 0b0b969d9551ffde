import pytest
import torch

from tests.models import relative
from tests.passes.helpers import operators, unchanged
from tfmq_fx import QuantizationConfig, calibrate, capture, convert, load, prepare, save
from tfmq_fx.passes import FillUninitialized
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def built(kind):
    """A graph whose result does not depend on what is uninitialized."""
    builder = GraphBuilder(dynamic_batch=kind != "empty")
    x = builder.placeholder("x", (builder.batch if builder.batch is not None else 3, 4))
    if kind == "empty":
        made = builder.call(aten.empty.memory_format, [3, 4], dtype=torch.float32)
    elif kind == "empty_like":
        made = builder.call(aten.empty_like.default, x, memory_format=torch.preserve_format)
    else:
        made = builder.call(aten.new_empty.default, x, [7, 4])
        made = builder.call(aten.slice_scatter.default, made, builder.call(aten.ones.default, [7, 4]), 0, 0, 7)
        return builder.build(builder.call(aten.cat.default, [x, made])), (torch.randn(3, 4),)
    once = builder.call(aten.slice_scatter.default, made, x, 0)
    twice = builder.call(aten.slice_scatter.default, made, builder.call(aten.sin.default, x), 0)
    return builder.build(builder.call(aten.add.Tensor, once, twice)), (torch.randn(3, 4),)


@pytest.mark.parametrize("kind", ["empty", "empty_like", "new_empty"])
def test_fires_and_several_read_it(kind):
    graph_module, inputs = built(kind)
    result = assert_pass_contract(FillUninitialized, graph_module, inputs, exact=True)
    assert result.modified
    assert not any("empty" in str(target) for target in operators(result.graph_module))


def test_does_not_fire_on_what_is_written_to_or_initialized():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    made = builder.call(aten.empty_like.default, x)
    builder.call(
        aten.copy_.default, builder.call(aten.view.default, made, [8]), builder.call(aten.view.default, x, [8])
    )
    assert unchanged(FillUninitialized(), builder.build(made))
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    assert unchanged(FillUninitialized(), builder.build(builder.call(aten.zeros_like.default, x)))


class WritesItsSample(torch.nn.Module):
    """A denoiser that puts its sample together in memory of its own."""

    def __init__(self):
        super().__init__()
        self.time = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16))
        self.before, self.after = torch.nn.Conv2d(2, 16, 3, padding=1), torch.nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample, timestep):
        frequencies = torch.exp(-torch.arange(4) / 4.0)
        angles = timestep[:, None].float() * frequencies
        put = torch.empty_like(sample)
        put[:, :, 0::2] = sample[:, :, 0::2] * 1.5
        put[:, :, 1::2] = sample[:, :, 1::2]
        emb = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.after(torch.nn.functional.silu(self.before(put) + emb[:, :, None, None]))


def test_a_model_that_writes_into_parts_of_its_own_memory_is_quantized_and_saved(tmp_path):
    torch.manual_seed(0)
    model = WritesItsSample().eval()
    batches = [(torch.randn(4, 2, 8, 8), torch.tensor([0, 5, 9, 9]))] * 2
    captured = capture(model, batches[0])
    assert not any("empty" in str(target) or "copy_" in str(target) for target in operators(captured))
    prepared = prepare(captured, QuantizationConfig(), timesteps=[0, 5, 9])
    calibrate(prepared, batches, progress=False)
    program = convert(prepared)
    save(program, tmp_path / "program")
    with torch.no_grad():
        data = batches[0]
        ours = program.graph_module(*data)
        assert relative(ours, model(*data)) < 0.05
        assert torch.equal(load(tmp_path / "program").graph_module(*data), ours)
