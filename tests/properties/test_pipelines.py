"""What a pipeline promises holds for each of its entries, on graphs of every kind that there is."""

import contextlib
import copy
import math
from collections import Counter
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, given, settings

from tfmq_fx.passes import CANONICALIZE, PIPELINES, GraphPass, Numerics, PassError, find_pass, observe_passes
from tfmq_fx.passes.pipeline import Pipeline, pass_class
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.testing import GRAPH_KINDS, ContractViolation, assert_pipeline_contract, graphs_of_kind

aten = torch.ops.aten
#: Metadata that a pass is there to set.
MAY_SET = {"tfmq::propagate_values": ("val",)}
#: In a graph of integers another order of float sums may turn a rounding, which is one step of one activation.
ROUNDING, STEP = 1e-3, 0.15


#: Graphs drawn per kind, and how often a pass is held to its promise where it changes a graph: 8 and 6 of 20.
DRAWN, ENOUGH = settings.default.max_examples * 2 // 5, settings.default.max_examples * 3 // 10


def check(pipeline, kinds=GRAPH_KINDS, drawn=DRAWN):
    """How often each pass changed a graph of some kind, and kept its promise.

    Running a pipeline takes a hundredth of the time of checking it. So graphs are drawn until each pass has changed
    some, and checked in full when they are the first of their kind, or one on which a pass does what was seen seldom.
    """
    fired = Counter()
    for kind in kinds:
        check_kind(pipeline, kind, drawn, fired)
    return fired


def check_kind(pipeline, kind, drawn, fired):
    tolerance = STEP if kind.startswith("quantized_") else ROUNDING
    first = True

    @settings(max_examples=drawn, phases=[Phase.generate], database=None)
    # bfloat16 rounds so coarsely that only what is equal to the bit can be told from what is not.
    @given(graphs_of_kind(kind, half=pipeline.numerics is Numerics.EXACT))
    def holds(generated):
        nonlocal first
        seldom = {pass_id for pass_id in pipeline.ids if fired[pass_id] < ENOUGH}
        if not first and not (seldom and seldom & changes(pipeline, generated.graph_module)):
            return
        first = False
        inputs, more = generated.example_inputs, generated.more_inputs
        options = {"more_inputs": more, "rtol": tolerance, "atol": tolerance, "may_set": MAY_SET}
        fired.update(set(assert_pipeline_contract(pipeline, generated.graph_module, inputs, **options)))

    holds()


def changes(pipeline, graph_module):
    """Ids of the passes of the pipeline that change this graph."""
    graph_module = copy.deepcopy(graph_module)
    before, found = [], set()
    while (pipeline.after if not before else before[0].after) is not None:
        before.insert(0, pipeline.after if not before else before[0].after)
    with contextlib.suppress(PassError):
        for earlier in before:
            earlier.run(graph_module)
        with observe_passes(after=lambda a: found.update({a.rewrite.id} if a.modified else ())):
            pipeline.run(graph_module)
    return found


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_a_pipeline_keeps_its_promise_and_each_of_its_passes_fires(pipeline):
    fired = check(pipeline)
    idle = set(pipeline.ids) - fired.keys()
    assert not idle, f"no kind of graphs makes what {idle} look for: add one to tfmq_fx/testing/special_operators.py"


def with_planted(pass_maker):
    """CANONICALIZE with one more pass in the middle."""
    passes = list(CANONICALIZE)
    passes.insert(4, pass_maker)
    return Pipeline("canonicalize", CANONICALIZE.numerics, CANONICALIZE.about, tuple(passes))


class ScaleByReciprocal(GraphPass):
    """Divides by multiplying with the reciprocal, which is not the same to the bit, though it says so."""

    id: ClassVar[str] = "tests::scale_by_reciprocal"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module):
        found = [
            node
            for node in graph_module.graph.find_nodes(op="call_function", target=aten.div.Tensor)
            # The reciprocal of a power of two is exact, and graphs that are right hide those that are not.
            if not isinstance(node.args[1], torch.fx.Node) and math.frexp(abs(node.args[1]))[0] != 0.5
        ]
        for node in found:
            with graph_module.graph.inserting_before(node):
                new = insert_call(graph_module.graph, aten.mul.Tensor, (node.args[0], 1 / node.args[1]), anchor=node)
            replace_node(node, new)
        return bool(found)


class LooksForNothing(GraphPass):
    """A pass whose pattern no generator makes."""

    id: ClassVar[str] = "tests::looks_for_nothing"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module):
        return False


def test_a_pass_that_is_not_exact_to_the_bit_does_not_pass_in_an_exact_pipeline():
    with pytest.raises(ContractViolation) as caught:
        check(with_planted(ScaleByReciprocal))
    assert caught.value.property_id == "P2"
    assert (
        "tests::scale_by_reciprocal in the pipeline 'canonicalize' promises: equal to the bit" in caught.value.__notes__
    )


def test_a_pass_that_no_graph_makes_fire_is_noticed():
    fired = check(with_planted(LooksForNothing), kinds=["unary", "guard"])
    assert "tests::looks_for_nothing" not in fired and "tfmq::remove_guards" in fired


def test_no_entry_promises_less_than_its_pipeline():
    for pipeline in PIPELINES.values():
        for make in pipeline:
            assert pass_class(make).numerics <= pipeline.numerics
            assert find_pass(pass_class(make).id) is pass_class(make)
