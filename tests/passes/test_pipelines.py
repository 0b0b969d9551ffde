"""Pipelines as values."""

from functools import partial

import pytest
import torch

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes import (
    CANONICALIZE,
    PIPELINES,
    REWRITE_FOR_ANNOTATION,
    ComputeInFloat32,
    IndexTimesteps,
    Numerics,
    Pipeline,
    RemoveDropouts,
    RemoveGuards,
    ShareTemporalNodes,
    find_pipeline,
    run_pipeline,
)
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten


def graph():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    return builder.build(builder.call(aten.dropout.default, builder.call(aten.sin.default, x), 0.5, False))


def test_a_pipeline_prints_itself_as_a_list_with_what_each_pass_is_for():
    pipeline = Pipeline("two", Numerics.EXACT, "To be printed.", (RemoveGuards, partial(RemoveDropouts)))
    assert str(pipeline).splitlines() == [
        "two (equal to the bit): To be printed.",
        f"  0 tfmq::remove_guards    {RemoveGuards.__doc__.splitlines()[0]}",
        f"  1 tfmq::remove_dropouts  {RemoveDropouts.__doc__.splitlines()[0]}",
    ]


def test_options_are_printed_and_used():
    pipeline = REWRITE_FOR_ANNOTATION.with_options(ShareTemporalNodes, timestep="t").with_options(
        ShareTemporalNodes, finite=("label",)
    )
    assert "tfmq::share_temporal_nodes(timestep='t', finite=('label',))" in str(pipeline)
    made = [make() for make in pipeline]
    assert (made[-1].timestep, made[-1].finite) == ("t", ("label",))
    assert pipeline.ids == REWRITE_FOR_ANNOTATION.ids and "timestep=" not in str(REWRITE_FOR_ANNOTATION)


def test_a_pass_can_be_left_out():
    shorter = CANONICALIZE.without("tfmq::remove_dropouts", "tfmq::remove_guards")
    assert len(shorter) == len(CANONICALIZE) - 2 and "tfmq::remove_dropouts" not in shorter.ids
    assert not shorter.run(graph()) and CANONICALIZE.run(graph())
    assert (shorter.name, shorter.numerics) == (CANONICALIZE.name, CANONICALIZE.numerics)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda: CANONICALIZE.without("tfmq::remove_dropout"), "did you mean tfmq::remove_dropouts"),
        (lambda: CANONICALIZE.without("tfmq::index_timesteps"), "is no pass of the pipeline 'canonicalize'"),
        (lambda: CANONICALIZE.with_options(IndexTimesteps, values=[1]), "is no pass of the pipeline 'canonicalize'"),
        (
            lambda: REWRITE_FOR_ANNOTATION.with_options(ShareTemporalNodes, step=1),
            "has no option 'step'; it takes time",
        ),
        (lambda: Pipeline("x", Numerics.EXACT, "", (len,)), "an entry of a pipeline is a class of GraphPass"),
        (
            lambda: Pipeline("x", Numerics.CLOSE, "", (ComputeInFloat32,)),
            "'x' is equal up to float rounding, and tfmq::compute_in_float32 is not: it changes numerics",
        ),
        (lambda: find_pipeline("canonical"), "no pipeline 'canonical'; known are canonicalize, "),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(change, words):
    with pytest.raises(ConfigError, match=words):
        change()


def test_the_registered_pipelines_are_found_by_name():
    assert all(find_pipeline(name) is pipeline and pipeline.name == name for name, pipeline in PIPELINES.items())


def test_running_says_whether_anything_changed():
    graph_module = graph()
    assert CANONICALIZE.run(graph_module) is True
    assert CANONICALIZE.run(graph_module) is False
    assert run_pipeline(graph(), [RemoveGuards]) is False
    # Every pass runs, also behind the first that changes something.
    assert run_pipeline(graph_module := graph(), [RemoveDropouts, partial(RemoveDropouts)]) is True
    assert [node.name for node in graph_module.graph.nodes] == ["x", "sin_default", "output"]
