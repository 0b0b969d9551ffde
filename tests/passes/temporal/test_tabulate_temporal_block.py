import pytest
import torch

from tests.passes.helpers import operators, unchanged
from tfmq_fx.errors import TimestepError
from tfmq_fx.passes import IndexTimesteps, PassError, TabulateTemporalBlock
from tfmq_fx.testing import GraphBuilder, TimePath, assert_pass_contract, build_temporal_graph

aten = torch.ops.aten
VALUES = [999, 500, 7, 3, 0]


def indexed(**path):
    model = build_temporal_graph(TimePath(**path))
    IndexTimesteps(VALUES, timestep=model.path.timestep_name)(model.graph_module)
    return model


def test_fires():
    model = indexed(blocks=3)
    assert TabulateTemporalBlock()(model.graph_module).modified
    found = operators(model.graph_module)
    assert found[aten.linear.default] == 0 and found[aten.sin.default] == 0
    # One gather serves all blocks.
    assert found[aten.index_select.default] == 1 and found[aten.slice.Tensor] == 3
    assert model.graph_module.temporal_features.shape == (len(VALUES), 3 * 4)


def test_the_table_holds_what_the_block_computes():
    model = indexed()
    feature = next(n for n in model.graph_module.graph.nodes if n.name == model.expected.features[0])
    reader = next(iter(feature.users))
    TabulateTemporalBlock()(model.graph_module)
    want = []
    for value in VALUES:
        plain = build_temporal_graph(TimePath())
        kept = next(n for n in plain.graph_module.graph.nodes if n.name == model.expected.features[0])
        plain.graph_module.graph.output_node().args = (kept,)
        plain.graph_module.recompile()
        want.append(plain.graph_module(*plain.example_inputs((value,)))[0].reshape(-1))
    assert torch.allclose(model.graph_module.temporal_features, torch.stack(want), atol=1e-6)
    assert reader in model.graph_module.graph.nodes


@pytest.mark.parametrize("broadcast", ["ones", "expand", "none"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_numerics(broadcast, scalar, dynamic, scale_shift):
    model = indexed(
        broadcast=broadcast, scalar_timestep=scalar, dynamic_batch=dynamic, scale_shift=scale_shift, blocks=2, batch=3
    )
    more = [model.example_inputs((0, 500, 7))]
    if dynamic:
        more += [model.example_inputs((3,), batch=1), model.example_inputs((7, 999, 0), batch=8)]
    assert_pass_contract(
        TabulateTemporalBlock,
        model.graph_module,
        model.example_inputs((7, 999)),
        more_inputs=more,
        rtol=1e-5,
        confined_to=lambda node: node.name in model.expected.nodes or node.op == "get_attr",
    )


def test_a_model_with_classes_keeps_what_the_class_decides():
    model = indexed(class_embedding="linear", blocks=2)
    assert TabulateTemporalBlock()(model.graph_module).modified
    # The class embedding's linear and the two of the blocks stay, the two of h are gone.
    assert operators(model.graph_module)[aten.linear.default] == 3


def test_does_not_fire_without_a_block():
    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)
    mixed = builder.call(aten.mul.Tensor, x, builder.call(aten.unsqueeze.default, t, 1))
    graph_module = builder.build(builder.call(aten.linear.default, mixed, builder.weight("weight", (4, 4))))
    IndexTimesteps(VALUES)(graph_module)
    assert unchanged(TabulateTemporalBlock(), graph_module)


def test_does_not_fire_twice():
    model = indexed(blocks=2, return_embedding=True)
    TabulateTemporalBlock()(model.graph_module)
    assert unchanged(TabulateTemporalBlock(), model.graph_module)


def test_several_users_inside_and_outside_the_block():
    model = indexed(blocks=2, read_features=True, return_embedding=True, activation="none", dynamic_batch=True)
    more = [model.example_inputs((500, 0, 3), batch=4)]
    result = assert_pass_contract(
        TabulateTemporalBlock, model.graph_module, model.example_inputs((7, 999)), more_inputs=more, rtol=1e-5
    )
    assert operators(result.graph_module)[aten.linear.default] == 0


def test_who_asks_for_a_shape_alone_does_not_keep_the_block_alive():
    model = indexed(shape_decoy=True, dynamic_batch=True)
    result = assert_pass_contract(TabulateTemporalBlock, model.graph_module, model.example_inputs((7, 999)))
    assert operators(result.graph_module)[aten.linear.default] == 0


def test_the_row_is_read_by_value_after_tabulating():
    model = indexed()
    TabulateTemporalBlock()(model.graph_module)
    with pytest.raises(TimestepError, match="timestep 8 is not in the table"):
        model.graph_module(*model.example_inputs((7, 8)))


def test_rows_that_depend_on_each_other_are_refused():
    builder = GraphBuilder(batch=len(VALUES))
    x, t = builder.placeholder("x", (5, 4)), builder.placeholder("timestep", (5,), torch.int64)
    column = builder.call(aten.to.dtype, builder.call(aten.unsqueeze.default, t, 1), torch.float32)
    running = builder.call(aten.cumsum.default, column, 0)
    linear = builder.call(aten.linear.default, running, builder.weight("weight", (4, 1)))
    graph_module = builder.build(builder.call(aten.add.Tensor, x, linear))
    IndexTimesteps(VALUES)(graph_module)
    code = graph_module.code
    with pytest.raises(PassError, match="'linear_default' do not each depend on their own timestep alone"):
        TabulateTemporalBlock()(graph_module)
    assert graph_module.code == code


def test_needs_a_row():
    with pytest.raises(PassError, match="no timestep row; run IndexTimesteps first"):
        TabulateTemporalBlock()(build_temporal_graph(TimePath()).graph_module)


def test_a_table_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("tfmq_fx.passes.temporal.tabulate_temporal_block.MOST_BYTES", 100)
    model = build_temporal_graph(TimePath(class_embedding="table"))
    IndexTimesteps(VALUES, finite={"class_labels": [0, 1, 2]})(model.graph_module)
    before = str(model.graph_module.graph)
    with pytest.raises(PassError, match=r"5 of 'timestep' x 3 of 'class_labels'\) would take .* name fewer values"):
        TabulateTemporalBlock()(model.graph_module)
    assert str(model.graph_module.graph) == before
