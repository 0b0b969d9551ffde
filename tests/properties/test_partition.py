"""Units cover a graph without overlap, can run one by one, and go back to where they were."""

import copy

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tfmq_fx.passes import JoinUnits, PartitionUnits
from tfmq_fx.passes.analysis import find_units
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.testing import aten_graphs, temporal_graphs
from tfmq_fx.testing.canonical import state_digests
from tfmq_fx.testing.run_checks import bytes_of, run_graph

OPTIONS = st.fixed_dictionaries({"granularity": st.sampled_from(["block", "layer"]), "temporal": st.booleans()})

#: With a unit for the layers of the timestep and the conditioning, or without.
CONDITIONED = st.fixed_dictionaries(
    {"granularity": st.sampled_from(["block", "layer"]), "temporal": st.booleans(), "conditions": st.booleans()}
)


def reached(start, step):
    """All nodes that ``step`` leads to from ``start``, one step at least."""
    found, queue = set(), list(start)
    while queue:
        for node in step(queue.pop()):
            if node not in found:
                found.add(node)
                queue.append(node)
    return found


def check_units(graph_module, timestep, options):
    units = find_units(graph_module, timestep, **options)
    nodes = list(graph_module.graph.nodes)
    weighted = [node for unit in units for node in unit.weighted]
    assert sorted(weighted, key=nodes.index) == [node for node in nodes if is_weighted(node)]
    assert len({node for unit in units for node in unit.nodes}) == sum(len(unit.nodes) for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    behind = set()
    for unit in units:
        inside = set(unit.nodes)
        assert unit.nodes == tuple(node for node in nodes if node in inside)
        assert unit.weighted == tuple(node for node in unit.nodes if is_weighted(node)) != ()
        after = reached(unit.nodes, lambda node: node.users)
        before = reached(unit.nodes, lambda node: node.all_input_nodes)
        assert not (after & before) - inside, f"{unit.name} is not convex"
        assert not after & behind, f"{unit.name} comes too late"
        behind |= inside
    return units


def check_round_trip(graph_module, timestep, options, calls):
    wanted = [bytes_of([run_graph(graph_module, inputs)]) for inputs in calls]
    names = sorted(node.name for node in graph_module.graph.nodes)
    state = state_digests(graph_module)
    working = copy.deepcopy(graph_module)
    partition = PartitionUnits(timestep, **options)
    fired = partition(working).modified
    assert not partition(working).modified
    assert fired == any(is_weighted(node) for node in graph_module.graph.nodes)
    assert not any(is_weighted(node) for node in working.graph.nodes)
    assert [bytes_of([run_graph(working, inputs)]) for inputs in calls] == wanted
    assert JoinUnits()(working).modified == fired
    assert [bytes_of([run_graph(working, inputs)]) for inputs in calls] == wanted
    assert sorted(node.name for node in working.graph.nodes) == names
    assert state_digests(working) == state


def without_modules(graph_module):
    bare = copy.deepcopy(graph_module)
    for node in bare.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return bare


def test_random_graphs():
    seen = []

    @settings(max_examples=max(60, settings.default.max_examples))
    @given(aten_graphs(favour=("linear", "conv", "binary")), OPTIONS, st.booleans())
    def check(generated, options, bare):
        graph_module = without_modules(generated.graph_module) if bare else generated.graph_module
        units = check_units(graph_module, generated.timestep, options)
        check_round_trip(graph_module, generated.timestep, options, [generated.example_inputs, *generated.more_inputs])
        event(f"kinds: {sorted({unit.kind for unit in units})}")
        seen.extend(unit.kind for unit in units)

    check()
    assert "residual" in seen and "layer" in seen


@pytest.mark.parametrize("bare", [False, True])
def test_diffusion_models(bare):
    seen = []

    @given(temporal_graphs(), CONDITIONED)
    def check(model, options):
        graph_module = without_modules(model.graph_module) if bare else model.graph_module
        timestep = model.path.timestep_name
        conditions = model.expected_part.conditions if options["conditions"] else ()
        options = {**options, "conditions": conditions}
        units = check_units(graph_module, timestep, options)
        assert (units[0].kind == "temporal") == options["temporal"]
        early = [unit for unit in units if unit.kind == "conditional"]
        assert bool(early) == bool(options["temporal"] and conditions)
        if options["temporal"]:
            assert {node.name for node in units[0].nodes} == set(model.expected.nodes)
        if early:
            assert early == [units[1]]
            assert {node.name for node in early[0].nodes} == model.expected_whole.nodes - model.expected.nodes
            seen.append("conditional")
        calls = [model.example_inputs((7, 999))]
        if model.path.dynamic_batch:
            calls += [model.example_inputs((7, 999, 3), batch=size) for size in (1, 5)]
        check_round_trip(graph_module, timestep, options, calls)

    check()
    assert seen


def concrete(value, batch):
    """A tensor or a size like the recorded one, with every symbol standing for ``batch``."""
    if isinstance(value, int):
        return value
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.subs(dict.fromkeys(value.node.expr.free_symbols, batch)))
    shape = [concrete(size, batch) for size in value.shape]
    return torch.rand(shape) if value.is_floating_point() else torch.zeros(shape, dtype=value.dtype)


@given(temporal_graphs(dynamic_batch=True), OPTIONS)
def test_units_run_alone_on_a_batch_of_any_size(model, options):
    graph_module = copy.deepcopy(model.graph_module)
    PartitionUnits(model.path.timestep_name, **options)(graph_module)
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        unit = graph_module.get_submodule(node.target)
        inputs = [n.meta["val"] for n in unit.graph.nodes if n.op == "placeholder"]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if any(isinstance(size, torch.SymInt) for value in tensors for size in value.shape):
            assert len(tensors) == len(inputs), "a size is an input though a tensor has it"
        outputs = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
        for batch in (1, 4):
            results = unit(*(concrete(value, batch) for value in inputs))
            results = results if isinstance(results, tuple) else (results,)
            for result, value in zip(results, outputs, strict=True):
                assert list(result.shape) == [concrete(size, batch) for size in value.shape]
