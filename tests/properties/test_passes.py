"""Passes outside of pipelines, and with options, keep the contract (P1 to P8) on generated graphs.

The passes of pipelines are held to it in ``test_pipelines.py``.
"""

import copy
import operator

import torch
from hypothesis import event, given, note
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

from tfmq_fx.passes import (
    CANONICALIZE,
    AddLowRankBranches,
    CompressTemporalTable,
    ComputeInFloat32,
    IndexTimesteps,
    InlineRegions,
    InlineTimestepRows,
    ObserveTemporalBlock,
    PropagateValues,
    RemoveGuards,
    RemoveNoopCasts,
    ScaleChannels,
    SetUnknownTimesteps,
    TabulateTemporalBlock,
    WidenTimesteps,
    run_pipeline,
)
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.layout.add_low_rank_branches import branched_weight
from tfmq_fx.passes.precision.compress_temporal_table import find_feature_tables
from tfmq_fx.passes.precision.compute_in_float32 import foreign_dtypes
from tfmq_fx.passes.quantized.scale_channels import channel_axis, scalable_weights
from tfmq_fx.passes.support.nodes import insert_call, insert_module_call
from tfmq_fx.passes.support.predicates import is_conv, is_linear, is_weighted
from tfmq_fx.quantization.low_rank import low_rank_factors
from tfmq_fx.testing import assert_pass_contract, aten_graphs, temporal_graphs

aten = torch.ops.aten
VALUES = [999, 500, 7, 3]


def in_region(generated):
    """The whole graph as the body of a region that records gradients."""
    body, root, graph = copy.deepcopy(generated.graph_module), nn.Module(), fx.Graph()
    leaves = pytree.tree_leaves(body.graph.output_node().args[0])
    body.graph.output_node().args = (tuple(leaves),)
    body.recompile()
    root.add_module("body", body)
    inputs = [graph.node_copy(node) for node in body.graph.nodes if node.op == "placeholder"]
    target = torch.ops.higher_order.wrap_with_set_grad_enabled
    region = graph.call_function(target, (True, graph.get_attr("body"), *inputs))
    region.meta["val"] = tuple(leaf.meta["val"] for leaf in leaves)
    results = [graph.call_function(operator.getitem, (region, index)) for index in range(len(leaves))]
    for node, leaf in zip(results, leaves, strict=True):
        node.meta["val"] = leaf.meta["val"]
    graph.output(tuple(results))
    return fx.GraphModule(root, graph).eval()


@given(aten_graphs())
def test_a_region_is_what_its_body_is(generated):
    graph_module, inputs = in_region(generated), generated.example_inputs
    result = assert_pass_contract(InlineRegions, graph_module, inputs, exact=True, more_inputs=generated.more_inputs)
    assert result.modified
    assert len(result.graph_module.graph.nodes) == len(generated.graph_module.graph.nodes)


@given(aten_graphs(favour=("cast", "linear", "conv")))
def test_what_computes_in_bfloat16_computes_in_float32_behind_its_interface(generated):
    graph_module = copy.deepcopy(generated.graph_module)
    halve(graph_module)
    foreign = foreign_dtypes(graph_module)
    interface = [node.meta["val"].dtype for node in at_the_interface(graph_module)]
    event(f"modified: {bool(foreign)}")
    assert ComputeInFloat32()(graph_module).modified == bool(foreign)
    assert [node.meta["val"].dtype for node in at_the_interface(graph_module)] == interface
    assert not foreign_dtypes(graph_module) and not ComputeInFloat32()(graph_module).modified
    with torch.no_grad():
        found = pytree.tree_leaves(graph_module(*generated.example_inputs))
    assert [leaf.dtype for leaf in found] == interface[-len(found) :]


def halve(graph_module):
    """Let every layer compute in bfloat16, weights included, and return to float32 behind it."""
    for node in list(graph_module.graph.nodes):
        if is_weighted(node) and node.meta["val"].dtype == torch.float32:
            with graph_module.graph.inserting_before(node):
                for source in node.all_input_nodes:
                    cast = insert_call(graph_module.graph, aten.to.dtype, (source, torch.bfloat16), anchor=node)
                    node.replace_input_with(source, cast)
            with graph_module.graph.inserting_after(node):
                readers = list(node.users)
                node.meta["val"] = node.meta["val"].to(torch.bfloat16)
                back = insert_call(graph_module.graph, aten.to.dtype, (node, torch.float32), anchor=node)
                for reader in readers:
                    reader.replace_input_with(node, back)
    graph_module.recompile()


def at_the_interface(graph_module):
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(graph_module.graph.output_node().args[0])
    return [*placeholders, *(leaf for leaf in leaves if isinstance(leaf, fx.Node))]


@given(aten_graphs(favour=("guard", "dropout", "noop_cast", "identity", "linear")))
def test_canonicalizing_in_order_leaves_nothing_to_do(generated):
    graph_module = copy.deepcopy(generated.graph_module)
    with torch.no_grad():
        wanted = copy.deepcopy(graph_module)(*generated.example_inputs)
    run_pipeline(graph_module, CANONICALIZE)
    note(str(graph_module.graph))
    for rewrite in CANONICALIZE:
        assert not rewrite()(graph_module).modified, rewrite.id
    with torch.no_grad():
        torch.testing.assert_close(graph_module(*generated.example_inputs), wanted, rtol=0, atol=0, equal_nan=True)


@given(aten_graphs(favour=("linear", "conv")), st.data())
def test_channels_of_observed_activations_are_scaled_to_the_bit(generated, data):
    graph_module, factors = copy.deepcopy(generated.graph_module), {}
    for number, layer in enumerate([node for node in graph_module.graph.nodes if is_conv(node) or is_linear(node)]):
        name = f"observer_{number}"
        graph_module.add_submodule(name, nn.Identity())
        with graph_module.graph.inserting_before(layer):
            observer = insert_module_call(graph_module.graph, name, (layer.args[0],), anchor=layer)
        layer.update_arg(0, observer)
        channels = layer.args[0].meta["val"].shape[channel_axis(layer)]
        exponents = data.draw(st.lists(st.integers(-4, 4), min_size=int(channels), max_size=int(channels)))
        factors[name] = torch.exp2(torch.tensor(exponents, dtype=torch.float32))
    graph_module.recompile()
    expected = any(scalable_weights(node) for node in graph_module.graph.find_nodes(op="call_module"))
    result = assert_pass_contract(
        lambda: ScaleChannels(factors), graph_module, generated.example_inputs, exact=True,
        more_inputs=generated.more_inputs,
    )  # fmt: skip
    event(f"modified: {result.modified}")
    assert result.modified == expected


@given(aten_graphs(favour=("linear", "conv")), st.integers(1, 3))
def test_branches_of_low_rank_take_a_part_of_a_weight_over(generated, rank):
    graph_module = copy.deepcopy(generated.graph_module)
    factors = {}
    for layer in graph_module.graph.nodes:
        if is_weighted(layer) and (weight := branched_weight(layer)) is not None:
            factors[str(weight.target)] = low_rank_factors(graph_module.get_parameter(str(weight.target)), rank)
    result = assert_pass_contract(
        lambda: AddLowRankBranches(factors, lambda layer: nn.Identity()), graph_module, generated.example_inputs,
        more_inputs=generated.more_inputs,
    )  # fmt: skip
    event(f"modified: {result.modified}")
    assert result.modified == bool(factors)


@given(aten_graphs())
def test_values_are_propagated_to_what_they_were(generated):
    graph_module = copy.deepcopy(generated.graph_module)
    for index, node in enumerate(graph_module.graph.nodes):
        if node.op != "placeholder" and index % 2:
            node.meta.pop("val", None)
    result = assert_pass_contract(PropagateValues, graph_module, generated.example_inputs, exact=True, may_set=["val"])
    for node, like in zip(result.graph_module.graph.nodes, generated.graph_module.graph.nodes, strict=True):
        # As text, because comparing symbolic sizes would ask them for a number.
        assert str(node.meta.get("val")) == str(like.meta.get("val"))


# -- the passes of the temporal block, on models with a known block ------------------------------------------------


class PassThrough(nn.Module):
    """An observer that checks what it is called with."""

    def forward(self, x, rows):
        assert rows.shape == x.shape[:1] and rows.dtype == torch.int64
        return x


def indexed(model):
    graph_module = copy.deepcopy(model.graph_module)
    IndexTimesteps(VALUES, timestep=model.path.timestep_name)(graph_module)
    return graph_module


def calls(model):
    """Two batches of the example size, and two of other sizes when the batch is symbolic."""
    more = [model.example_inputs((500, 3))]
    if model.path.dynamic_batch:
        more += [model.example_inputs((7, 999, 3), batch=size) for size in (1, 5)]
    return model.example_inputs((7, 999)), more


@given(temporal_graphs())
def test_index_timesteps(model):
    inputs, more = calls(model)
    result = assert_pass_contract(
        lambda: IndexTimesteps(VALUES, timestep=model.path.timestep_name),
        model.graph_module,
        inputs,
        exact=True,
        more_inputs=more,
        confined_to=lambda node: False,
    )
    assert result.modified


@given(temporal_graphs())
def test_observe_temporal_block(model):
    inputs, more = calls(model)
    linears = {*model.expected.time_embedding, *model.expected.embedding_layers}
    result = assert_pass_contract(
        lambda: ObserveTemporalBlock(lambda linear: PassThrough(), timestep=model.path.timestep_name),
        indexed(model),
        inputs,
        exact=True,
        more_inputs=more,
        confined_to=lambda node: node.name in linears,
    )
    observed = {node.name for node in result.graph_module.graph.nodes if node.args and _is_observer(node.args[0])}
    assert observed == linears


def _is_observer(node):
    return getattr(node, "op", "") == "call_module"


@given(temporal_graphs())
def test_tabulate_temporal_block(model):
    inputs, more = calls(model)
    name = model.path.timestep_name
    result = assert_pass_contract(
        lambda: TabulateTemporalBlock(timestep=name),
        indexed(model),
        inputs,
        rtol=1e-4,
        atol=1e-4,
        more_inputs=more,
        confined_to=lambda node: node.name in model.expected.nodes or node.op == "get_attr",
    )
    assert result.modified
    assert not find_temporal_block(result.graph_module, name).linears
    left = {node.name for node in result.graph_module.graph.nodes}
    assert not left & {*model.expected.time_embedding, *model.expected.embedding_layers}


@given(temporal_graphs())
def test_inline_timestep_rows(model):
    graph_module = indexed(model)
    TabulateTemporalBlock(timestep=model.path.timestep_name)(graph_module)
    inputs, more = calls(model)
    assert assert_pass_contract(InlineTimestepRows, graph_module, inputs, exact=True, more_inputs=more).modified


@given(temporal_graphs())
def test_set_unknown_timesteps(model):
    inputs, more = calls(model)
    result = assert_pass_contract(
        lambda: SetUnknownTimesteps("nearest", timestep=model.path.timestep_name),
        indexed(model),
        inputs,
        exact=True,
        more_inputs=more,
        confined_to=lambda node: "timestep_row" in node.name,
    )
    assert result.modified


@given(temporal_graphs())
def test_widen_timesteps(model):
    """Whole timesteps as floats: what the graph makes of them before and after."""
    name = model.path.timestep_name
    position = [str(node.target) for node in model.graph_module.graph.nodes if node.op == "placeholder"].index(name)

    def widened(inputs):
        return [value.float() if index == position else value for index, value in enumerate(inputs)]

    inputs, more = calls(model)
    graph_module = indexed(model)
    # Assertions about the dtype, and casts to the integer that it is, are readers of integers; capture removes them.
    run_pipeline(graph_module, (RemoveGuards, RemoveNoopCasts))
    result = assert_pass_contract(
        lambda: WidenTimesteps(timestep=name),
        graph_module,
        widened(inputs),
        exact=True,
        more_inputs=[widened(values) for values in more],
        may_set=["val"],
    )
    assert result.modified != model.path.float_timestep
    with torch.no_grad():
        for values in (inputs, *more):
            wanted, got = graph_module(*values), result.graph_module(*widened(values))
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class FeaturesRead(fx.Interpreter):
    """Runs a graph and keeps what the named nodes read first."""

    def __init__(self, graph_module, readers):
        super().__init__(graph_module)
        self.readers, self.found = readers, {}

    def run_node(self, n):
        if n.name in self.readers:
            self.found[n.name] = self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)


@given(temporal_graphs(), st.sampled_from(["int8", "float16"]))
def test_compress_temporal_table(model, storage):
    """What a compressed table gives back is the table within half a step, feature by feature."""
    graph_module = indexed(model)
    TabulateTemporalBlock(timestep=model.path.timestep_name)(graph_module)
    tables = [node for node in find_feature_tables(graph_module) if node.meta["val"].dtype == torch.float32]
    readers = {reader.name for table in tables for piece in table.users for reader in piece.users}
    before = copy.deepcopy(graph_module)
    assert CompressTemporalTable(storage)(graph_module).modified == bool(tables)
    graph_module.graph.lint()
    inputs, more = calls(model)
    for values in (inputs, *more):
        runs = [FeaturesRead(graph, readers) for graph in (graph_module, before)]
        with torch.no_grad():
            for run in runs:
                run.run(*values)
        for name in readers:
            ours, theirs = (run.found[name] for run in runs)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            step = (theirs.amax(1).clamp_min(0) - theirs.amin(1).clamp_max(0)) / 255
            allowed = 1.01 * step if storage == "int8" else theirs.abs().amax(1) * 2**-10
            assert bool(((ours - theirs).abs().amax(1) <= allowed + 1e-6).all())
