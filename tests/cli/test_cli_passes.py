"""Passes seen from the command line."""

import re

import pytest
import torch

from tests.cli.test_cli import model, refused, tfmq  # noqa: F401  (a fixture)
from tfmq_fx.passes import FlattenLinearInputs
from tfmq_fx.passes.support.nodes import insert_call

BISECT = ("--backend", "reference", "--steps", 4)


def test_bisect_accuses_no_pass_of_a_sound_model(model):  # noqa: F811
    result = tfmq("bisect", model, *BISECT)
    assert result.exit_code == 0, result.output
    assert "no pass parts from the reference" in result.stdout
    assert "tfmq::index_timesteps: 0 -> " in result.stdout


def test_bisect_finds_a_planted_fault(model, monkeypatch):  # noqa: F811
    sound = FlattenLinearInputs.rewrite

    def rewrite(self, graph_module):
        modified = sound(self, graph_module)
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)[:1]:
            with graph_module.graph.inserting_before(node):
                new = insert_call(graph_module.graph, torch.ops.aten.mul.Tensor, (node.args[0], 1.5), anchor=node)
            node.replace_input_with(node.args[0], new)
        return modified

    monkeypatch.setattr(FlattenLinearInputs, "rewrite", rewrite)
    result = tfmq("bisect", model, *BISECT)
    assert result.exit_code == 1 and not isinstance(result.exception, AssertionError), result.output
    assert re.search(r"the results part at #\d+ tfmq::flatten_linear_inputs: 0 -> ", result.stdout)
    assert "+ %mul_tensor" in result.stdout
    # Left out, it is not the culprit.
    result = tfmq("bisect", model, *BISECT, "--skip-pass", "tfmq::flatten_linear_inputs")
    assert result.exit_code == 0, result.output


def test_the_graph_is_printed_after_a_pass(model, tmp_path):  # noqa: F811
    options = ("--steps", 2, "--calibration-samples", 2, "--print-after", "tfmq::share_temporal_nodes")
    result = tfmq("quantize", model, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("after tfmq::") == 1
    assert "after tfmq::share_temporal_nodes (modified):\ngraph():" in result.stderr
    assert "graph():" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("quantize", "--out", "x", "--print-after", "remove_dropouts"), ("bisect", "--skip-pass", "remove_dropouts")],
)
def test_an_unknown_pass_is_one_sentence(arguments, model, monkeypatch):  # noqa: F811
    def never(_):
        raise AssertionError

    monkeypatch.setattr("tfmq_fx.data.bundled_model.load_model", never)
    result = tfmq(arguments[0], model, *arguments[1:])
    refused(result, "there is no pass 'remove_dropouts'; did you mean tfmq::remove_dropouts")


def test_bisect_refuses_a_backend_before_the_work(monkeypatch):
    def never(_):
        raise AssertionError

    monkeypatch.setattr("tfmq_fx.data.bundled_model.load_model", never)
    refused(tfmq("bisect", "--backend", "aot"), "backend='aot' needs path=")
