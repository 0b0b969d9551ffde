"""The algebra of timesteps (P10): what the rows of a table are must not depend on how they are arranged."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.properties.naive_reference import IndexedFakeQuantize, NaiveReference, fake_quantize
from tfmq_fx.errors import TimestepError
from tfmq_fx.passes import IndexTimesteps, ObserveTemporalBlock, TabulateTemporalBlock
from tfmq_fx.testing import temporal_graphs

UNSEEN = 123


@st.composite
def tables(draw, *, coarse=False):
    """Distinct timesteps with one scale and zero point each, and which of them a batch asks for, with repeats."""
    values = draw(st.lists(st.integers(0, 999).filter(lambda t: t != UNSEEN), min_size=1, max_size=8, unique=True))
    low = 0.05 if coarse else 1e-4
    exponents = st.floats(torch.tensor(low).log().item(), torch.tensor(10.0).log().item())
    scales = [draw(exponents) for _ in values]
    zero_points = [draw(st.integers(0, 255)) for _ in values]
    asked = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return values, torch.tensor(scales).exp(), torch.tensor(zero_points), asked


def quantized(model, values, scales, zero_points, *, unknown="error"):
    """The model with the inputs of its temporal linears quantized by table row."""
    graph_module, name = copy.deepcopy(model.graph_module), model.path.timestep_name
    IndexTimesteps(values, timestep=name, unknown=unknown)(graph_module)
    make = lambda linear: IndexedFakeQuantize(scales, zero_points)  # noqa: E731
    ObserveTemporalBlock(make, timestep=name)(graph_module)
    return graph_module


def tabulated(model, values, *, unknown="error"):
    graph_module, name = copy.deepcopy(model.graph_module), model.path.timestep_name
    IndexTimesteps(values, timestep=name, unknown=unknown)(graph_module)
    TabulateTemporalBlock(timestep=name)(graph_module)
    return graph_module


def run(graph_module, inputs):
    with torch.no_grad():
        outputs = graph_module(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@given(temporal_graphs(), tables())
def test_the_quantized_graph_is_the_naive_reference(model, table):
    values, scales, zero_points, asked = table
    inputs = model.example_inputs(asked)
    timesteps = inputs[names(model).index(model.path.timestep_name)].reshape(-1).tolist()
    if model.path.scalar_timestep:
        timesteps = timesteps * model.path.batch
    parameters = {t: (s, z) for t, s, z in zip(values, scales, zero_points, strict=True)}
    linears = [*model.expected.time_embedding, *model.expected.embedding_layers]
    naive = NaiveReference(copy.deepcopy(model.graph_module), linears, parameters, timesteps)
    with torch.no_grad():
        wanted = naive.run(*inputs)
    got = run(quantized(model, values, scales, zero_points), inputs)
    assert_equal(got, wanted if isinstance(wanted, tuple) else (wanted,))


def names(model):
    return [str(node.target) for node in model.graph_module.graph.nodes if node.op == "placeholder"]


class StaticFakeQuantize(nn.Module):
    """One scale and zero point, whatever the row."""

    def __init__(self, scale, zero_point):
        super().__init__()
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x, rows):
        return fake_quantize(x, self.scale, self.zero_point)


@given(temporal_graphs(), tables())
def test_equal_rows_are_static_quantization(model, table):
    values, scales, zero_points, asked = table
    inputs = model.example_inputs(asked)
    equal = quantized(model, values, scales[:1].expand(len(values)), zero_points[:1].expand(len(values)))
    static = copy.deepcopy(model.graph_module)
    IndexTimesteps(values, timestep=model.path.timestep_name)(static)
    make = lambda linear: StaticFakeQuantize(scales[0], zero_points[0])  # noqa: E731
    ObserveTemporalBlock(make, timestep=model.path.timestep_name)(static)
    assert_equal(run(equal, inputs), run(static, inputs))


@given(temporal_graphs(), tables(), st.randoms(use_true_random=False))
def test_permuting_rows_and_timesteps_together_changes_nothing(model, table, shuffle):
    values, scales, zero_points, asked = table
    order = list(range(len(values)))
    shuffle.shuffle(order)
    moved = [values[index] for index in order]
    inputs = model.example_inputs(asked)
    one = quantized(model, values, scales, zero_points)
    other = quantized(model, moved, scales[order], zero_points[order])
    assert_equal(run(one, inputs), run(other, inputs))
    assert_close(run(tabulated(model, values), inputs), run(tabulated(model, moved), inputs))


@given(temporal_graphs(), tables(), st.data())
def test_unused_rows_change_nothing(model, table, data):
    values, scales, zero_points, asked = table
    used = [index for index, value in enumerate(values) if value in asked]
    kept = [index for index in range(len(values)) if index in used or data.draw(st.booleans())]
    fewer = [values[index] for index in kept]
    inputs = model.example_inputs(asked)
    one = quantized(model, values, scales, zero_points)
    other = quantized(model, fewer, scales[kept], zero_points[kept])
    assert_equal(run(one, inputs), run(other, inputs))
    assert_close(run(tabulated(model, values), inputs), run(tabulated(model, fewer), inputs))


@given(temporal_graphs(scalar_timestep=False), tables(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_output(model, table, shuffle):
    values, _, _, asked = table
    graph_module = tabulated(model, values)
    order = list(range(model.path.batch))
    shuffle.shuffle(order)
    inputs = model.example_inputs(asked)
    moved = run(graph_module, [tensor[order] for tensor in inputs])
    assert_close(moved, [output[order] for output in run(graph_module, inputs)])


@given(temporal_graphs(), tables(coarse=True))
def test_a_table_of_the_quantized_block_is_the_quantized_block(model, table):
    values, scales, zero_points, asked = table
    inputs = model.example_inputs(asked)
    graph_module = quantized(model, values, scales, zero_points)
    wanted = run(graph_module, inputs)
    TabulateTemporalBlock(timestep=model.path.timestep_name)(graph_module)
    assert not any(node.op == "call_module" for node in graph_module.graph.nodes)
    assert_close(run(graph_module, inputs), wanted)


@given(temporal_graphs(), tables())
def test_an_unknown_timestep_is_named(model, table):
    values, scales, zero_points, asked = table
    inputs = model.example_inputs([UNSEEN, *asked])
    for graph_module in (quantized(model, values, scales, zero_points), tabulated(model, values)):
        with pytest.raises(TimestepError, match=f"timestep {UNSEEN} is not in the table of {len(values)} timesteps"):
            run(graph_module, inputs)


@given(temporal_graphs(), tables())
def test_nearest_is_the_closest_row(model, table):
    values, *_, asked = table
    closest = min(abs(value - UNSEEN) for value in values)
    # Of two equally close rows either will do, so such tables show nothing.
    near = [value for value in values if abs(value - UNSEEN) == closest]
    if len(near) > 1:
        return
    graph_module = tabulated(model, values, unknown="nearest")
    unseen, seen = model.example_inputs([UNSEEN, *asked]), model.example_inputs([near[0], *asked])
    assert_equal(run(graph_module, unseen), run(graph_module, seen))


@given(temporal_graphs(), st.lists(st.integers(0, 999), min_size=1, max_size=40))
def test_the_table_holds_every_timestep_of_the_schedule(model, values):
    graph_module = tabulated(model, values)
    for value in values:
        inputs = model.example_inputs([value])
        assert_close(run(graph_module, inputs), run(model.graph_module, inputs))


@given(temporal_graphs(conditional=True), tables(), st.permutations([0, 1, 2]))
def test_a_table_over_timesteps_and_classes_is_the_block(model, table, classes):
    values, _, _, asked = table
    graph_module, name = copy.deepcopy(model.graph_module), model.path.timestep_name
    IndexTimesteps(values, timestep=name, finite={"class_labels": classes})(graph_module)
    TabulateTemporalBlock(timestep=name)(graph_module)
    inputs = model.example_inputs(asked)
    assert_close(run(model.graph_module, inputs), run(graph_module, inputs))
    # Nothing of the block is left, whatever else reads the labels.
    left = {node.name for node in graph_module.graph.nodes}
    assert not left & {*model.expected_finite.time_embedding, *model.expected_finite.embedding_layers}
