"""Timestep groups on generated models: what a group's table is must not depend on the batch that it serves."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.temporal.test_use_one_timestep_group import CONVS, VALUES, batch
from tests.passes.temporal.test_use_one_timestep_group import quantized as quantized_convs
from tests.properties.naive_reference import IndexedFakeQuantize, NaiveReference, fake_quantize
from tests.properties.test_timestep_algebra import assert_equal, names, run
from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.passes import (
    FactorItemScales,
    GroupTimesteps,
    IndexTimesteps,
    LowerIndexedConvs,
    ObserveTimestepGroups,
    UseOneTimestepGroup,
)
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.temporal.group_timesteps import group_numbers
from tfmq_fx.testing import assert_pass_contract, temporal_graphs

aten = torch.ops.aten


@st.composite
def grouped_tables(draw):
    """Distinct timesteps, a number of groups, parameters for each group, and the timesteps of a batch."""
    values = draw(st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True))
    count = draw(st.integers(1, 10))
    groups = min(count, len(values))
    scales = torch.tensor([draw(st.floats(0.02, 2.0)) for _ in range(groups)])
    zero_points = torch.tensor([draw(st.integers(0, 255)) for _ in range(groups)])
    asked = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return values, count, scales, zero_points, asked


def with_groups(model, values, count):
    graph_module, name = copy.deepcopy(model.graph_module), model.path.timestep_name
    IndexTimesteps(values, timestep=name)(graph_module)
    GroupTimesteps(count)(graph_module)
    return graph_module


def observe(model, make):
    """Observe the layers outside the temporal block."""
    return ObserveTimestepGroups(
        lambda layer, entries: make(), select=lambda layer, _: layer.name not in model.expected.nodes
    )


def quantized(model, values, count, make):
    graph_module = with_groups(model, values, count)
    assert observe(model, make)(graph_module).modified
    return graph_module


def observed_layers(graph_module):
    observers = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    return [user.name for node in observers for user in node.users]


@given(temporal_graphs(), grouped_tables())
def test_the_passes_keep_the_contract_and_the_temporal_block(model, table):
    values, count, *_, asked = table
    inputs = model.example_inputs(asked)
    more = [model.example_inputs(asked, batch=size) for size in (1, 5)] if model.path.dynamic_batch else []

    class PassThrough(torch.nn.Module):
        def forward(self, x, groups):
            assert groups.shape == x.shape[:1] and groups.dtype == torch.int64
            return x

    result = assert_pass_contract(
        lambda: observe(model, PassThrough), with_groups(model, values, count), inputs, exact=True, more_inputs=more,
        confined_to=lambda node: node.name not in model.expected.nodes,
    )  # fmt: skip
    layers = observed_layers(result.graph_module)
    convs = [node.name for node in model.graph_module.graph.nodes if node.target is aten.conv2d.default]
    assert set(convs) <= set(layers) and not set(layers) & model.expected.nodes
    block = find_temporal_block(result.graph_module, model.path.timestep_name)
    assert [node.name for node in block.features] == list(model.expected.features)
    assert {node.name for node in block.linears} == {*model.expected.time_embedding, *model.expected.embedding_layers}


@given(temporal_graphs(), grouped_tables())
def test_the_quantized_graph_is_the_naive_reference(model, table):
    values, count, scales, zero_points, asked = table
    inputs = model.example_inputs(asked)
    timesteps = inputs[names(model).index(model.path.timestep_name)].reshape(-1).tolist()
    if model.path.scalar_timestep:
        timesteps = timesteps * model.path.batch
    groups = group_numbers(torch.tensor(values), count)
    parameters = {t: (scales[g], zero_points[g]) for t, g in zip(values, groups, strict=True)}
    graph_module = quantized(model, values, count, lambda: IndexedFakeQuantize(scales, zero_points))
    naive = NaiveReference(copy.deepcopy(model.graph_module), observed_layers(graph_module), parameters, timesteps)
    with torch.no_grad():
        wanted = naive.run(*inputs)
    assert_equal(run(graph_module, inputs), wanted if isinstance(wanted, tuple) else (wanted,))


@given(temporal_graphs(), grouped_tables())
def test_one_group_is_one_range(model, table):
    values, _, scales, zero_points, asked = table
    inputs = model.example_inputs(asked)
    one = quantized(model, values, 1, lambda: IndexedFakeQuantize(scales[:1], zero_points[:1]))

    class Plain(torch.nn.Module):
        def forward(self, x, groups):
            return fake_quantize(x, scales[0], zero_points[0])

    assert_equal(run(one, inputs), run(quantized(model, values, 1, Plain), inputs))


@given(temporal_graphs(), grouped_tables(), st.data())
def test_as_many_groups_as_timesteps_is_one_range_each_whatever_the_order_of_the_table(model, table, data):
    values, _, _, _, asked = table
    scales = torch.tensor([data.draw(st.floats(0.02, 2.0)) for _ in values])
    zero_points = torch.tensor([data.draw(st.integers(0, 255)) for _ in values])
    inputs = model.example_inputs(asked)
    # Groups are numbered by noise, so the parameters lie in the order of the values; the table need not.
    one = quantized(model, values, len(values), lambda: IndexedFakeQuantize(scales, zero_points))
    moved = data.draw(st.permutations(values))
    other = quantized(model, moved, len(values) + 3, lambda: IndexedFakeQuantize(scales, zero_points))
    assert_equal(run(one, inputs), run(other, inputs))


@given(temporal_graphs(dynamic_batch=True, scalar_timestep=False), grouped_tables())
def test_a_mixed_batch_is_its_items_apart(model, table):
    values, count, scales, zero_points, asked = table
    graph_module = quantized(model, values, count, lambda: IndexedFakeQuantize(scales, zero_points))
    seen = {}

    def hook(name):
        return lambda module, args, output: seen.setdefault(name, []).append((args[0], output))

    for name, module in graph_module.named_children():
        if isinstance(module, IndexedFakeQuantize):
            module.register_forward_hook(hook(name))
    inputs = model.example_inputs(asked, batch=3)
    run(graph_module, inputs)
    groups = group_numbers(torch.tensor(values), count)
    timesteps = inputs[names(model).index(model.path.timestep_name)].tolist()
    for ((x, output),) in seen.values():
        # Item by item on the same values: a float sum of another order may land on another level.
        for item, quantized_item, timestep in zip(x, output, timesteps, strict=True):
            group = groups[values.index(timestep)]
            assert torch.equal(quantized_item, fake_quantize(item, scales[group], zero_points[group]))


@given(st.booleans(), st.sampled_from([4, 8]), st.sampled_from(list(CONVS)), st.integers(1, 3), st.data())
def test_a_batch_of_one_group_is_quantized_as_before_and_lowered_to_kernels(dynamic, bits, kind, readers, data):
    graph_module = quantized_convs(dynamic, bits, kind, readers)
    steps, sizes = st.sampled_from(VALUES), st.integers(1, 5) if dynamic else st.just(2)
    scale = data.draw(st.floats(0.1, 30.0))
    first, *more = (batch(size, data.draw(steps), scale) for size in (2, data.draw(sizes)))
    result = assert_pass_contract(UseOneTimestepGroup, graph_module, first, exact=True, more_inputs=more)
    assert result.modified
    # The kernel's own order of float operations: a sum of up to 36 products, scaled once. Without VNNI it saturates.
    options = {"rtol": 1e-4, "atol": 1e-4, "more_inputs": more}
    assert (
        not sums_bytes_exactly()
        or assert_pass_contract(LowerIndexedConvs, result.graph_module, first, **options).modified
    )


@given(
    st.booleans(), st.sampled_from([4, 8]), st.sampled_from(list(CONVS)), st.integers(1, 3),
    st.lists(st.sampled_from(VALUES), min_size=5, max_size=5), st.floats(0.1, 30.0), st.integers(1, 5),
)  # fmt: skip
def test_scales_factored_out_of_layers_serve_mixed_timesteps(dynamic, bits, kind, readers, timesteps, scale, size):
    def mixed(items):
        return batch(items, 0, scale)[0], torch.tensor(timesteps[:items])

    options = {"more_inputs": [mixed(size), mixed(1)]} if dynamic else {}
    result = assert_pass_contract(FactorItemScales, quantized_convs(dynamic, bits, kind, readers), mixed(2), **options)
    assert result.modified
