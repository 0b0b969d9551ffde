"""The state that a prepared graph carries: typed, checked where a graph comes in, kept by tools that rebuild graphs."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig
from tfmq_fx.config.prepared_state import STATE_KEY, PreparedState


@functools.cache
def prepared():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    return tfmq_fx.prepare(captured, QuantizationConfig(weight_bits=4), timesteps=TIMESTEPS)


def rebuilt(graph_module):
    """The same nodes in a graph and a module of their own: the module's metadata is gone."""
    graph, copies = fx.Graph(), {}
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph_module, graph)


def test_preparing_attaches_what_was_decided():
    state = PreparedState.of(prepared())
    assert state.config == QuantizationConfig(weight_bits=4) and state.timestep == "timestep"
    assert state.timesteps == tuple(TIMESTEPS.double().tolist())
    assert state.kept_float == {"enter": "keep_float has 'input'", "leave": "keep_float has 'output'"}
    assert state.path_inputs == () and state.finite == {} and state.ungrouped == {}


def test_it_hashes_is_copied_and_pickled_and_cannot_change():
    state = PreparedState.of(prepared())
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), dataclasses.replace(state)):
        assert copied == state and hash(copied) == hash(state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.timestep = "t"
    with pytest.raises(TypeError):
        state.kept_float["up"] = ""


@pytest.mark.parametrize("rebuild", [copy.deepcopy, rebuilt, lambda graph: CSEPass()(graph).graph_module])
def test_it_survives_copies_and_tools_that_rebuild_graphs(rebuild):
    assert PreparedState.of(rebuild(prepared())) == PreparedState.of(prepared())


def test_a_state_that_is_attached_takes_the_place_of_the_older_one_and_leaves_copies_alone():
    graph = copy.deepcopy(prepared())
    before = PreparedState.of(graph)
    after = dataclasses.replace(before, kept_float={"up.conv1": "a test"})
    after.attach(graph)
    assert PreparedState.of(graph) == after and PreparedState.of(prepared()) == before


def test_reconstructing_a_copy_leaves_the_state_of_the_original_alone():
    graph = copy.deepcopy(prepared())
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    other = copy.deepcopy(graph)
    config = tfmq_fx.ReconstructionConfig(granularity="none", temporal_iterations=1)
    tfmq_fx.reconstruct(other, config=config, progress=False)
    assert PreparedState.of(other).config.reconstruction == config
    assert PreparedState.of(rebuilt(other)).config.reconstruction == config
    for unchanged in (graph, rebuilt(graph)):
        assert PreparedState.of(unchanged).config.reconstruction is None


def test_a_graph_without_a_state_is_refused_in_a_sentence():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    assert PreparedState.find(captured) is None
    with pytest.raises(ConfigError, match="not prepared with TFMQQuantizer"):
        PreparedState.of(captured)


@pytest.mark.parametrize("foreign", [{"config": {}, "timestep": "timestep"}, "fsc", 3])
@pytest.mark.parametrize("stage", [
    lambda graph: tfmq_fx.calibrate(graph, [batch()], progress=False),
    lambda graph: tfmq_fx.reconstruct(graph, [batch()], progress=False),
    tfmq_fx.convert,
])  # fmt: skip
def test_something_else_in_its_place_is_refused_by_every_stage(stage, foreign):
    graph = copy.deepcopy(prepared())
    graph.meta[STATE_KEY] = foreign
    with pytest.raises(ConfigError, match=f"carries a {type(foreign).__name__} under '{STATE_KEY}'") as caught:
        stage(graph)
    assert "\n" not in str(caught.value)


def test_a_state_of_inputs_that_the_graph_does_not_have_is_refused():
    graph = copy.deepcopy(prepared())
    dataclasses.replace(PreparedState.of(graph), timestep="t").attach(graph)
    with pytest.raises(ConfigError, match="prepared with an input 't', but its inputs are sample, timestep"):
        tfmq_fx.calibrate(graph, [batch()], progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("config", {"weight_bits": 8}), ("timestep", None), ("timesteps", ()), ("timesteps", torch.tensor([1.0])),
     ("timesteps", ("1",)), ("finite", ("class_labels",)), ("finite", {"class_labels": ("a",)}), ("conditions", "text"),
     ("conditions", (1,)), ("kept_float", {"up": None}), ("kept_float", {1: "why"}), ("ungrouped", ["up"])],
)  # fmt: skip
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ConfigError, match=f"cannot have {field}="):
        PreparedState(**{"config": QuantizationConfig(), field: value})


def test_lists_and_dictionaries_are_frozen():
    state = PreparedState(QuantizationConfig(), timesteps=[1.0, 0.0], finite={"class_labels": [0.0]}, conditions=["x"])
    assert state.timesteps == (1.0, 0.0) and state.path_inputs == ("class_labels", "x") and isinstance(hash(state), int)
