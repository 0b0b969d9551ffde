import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import CompressTemporalTable, IndexTimesteps, TabulateTemporalBlock
from tfmq_fx.passes.precision.compress_temporal_table import find_feature_tables, quantize_rows
from tfmq_fx.testing import TimePath, build_temporal_graph

aten = torch.ops.aten
VALUES = [999, 500, 7, 3, 0]


def tabulated(**path):
    model = build_temporal_graph(TimePath(**path))
    IndexTimesteps(VALUES, timestep=model.path.timestep_name)(model.graph_module)
    TabulateTemporalBlock(timestep=model.path.timestep_name)(model.graph_module)
    return model


def buffers(graph_module):
    return {name: buffer for name, buffer in graph_module.named_buffers() if name.startswith("temporal_features")}


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("path", [{"blocks": 3}, {"blocks": 2, "scale_shift": True, "dynamic_batch": True}])
def test_fires(storage, path):
    model = tabulated(**path)
    (name, table) = next(iter(buffers(model.graph_module).items()))
    assert CompressTemporalTable(storage)(model.graph_module).modified
    model.graph_module.graph.lint()
    stored = buffers(model.graph_module)
    assert name not in stored, "the float table is still there"
    features = operators(model.graph_module)[aten.slice.Tensor]
    assert features >= 2
    if storage == "float16":
        assert [t.dtype for t in stored.values()] == [torch.float16]
    else:
        assert {t.dtype for t in stored.values()} == {torch.uint8, torch.float32}
        assert stored[f"{name}_integers"].shape == table.shape
        assert stored[f"{name}_scale"].shape == stored[f"{name}_zero_point"].shape == (len(VALUES), features)
    for node in model.graph_module.graph.nodes:
        assert node.op == "output" or "val" in node.meta


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(storage, scalar, dynamic):
    path = {"scalar_timestep": scalar, "dynamic_batch": dynamic, "blocks": 2, "batch": 3}
    exact, model = tabulated(**path), tabulated(**path)
    table = next(iter(buffers(exact.graph_module).values()))
    CompressTemporalTable(storage)(model.graph_module)
    for timesteps in ((999,), (0,), (7,)):
        inputs = model.example_inputs(timesteps)
        ours, theirs = model.graph_module(*inputs), exact.graph_module(*inputs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            # The feature is added to the data: half a step of the widest row, or half of float16's.
            step = float(table.amax() - table.amin()) / 255 if storage == "int8" else float(table.abs().max()) * 2**-10
            assert float((a - b).detach().abs().max()) <= 4 * step
            assert not torch.equal(a, b), "nothing was rounded: the test would show nothing"


def test_does_not_fire_without_a_table():
    model = build_temporal_graph(TimePath())
    IndexTimesteps(VALUES)(model.graph_module)
    assert find_feature_tables(model.graph_module) == []
    for storage in ("int8", "float16"):
        assert unchanged(CompressTemporalTable(storage), model.graph_module)


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_does_not_fire_twice(storage):
    model = tabulated(blocks=2)
    CompressTemporalTable(storage)(model.graph_module)
    assert unchanged(CompressTemporalTable(storage), model.graph_module)


def test_several_users_of_one_feature():
    model = tabulated(blocks=2, read_features=True, return_embedding=True, dynamic_batch=True)
    result = CompressTemporalTable("int8")(model.graph_module)
    assert result.modified
    inputs = model.example_inputs((7, 999))
    assert all(bool(torch.isfinite(leaf).all()) for leaf in model.graph_module(*inputs))


def test_an_unknown_storage_is_named():
    with pytest.raises(ValueError, match=r"storage='int4' is not supported; use 'int8' or 'float16'"):
        CompressTemporalTable("int4")


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]), st.sampled_from([0.0, -3.0, 3.0]))
def test_a_row_in_eight_bits_is_off_by_half_a_step_at_most(seed, size, offset):
    rows = size * (torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) + offset)
    rows[2] = 0.0
    integers, scale, zero = quantize_rows(rows)
    assert integers.dtype == zero.dtype == torch.uint8 and scale.shape == (6,)
    restored = (integers.float() - zero[:, None].float()) * scale[:, None]
    # Half a step of rounding, half of the zero point's own.
    assert bool(((restored - rows).abs() <= 1.01 * scale[:, None]).all())
    assert torch.equal(restored[2], rows[2])
    widths = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
    assert float(scale[2]) == 1.0
    widths[2] = 255
    assert torch.allclose(scale * 255, widths, rtol=1e-5, atol=0)
