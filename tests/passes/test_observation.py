"""Looking at passes where they are called."""

import threading

import pytest
import torch

from tests.passes.helpers import operators
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes import CANONICALIZE, PassError, RemoveDropouts, RemoveIdentityArithmetic, observe_passes
from tfmq_fx.passes.observation import PRINT_AFTER
from tfmq_fx.passes.support.nodes import insert_call
from tfmq_fx.testing import ContractViolation, GraphBuilder, check_passes

aten = torch.ops.aten
DROPOUTS = "tfmq::remove_dropouts"


def graph():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    h = builder.call(aten.dropout.default, x, 0.5, False)
    return builder.build(builder.call(aten.sin.default, builder.call(aten.mul.Tensor, h, 1)))


def test_a_pass_is_left_out_wherever_it_is_called():
    graph_module = graph()
    with observe_passes(skip=[DROPOUTS]):
        assert CANONICALIZE.run(graph_module)
        assert not RemoveDropouts()(graph_module).modified
    assert operators(graph_module) == {aten.dropout.default: 1, aten.sin.default: 1}
    assert RemoveDropouts()(graph_module).modified


def test_an_application_is_shown_in_a_line():
    seen = []
    with observe_passes(after=lambda application: seen.append(repr(application))):
        CANONICALIZE.run(graph())
    assert seen[0].startswith("<PassApplication #0 tfmq::") and max(map(len, seen)) < 80
    assert any(f"{DROPOUTS} (modified)>" in line for line in seen)


def test_every_application_is_seen_before_and_after():
    seen = []
    with observe_passes(
        before=lambda a: seen.append((a.index, a.rewrite.id, len(a.graph_module.graph.nodes))),
        after=lambda a: seen.append((a.index, a.modified, len(a.graph_module.graph.nodes))),
    ):
        graph_module = graph()
        RemoveDropouts()(graph_module)
        RemoveDropouts()(graph_module)
    assert seen == [(0, DROPOUTS, 5), (0, True, 4), (1, DROPOUTS, 4), (1, False, 4)]
    RemoveDropouts()(graph())
    assert len(seen) == 4


def test_observations_nest_and_a_hook_is_not_observed():
    outer, inner = [], []

    def rerun(application):
        RemoveIdentityArithmetic()(application.graph_module)
        inner.append(str(application))

    with observe_passes(after=lambda a: outer.append(str(a))):
        with observe_passes(after=rerun):
            RemoveDropouts()(graph())
        RemoveDropouts()(graph())
    assert inner == ["#0 tfmq::remove_dropouts (modified)"]
    assert outer == ["#0 tfmq::remove_dropouts (modified)", "#1 tfmq::remove_dropouts (modified)"]


def test_other_threads_are_not_observed():
    seen = []
    with observe_passes(after=seen.append):
        thread = threading.Thread(target=lambda: RemoveDropouts()(graph()))
        thread.start()
        thread.join()
    assert not seen


def test_it_ends_when_the_body_raises():
    with pytest.raises(KeyError), observe_passes(skip=[DROPOUTS]):
        raise KeyError
    assert RemoveDropouts()(graph()).modified


@pytest.mark.parametrize("option", ["skip", "print_after"])
def test_an_unknown_id_is_refused_and_near_ones_are_named(option):
    with (
        pytest.raises(ConfigError, match=r"no pass 'tfmq::remove_dropout'; did you mean tfmq::remove_dropouts"),
        observe_passes(**{option: ["tfmq::remove_dropout"]}),
    ):
        pass


def test_the_graph_is_printed_after_a_pass(capsys):
    with observe_passes(print_after=[DROPOUTS]):
        CANONICALIZE.run(graph())
    out, err = capsys.readouterr()
    assert not out and err.count("after tfmq::") == 1
    assert "after tfmq::remove_dropouts (modified):\ngraph():" in err
    assert "aten.mul.Tensor" in err and "aten.dropout" not in err


@pytest.mark.parametrize("value, count", [(f"{DROPOUTS}, tfmq::remove_guards", 2), ("all", len(CANONICALIZE)), ("", 0)])
def test_the_environment_prints_without_a_change_of_the_program(value, count, monkeypatch, capsys):
    monkeypatch.setenv(PRINT_AFTER, value)
    CANONICALIZE.run(graph())
    assert capsys.readouterr().err.count("after tfmq::") == count


def test_an_unknown_id_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(PRINT_AFTER, "remove_dropouts")
    with pytest.raises(ConfigError, match=r"^TFMQ_FX_PRINT_AFTER: there is no pass 'remove_dropouts'; did you mean"):
        RemoveDropouts()(graph())


# -- verifying --------------------------------------------------------------------------


class Broken(RemoveDropouts):
    """Does what the test plants besides."""

    def __init__(self, plant, reports=None):
        super().__init__()
        self.plant, self.reports = plant, reports

    def rewrite(self, graph_module):
        modified = super().rewrite(graph_module)
        self.plant(graph_module)
        return modified if self.reports is None else self.reports

    def ensures(self, graph_module):
        """The lint is left to the verification."""


def sine(graph_module):
    return graph_module.graph.find_nodes(op="call_function", target=aten.sin.default)[0]


def forget_the_value(graph_module):
    node = sine(graph_module)
    with graph_module.graph.inserting_before(node):
        new = insert_call(graph_module.graph, aten.alias.default, (node.args[0],), anchor=node)
    node.replace_input_with(node.args[0], new)
    del new.meta["val"]


def record_another_dtype(graph_module):
    sine(graph_module).meta["val"] = sine(graph_module).meta["val"].double()


def rename_the_input(graph_module):
    graph_module.graph.find_nodes(op="placeholder")[0].target = "renamed"


def disorder(graph_module):
    sine(graph_module).args[0].args[0].append(sine(graph_module))


@pytest.mark.parametrize(
    "plant, reports, words",
    [
        (forget_the_value, None, "new node 'alias_default' has no meta"),
        (
            record_another_dtype,
            None,
            r"says \['torch.float64\[2, 4\]'\], the node computes \['torch.float32\[2, 4\]'\]",
        ),
        (rename_the_input, None, "the inputs are renamed, they were x"),
        (disorder, None, "does not lint"),
        (lambda graph_module: None, False, "reports no change"),
    ],
)
def test_verifying_finds_a_broken_graph_and_names_the_pass(plant, reports, words):
    with pytest.raises(PassError, match=f"^tfmq::remove_dropouts: .*{words}"), observe_passes(verify=True):
        Broken(plant, reports)(graph())


def test_verifying_accepts_sound_passes():
    assert CANONICALIZE.run(graph(), verify=True)


def test_the_contract_is_checked_where_passes_are_called():
    x = torch.randn(2, 4)
    with check_passes([x]) as checked:
        CANONICALIZE.run(graph())
        # A graph with other inputs is a part of another model.
        RemoveDropouts()(GraphBuilder().build(()))
    assert checked == list(CANONICALIZE.ids)

    def double(graph_module):
        node = sine(graph_module)
        with graph_module.graph.inserting_before(node):
            new = insert_call(graph_module.graph, aten.mul.Tensor, (node.args[0], 2), anchor=node)
        node.replace_input_with(node.args[0], new)

    with pytest.raises(ContractViolation, match=r"^P2 semantics"), check_passes({"x": x}):
        Broken(double)(graph())
