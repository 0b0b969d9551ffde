"""What passes and pipelines are given: a string is one name, a pass stands for itself, the rest is one sentence."""

import pytest
import torch

from tests.models import batch, small_denoiser
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes import (
    CANONICALIZE,
    PassError,
    RemoveDropouts,
    RemoveGuards,
    find_pass,
    find_pipeline,
    observe_passes,
    run_pipeline,
)
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def graph():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    return builder.build(builder.call(aten.sin.default, builder.call(aten.dropout.default, x, 0.5, False)))


@pytest.mark.parametrize("names", ["all", ("all",), "tfmq::remove_dropouts"])
def test_one_name_to_print_after(names, capsys):
    with observe_passes(print_after=names):
        RemoveDropouts()(graph())
    assert "after tfmq::remove_dropouts (modified)" in capsys.readouterr().err


def test_one_name_to_leave_out():
    with observe_passes(skip="tfmq::remove_dropouts"):
        assert not RemoveDropouts()(graph()).modified


def test_a_pass_stands_for_itself():
    graph_module = graph()
    assert run_pipeline(graph_module, [RemoveDropouts(), RemoveGuards]) and not RemoveDropouts()(graph_module).modified


WRONG = {
    "find_pass": (lambda: find_pass(None), "None is no id of a pass"),
    "find_pass, a list": (lambda: find_pass([]), r"\[\] is no id"),
    "find_pipeline": (lambda: find_pipeline([]), r"no pipeline \[\]; known are canonicalize"),
    "without": (lambda: CANONICALIZE.without(None), "None is no id"),
    "skip": (lambda: observe_passes(skip=3).__enter__(), "skip=3 must be ids"),
    "print_after": (lambda: observe_passes(print_after=[3]).__enter__(), r"print_after=\[3\] must be ids"),
    "a typo": (lambda: observe_passes(print_after="remove_dropouts").__enter__(), "did you mean tfmq::remove_dropouts"),
    "no pipeline": (lambda: run_pipeline(graph(), None), "a pipeline is a Pipeline"),
    "no entry": (lambda: run_pipeline(graph(), [3]), "an entry of a pipeline is a class of GraphPass"),
    "an instance": (lambda: assert_pass_contract(RemoveGuards(), graph(), ()), "passes made anew"),
    "no pass": (lambda: assert_pass_contract(None, graph(), ()), "passes made anew"),
    "no graph": (lambda: assert_pass_contract(RemoveGuards, small_denoiser(), batch()), "not on a SmallDenoiser"),
}


@pytest.mark.parametrize("call, part", WRONG.values(), ids=WRONG)
def test_what_is_none_of_these(call, part):
    with pytest.raises(ConfigError, match=part):
        call()


def test_a_model_is_no_graph():
    for call in (CANONICALIZE.run, RemoveGuards()):
        with pytest.raises(PassError, match=r"a SmallDenoiser is no fx.GraphModule; capture it with tfmq_fx.capture"):
            call(small_denoiser())


def test_one_finite_input():
    builder = GraphBuilder()
    builder.placeholder("timestep", (2,))
    assert find_temporal_block(builder.build(builder.placeholder("x", (2,))), finite="x").finite == ("x",)
