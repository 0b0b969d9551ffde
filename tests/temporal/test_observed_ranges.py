"""One range for all timesteps, of two kinds: the min-max of them all, and what calibration data show like any other."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.reconstruction_cases import BATCHES, calibrated, rec
from tfmq_fx import QuantizationConfig
from tfmq_fx.fake_quantizers import quantizers_of
from tfmq_fx.observers import EMAMinMaxObserver, MinMaxObserver
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.reconstruction.time_path import temporal_quantizers
from tfmq_fx.temporal.calibrate import block_sites


def block_observers(temporal, **config):
    """The observers in front of the block's linears, after a calibration."""
    graph = tfmq_fx.prepare(
        tfmq_fx.capture(small_denoiser(), batch(16)),
        QuantizationConfig(temporal=temporal, **config),
        timesteps=TIMESTEPS,
    )
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    linears = find_temporal_block(graph).linears
    sources = {str(linear.args[0].target) for linear in linears}
    return graph, [graph.get_submodule(name) for name in sorted(sources)]


def test_the_kinds_of_one_range_for_all_timesteps():
    _, exact = block_observers("shared")
    _, observed = block_observers("observed")
    assert {type(observer) for observer in exact} == {MinMaxObserver}
    assert {type(observer) for observer in observed} == {EMAMinMaxObserver}
    # Smoothed over timesteps, a range is at most that of all, and smaller somewhere.
    pairs = [(a.observed_range(), b.observed_range()) for a, b in zip(exact, observed, strict=True)]
    assert all(float(b[1]) <= float(a[1]) * 1.0001 for a, b in pairs) and any(
        float(b[1]) < float(a[1]) for a, b in pairs
    )


def test_a_table_of_timesteps_leaves_observed_ranges_alone():
    plain, observers = block_observers("observed")
    grouped, others = block_observers("observed", activation_groups=3)
    assert block_sites(plain) == block_sites(grouped) == []
    for observer, other in zip(observers, others, strict=True):
        assert observer.observed_range() == other.observed_range()


def ranges(graph):
    return {
        name: quantizer.scale.clone()
        for name, quantizer in temporal_quantizers(graph).items()
        if hasattr(quantizer, "log_step")
    }


@pytest.mark.parametrize("temporal", ["tiar", "blocks", "nearest"])
def test_reconstruction_keeps_observed_ranges(temporal):
    graph = calibrated(temporal="observed")
    before = ranges(graph)
    report = rec(graph, temporal=temporal)
    after = ranges(graph)
    assert before and all(torch.equal(after[name], before[name]) for name in before)
    assert any(unit.changed for unit in report.units)
    with torch.no_grad():
        assert torch.equal(graph(*batch()), tfmq_fx.convert(graph)(*batch()))


@pytest.mark.parametrize("temporal", ["shared", "observed", "fsc"])
def test_the_freeze_control_trains_all_but_the_time_path(temporal):
    graph = calibrated(temporal=temporal)
    inside = set(temporal_quantizers(graph))
    nearest = {name: q.up.clone() for name, q in quantizers_of(graph).items() if hasattr(q, "up")}
    report = rec(graph, temporal="nearest", iterations=30)
    after = {name: q.up for name, q in quantizers_of(graph).items() if hasattr(q, "up")}
    assert inside & set(after) and all(torch.equal(after[name], nearest[name]) for name in inside & set(after))
    assert any(not torch.equal(after[name], nearest[name]) for name in set(after) - inside)
    (block,) = (unit for unit in report.units if unit.kind == "temporal")
    assert block.iterations == 0 and block.reason == "temporal='nearest'"
