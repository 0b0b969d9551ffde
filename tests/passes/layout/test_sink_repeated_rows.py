import pytest
import torch
from torch import Tensor, nn

import tfmq_fx
from tests.models import Block, TimePath, relative
from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import SinkRepeatedRows
from tfmq_fx.passes.support.predicates import repeats_rows
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def repeated(builder, emb, times, how):
    """``emb`` with its rows repeated: each one in a row, or all of them one after the other."""
    if how == "tile":
        return builder.call(aten.repeat.default, emb, [times, 1])
    return builder.call(aten.repeat_interleave.self_int, emb, times, 0, output_size=times * builder.batch)


def video_time_path(*, how="interleave", between=None, dynamic=False, layers=2):
    """h(t), repeated once a frame, and behind it SiLU and linear for each of the layers."""
    builder = GraphBuilder(batch=2, dynamic_batch=dynamic)
    sample = builder.placeholder("sample", (3 * builder.batch, 4))
    timestep = builder.placeholder("timestep", (builder.batch,))
    column = builder.call(aten.unsqueeze.default, timestep, 1)
    with builder.inside("h"):
        waves = builder.call(aten.sin.default, builder.call(aten.mul.Tensor, column, builder.weight("f", (1, 8))))
        emb = builder.call(aten.linear.default, waves, builder.weight("h.weight", (8, 8)))
    with builder.inside("frames"):
        emb = repeated(builder, emb, 3, how) if not dynamic else builder.call(aten.repeat.default, emb, [3, 1])
    total = sample
    for index in range(layers):
        with builder.inside(f"g{index}"):
            value = builder.call(aten.silu.default, emb)
            value = between(builder, value) if between else value
            value = builder.call(aten.linear.default, value, builder.weight(f"g{index}.weight", (4, 8)))
            total = builder.call(aten.mul.Tensor, total, value)
    return builder.build(total)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3 * batch, 4, generator=generator), torch.randn(batch, generator=generator)


@pytest.mark.parametrize("how", ["interleave", "tile"])
def test_fires(how):
    graph_module = video_time_path(how=how)
    assert SinkRepeatedRows()(graph_module).modified
    linears = calls(graph_module, aten.linear.default)
    assert [node.meta["val"].shape[0] for node in linears] == [2, 2, 2]
    # One repetition a layer now, each behind the linear and read outside the block.
    repetitions = [node for node in graph_module.graph.nodes if repeats_rows(node)]
    assert [node.args[0] for node in repetitions] == linears[1:]
    block = tfmq_fx.find_temporal_block(graph_module)
    assert block.features == tuple(linears[1:]) and not set(repetitions) & set(block.nodes)
    assert [list(node.meta["nn_module_stack"])[-1] for node in linears] == ["h", "g0", "g1"]


def test_the_block_is_found_before_and_after():
    graph_module = video_time_path()
    before = tfmq_fx.find_temporal_block(graph_module)
    SinkRepeatedRows()(graph_module)
    after = tfmq_fx.find_temporal_block(graph_module)
    for block in (before, after):
        assert [layer.fqn for layer in block.embedding_layers] == ["g0", "g1"] and len(block.time_embedding) == 1


def test_does_not_pass_what_mixes_rows():
    def mean_over_rows(builder, value):
        return builder.call(aten.sub.Tensor, value, builder.call(aten.mean.dim, value, [0], True))

    graph_module = video_time_path(between=mean_over_rows)
    assert SinkRepeatedRows()(graph_module).modified  # behind the SiLUs, no further
    assert [node.meta["val"].shape[0] for node in calls(graph_module, aten.linear.default)] == [2, 6, 6]
    assert unchanged(SinkRepeatedRows(), graph_module)


def test_does_not_fire_outside_the_block_or_on_columns():
    builder = GraphBuilder()
    sample, timestep = builder.placeholder("sample", (2, 4)), builder.placeholder("timestep", (2, 4))
    image = builder.call(aten.repeat_interleave.self_int, sample, 2, 0)
    image = builder.call(aten.linear.default, image, builder.weight("image", (8, 4)))
    columns = builder.call(aten.repeat.default, timestep, [1, 2])
    feature = builder.call(aten.linear.default, columns, builder.weight("g", (8, 8)))
    total = builder.call(aten.add.Tensor, image, builder.call(aten.repeat.default, feature, [2, 1]))
    assert unchanged(SinkRepeatedRows(), builder.build(total))


def test_does_not_pass_a_linear_that_reads_the_repeated_axis():
    builder = GraphBuilder()
    sample, timestep = builder.placeholder("sample", (5,)), builder.placeholder("timestep", (2,))
    vector = builder.call(aten.repeat_interleave.self_int, timestep, 3, 0)
    feature = builder.call(aten.linear.default, vector, builder.weight("g", (5, 6)))
    assert unchanged(SinkRepeatedRows(), builder.build(builder.call(aten.add.Tensor, sample, feature)))


@pytest.mark.parametrize("how", ["interleave", "tile"])
def test_numerics(how):
    assert_pass_contract(SinkRepeatedRows, video_time_path(how=how), inputs())


def test_numerics_of_a_symbolic_batch():
    assert_pass_contract(SinkRepeatedRows, video_time_path(dynamic=True), inputs(), more_inputs=[inputs(1), inputs(4)])


def test_several_users_that_stay():
    builder = GraphBuilder()
    sample, timestep = builder.placeholder("sample", (6, 4)), builder.placeholder("timestep", (2, 4))
    emb = repeated(builder, builder.call(aten.sin.default, timestep), 3, "interleave")
    feature = builder.call(aten.linear.default, emb, builder.weight("g", (4, 4)))
    total = builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, sample, emb), feature)
    example = torch.randn(6, 4), torch.randn(2, 4)
    result = assert_pass_contract(SinkRepeatedRows, builder.build(total), example)
    assert operators(result.graph_module)[aten.repeat_interleave.self_int] == 2


class Video(nn.Module):
    """A denoiser of three frames, batch and frames in one axis inside."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.one, self.two = TimePath(), Block(4, 8), Block(8, 4)
        self.enter, self.leave = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """``sample`` ``[N, 2, 3, H, W]``, ``timestep`` ``[N]``."""
        count, channels, frames, height, width = sample.shape
        emb = self.time(timestep).repeat_interleave(frames, dim=0)
        h = sample.transpose(1, 2).reshape(count * frames, channels, height, width)
        h = self.leave(self.two(self.one(self.enter(h), emb), emb))
        return h.reshape(count, frames, channels, height, width).transpose(1, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_video_model_gets_a_table_of_its_timesteps(dynamic):
    torch.manual_seed(0)
    model = Video().eval()
    sample, timestep = torch.randn(2, 2, 3, 8, 8), torch.tensor([900, 100])
    captured = tfmq_fx.capture(model, (sample, timestep), dynamic_batch=dynamic)
    prepared = tfmq_fx.prepare(captured, timesteps=range(0, 1000, 100))
    tfmq_fx.calibrate(prepared, [(sample, timestep)], progress=False)
    denoiser = tfmq_fx.lower(tfmq_fx.convert(prepared), "reference")
    assert denoiser.report.temporal_layers == 0 and denoiser.report.table_rows == 10
    # Another mixture of timesteps than that of the calibration: every frame reads the row of its own video.
    for times in ([900, 100], [100, 500]):
        with torch.no_grad():
            wanted = model(sample, torch.tensor(times))
        assert relative(denoiser(sample, torch.tensor(times)), wanted) < 0.05
