"""Hypothesis strategies: tensor shapes, random ATen graphs, and diffusion models with a known answer."""

from __future__ import annotations

from dataclasses import replace

try:
    from hypothesis import strategies as st
except ImportError as error:
    msg = "the strategies of tfmq_fx.testing need hypothesis: pip install 'tfmq-fx[testing]'"
    raise ImportError(msg) from error

from .generated_graph import GeneratedGraph
from .random_graphs import aten_graphs
from .random_operators import OPERATORS
from .random_quantized_graphs import QUANTIZED_LAYERS, quantized_graphs
from .special_operators import SPECIAL_OPERATORS
from .temporal_graph import TemporalGraph
from .temporal_model import build_temporal_graph
from .tensors import TensorSpec, tensor_specs
from .time_path import TimePath

__all__ = [
    "GRAPH_KINDS",
    "GeneratedGraph",
    "TensorSpec",
    "aten_graphs",
    "graphs_of_kind",
    "quantized_graphs",
    "temporal_graphs",
    "tensor_specs",
    "time_paths",
]

#: The time paths of diffusion models, by whether a class or a prompt enters them.
TEMPORAL_KINDS = {"temporal": False, "temporal_conditional": True}
#: What generated graphs are made of: an operator, a quantized layer, or a diffusion model's time path.
GRAPH_KINDS = (*OPERATORS, *SPECIAL_OPERATORS, *(f"quantized_{layer}" for layer in QUANTIZED_LAYERS), *TEMPORAL_KINDS)


def graphs_of_kind(kind: str, *, half: bool = True) -> st.SearchStrategy[GeneratedGraph]:
    """Random graphs that hold what a kind is named after.

    Args:
        kind: One of :data:`GRAPH_KINDS`.
        half: Whether bfloat16 values occur in graphs of operators.

    Raises:
        ValueError: There is no such kind.
    """
    if kind in TEMPORAL_KINDS:
        return (
            time_paths(conditional=TEMPORAL_KINDS[kind]).map(_with_usual_name).map(build_temporal_graph).map(_generated)
        )
    if kind.startswith("quantized_") and kind.removeprefix("quantized_") in QUANTIZED_LAYERS:
        return quantized_graphs(max_layers=2, favour=(kind.removeprefix("quantized_"),))
    if kind in (*OPERATORS, *SPECIAL_OPERATORS):
        return aten_graphs(half=half, favour=(kind,))
    msg = f"there is no kind of graphs {kind!r}; known are {', '.join(GRAPH_KINDS)}"
    raise ValueError(msg)


def _with_usual_name(path: TimePath) -> TimePath:
    return replace(path, timestep_name="timestep")


def _generated(model: TemporalGraph) -> GeneratedGraph:
    sizes = (model.path.batch + 1,) if model.path.dynamic_batch else ()
    more = tuple(tuple(model.example_inputs(batch=size)) for size in sizes)
    return GeneratedGraph(model.graph_module, tuple(model.example_inputs()), more)


def time_paths(
    *,
    conditional: bool | None = None,
    dynamic_batch: bool | None = None,
    scalar_timestep: bool | None = None,
) -> st.SearchStrategy[TimePath]:
    """Descriptions of small diffusion models.

    Args:
        conditional: Whether the time embedding takes a class embedding; either by default. False leaves out a prompt's
            embedding too.
        dynamic_batch: Whether the batch is symbolic; either by default.
        scalar_timestep: Whether the timestep is 0-dim; either by default.
    """
    flag = st.booleans()
    prompts = ("none",) if conditional is False else ("none", "plain", "linear")
    classes = {None: ("none", "table", "linear"), False: ("none",), True: ("table", "linear")}[conditional]
    paths = st.builds(
        TimePath,
        seed=st.integers(0, 1000),
        batch=st.integers(2, 3),
        dynamic_batch=flag if dynamic_batch is None else st.just(dynamic_batch),
        scalar_timestep=flag if scalar_timestep is None else st.just(scalar_timestep),
        float_timestep=flag,
        timestep_name=st.sampled_from(["timestep", "t"]),
        position=st.sampled_from(["last", "first", "middle"]),
        broadcast=st.sampled_from(["ones", "expand", "none"]),
        width=st.sampled_from([8, 4, 5, 9]),
        flip=flag,
        shift=st.sampled_from([0.0, 1.0]),
        scale=st.sampled_from([1.0, 1000.0]),
        computed_frequencies=flag,
        casts=flag,
        asserts=flag,
        blocks=st.integers(1, 4),
        scale_shift=flag,
        activation=st.sampled_from(["separate", "shared", "none"]),
        class_embedding=st.sampled_from(classes),
        prompt=st.sampled_from(prompts),
        return_embedding=flag,
        read_features=flag,
        read_batch=flag,
        shape_decoy=flag,
        linear_decoy=flag,
        sinusoid_decoy=flag,
        shared_weight_decoy=flag,
        dead_branch=flag,
    )
    return paths.map(_without_ambiguity)


def _without_ambiguity(path: TimePath) -> TimePath:
    """The path, without the one pair of options that has no answer."""
    both = path.prompt != "none" and path.class_embedding == "linear"
    return replace(path, class_embedding="table") if both else path


def temporal_graphs(
    *,
    conditional: bool | None = None,
    dynamic_batch: bool | None = None,
    scalar_timestep: bool | None = None,
) -> st.SearchStrategy[TemporalGraph]:
    """Small diffusion models, each with the temporal block that it was built with.

    Args:
        conditional: Whether the time embedding takes a class embedding; either by default. False leaves out a prompt's
            embedding too.
        dynamic_batch: Whether the batch is symbolic; either by default.
        scalar_timestep: Whether the timestep is 0-dim; either by default.
    """
    paths = time_paths(conditional=conditional, dynamic_batch=dynamic_batch, scalar_timestep=scalar_timestep)
    return paths.map(build_temporal_graph)
