"""The tools themselves: what the generators make, and what the contract checker takes for the same graph."""

import copy
import sys
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import nn

import tfmq_fx
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.support.recomputed_values import recompute_values
from tfmq_fx.testing import GraphBuilder, TimePath, aten_graphs, build_temporal_graph, temporal_graphs, tensor_specs
from tfmq_fx.testing.canonical import canonical_text, value_signature
from tfmq_fx.testing.random_operators import OPERATORS
from tfmq_fx.testing.random_quantized_graphs import quantized_graphs

aten = torch.ops.aten


# -- strategies ---------------------------------------------------------------------


@given(tensor_specs(min_rank=2, max_rank=3, dtypes=(torch.float32, torch.int64)))
def test_tensors_are_small_and_repeatable(spec):
    value = spec.random(3)
    assert value.dtype == spec.dtype and value.shape == spec.shape and value.ndim in (2, 3)
    assert value.numel() <= 4096
    assert torch.equal(value, spec.random(3))


@given(aten_graphs())
def test_generated_graphs_run_and_know_their_values(generated):
    graph_module = generated.graph_module
    graph_module.graph.lint()
    for node, value in recompute_values(graph_module).items():
        if node.op != "output":
            assert value_signature(node.meta["val"]) == value_signature(value)
    for inputs in (generated.example_inputs, *generated.more_inputs):
        with torch.no_grad():
            outputs = graph_module(*inputs)
        leaves = torch.utils._pytree.tree_leaves(outputs)
        assert leaves and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert all(bool(torch.isfinite(leaf).all()) for leaf in leaves)


@pytest.mark.parametrize("strategy", [aten_graphs, quantized_graphs])
@pytest.mark.parametrize(("favour", "words"), [(("nope",), "favour has 'nope', which is no kind; use '.*'conv'"),
                                               ("conv", "favour='conv' must be a tuple of kinds")])  # fmt: skip
def test_what_no_generator_has_cannot_be_favoured(strategy, favour, words):
    @settings(database=None)
    @given(strategy(favour=favour))
    def drawn(generated):
        raise AssertionError

    with pytest.raises(ConfigError, match=words):
        drawn()


def test_generated_graphs_are_of_every_kind():
    seen = Counter()

    @settings(max_examples=200, phases=[Phase.generate], database=None, derandomize=True)
    @given(aten_graphs())
    def look(generated):
        nodes = list(generated.graph_module.graph.nodes)
        seen.update({str(node.target) for node in nodes if node.op == "call_function"})
        names = [node.name for node in nodes if node.op == "placeholder"]
        seen[f"timestep at {names.index('timestep')}"] += 1
        seen["several users"] += any(len(node.users) > 1 for node in nodes if node.op == "call_function")
        seen["dead node"] += any(not node.users for node in nodes if node.op == "call_function")
        reads = [node.target for node in nodes if node.op == "get_attr"]
        seen["weight read twice"] += len(set(reads)) < len(reads)
        seen["weight with several users"] += any(len(node.users) > 1 for node in nodes if node.op == "get_attr")
        seen["keyword node"] += any(isinstance(v, torch.fx.Node) for node in nodes for v in node.kwargs.values())
        seen["unread state"] += "unread_buffer" in dict(generated.graph_module.named_buffers())
        seen["symbolic batch"] += bool(generated.more_inputs)
        output = generated.graph_module.graph.output_node().args[0]
        seen[f"output {type(output).__name__}"] += 1

    look()
    operators = ["linear", "conv2d", "silu", "relu", "gelu", "group_norm", "add", "mul", "cat", "reshape", "transpose"]
    operators += ["unsqueeze", "mean", "dropout", "sin", "cos", "scaled_dot_product_attention", "chunk", "to"]
    for name in operators:
        assert any(kind.startswith(f"aten.{name}.") for kind in seen), name
    shapes = ["timestep at 0", "timestep at 1", "timestep at 2", "several users", "dead node", "weight read twice"]
    shapes += ["weight with several users", "keyword node", "unread state", "symbolic batch"]
    for kind in [*shapes, "output Node", "output tuple"]:
        assert seen[kind] >= 1, kind


@given(aten_graphs(half=False, favour=("cast",)))
def test_without_half_there_is_no_bfloat16(generated):
    assert all("bfloat16" not in value_signature(node.meta.get("val")) for node in generated.graph_module.graph.nodes)


@pytest.mark.parametrize("kind", OPERATORS)
def test_what_is_favoured_is_drawn_more_often(kind):
    makes = {"conv": "conv2d", "attention": "scaled_dot_product_attention", "concatenation": "cat", "constant": "add"}
    drawn = []

    @settings(max_examples=8, phases=[Phase.generate], database=None, derandomize=True)
    @given(aten_graphs(favour=(kind,)))
    def look(generated):
        drawn.extend(str(node.target) for node in generated.graph_module.graph.nodes if node.op == "call_function")

    look()
    assert drawn
    if kind in makes or hasattr(aten, kind):
        assert sum(name.startswith(f"aten.{makes.get(kind, kind)}.") for name in drawn) >= 4


@given(temporal_graphs())
def test_temporal_graphs_run_at_every_batch_size(model):
    sizes = (1, 2, 5) if model.path.dynamic_batch else (model.path.batch,)
    for size in sizes:
        with torch.no_grad():
            outputs = model.graph_module(*model.example_inputs(batch=size))
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.shape == (size, 4, 4, 4) and bool(torch.isfinite(first).all())


@given(temporal_graphs())
def test_the_expected_block_is_never_trivial(model):
    names = {node.name for node in model.graph_module.graph.nodes}
    assert model.expected.nodes < names and len(model.expected.time_embedding) == 2
    conditional = model.path.class_embedding != "none" or model.path.prompt != "none"
    assert bool(model.expected.embedding_layers) is not conditional
    assert model.expected_whole.embedding_layers and model.expected.nodes <= model.expected_whole.nodes
    assert bool(model.expected_part.conditions) is conditional is bool(model.expected_part.joint)
    assert model.expected.features and set(model.expected.features) <= model.expected.nodes


def test_examples_are_shown_as_graphs():
    model = build_temporal_graph(TimePath(blocks=2))
    assert repr(model).startswith("TemporalGraph(TimePath(seed=0") and "aten.linear.default" in repr(model)


# -- the package without hypothesis -------------------------------------------------


def test_the_rest_works_without_hypothesis(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "hypothesis"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [name for name in sys.modules if name.startswith("tfmq_fx.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(tfmq_fx, "testing", None, raising=False)
    import tfmq_fx.testing as testing

    builder = testing.GraphBuilder()
    assert builder.build(builder.placeholder("x", (2,)))(torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(ImportError, match=r"need hypothesis: pip install 'tfmq-fx\[testing\]'"):
        testing.aten_graphs()
    with pytest.raises(AttributeError, match="no attribute 'aten_graph'"):
        _ = testing.aten_graph


def test_all_that_is_announced_is_there():
    import tfmq_fx.testing as testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)


# -- the graph builder --------------------------------------------------------------


def test_inputs_come_first_in_the_order_of_the_calls():
    builder = GraphBuilder()
    first = builder.placeholder("first", (2,))
    total = builder.call(aten.sin.default, first)
    second = builder.placeholder("second", (2,))
    graph_module = builder.build(builder.call(aten.sub.Tensor, total, second))
    assert [node.name for node in graph_module.graph.nodes][:2] == ["first", "second"]
    assert graph_module(torch.zeros(2), torch.ones(2)).tolist() == [-1, -1]


def test_a_symbolic_batch_stays_symbolic_through_padding_and_attention():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 2, 5))
    padded = builder.call(aten.pad.default, x, [1, 1])
    node = builder.call(aten.scaled_dot_product_attention.default, padded, padded, padded)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt) and not node.meta["val"].shape[0].node.expr.is_number
    assert builder.build(node)(torch.ones(7, 2, 5)).shape == (7, 2, 7)
    with pytest.raises(ValueError, match="at least 2"):
        GraphBuilder(batch=1, dynamic_batch=True)


def test_state_is_registered_under_dotted_names_and_in_its_kind():
    builder = GraphBuilder()
    builder.placeholder("x", (2,))
    nodes = [builder.weight("a.b.weight", (2, 3)), builder.buffer("a.steps", torch.arange(3)), builder.read("a.steps")]
    graph_module = builder.build(tuple(nodes))
    assert [name for name, _ in graph_module.named_parameters()] == ["a.b.weight"]
    assert [name for name, _ in graph_module.named_buffers()] == ["a.steps"]
    assert not graph_module.training and "nn_module_stack" not in nodes[0].meta


def test_a_call_that_does_not_fit_leaves_no_node():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 3))
    with pytest.raises(RuntimeError):
        builder.call(aten.matmul.default, x, x)
    assert [node.name for node in builder.graph.nodes] == ["x"]


# -- what counts as the same graph --------------------------------------------------


def small():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    return builder.build(builder.call(aten.linear.default, x, builder.weight("fc.weight", (4, 4))))


def rename(graph_module):
    for node in graph_module.graph.nodes:
        node._rename("another_name")


def change_a_weight(graph_module):
    with torch.no_grad():
        graph_module.get_parameter("fc.weight")[0, 0] += 1e-6


def flip_the_sign_of_zero(graph_module):
    with torch.no_grad():
        weight = graph_module.get_parameter("fc.weight")
        weight.copy_(torch.where(weight == 0, -weight, weight))


def add_a_module(graph_module):
    graph_module.add_submodule("unread", nn.Module())


def change_a_value(graph_module):
    node = graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    node.meta["val"] = node.meta["val"].to(torch.float64)


def swap_arguments(graph_module):
    node = graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    node.args = node.args[::-1]


@pytest.mark.parametrize(
    "change, same",
    [
        (rename, True),
        (lambda graph_module: graph_module.recompile(), True),
        (change_a_weight, False),
        (flip_the_sign_of_zero, False),
        (add_a_module, False),
        (change_a_value, False),
        (swap_arguments, False),
    ],
)
def test_the_canonical_text_changes_with_what_can_change_a_result(change, same):
    graph_module = small()
    with torch.no_grad():
        graph_module.get_parameter("fc.weight")[1, 1] = 0.0
    changed = copy.deepcopy(graph_module)
    change(changed)
    assert (canonical_text(changed) == canonical_text(graph_module)) is same


def test_the_canonical_text_tells_numbers_apart():
    def scaled(number):
        builder = GraphBuilder()
        return canonical_text(builder.build(builder.call(aten.mul.Tensor, builder.placeholder("x", (2,)), number)))

    assert len({scaled(1), scaled(1.0), scaled(2), scaled(-0.0), scaled(0.0)}) == 5
