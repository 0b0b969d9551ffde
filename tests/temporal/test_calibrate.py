"""Calibration over a domain: sites in the order of the graph, each behind those that are settled."""

import copy

import pytest
import torch

import tfmq_fx
from tests.conditional_cases import all_pairs, observers
from tests.conditional_cases import prepared as conditional
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.reconstruction_cases import calibrated, same, state
from tfmq_fx.observers import MinMaxObserver, TimestepObserver
from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.temporal.calibrate import (
    block_sites,
    calibrate_conditional_part,
    calibrate_over,
    calibrate_temporal_block,
    conditional_sites,
)
from tfmq_fx.temporal.domain import TemporalDomain, finite_domain, table_domain


def prepared():
    graph = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    return graph


@pytest.mark.parametrize("make", [prepared, calibrated], ids=["observers", "fake quantizers"])
def test_all_sites_at_once_or_one_by_one_is_the_same_to_the_bit(make, monkeypatch):
    together, apart = make(), make()
    for graph in (together, apart):
        assert calibrate_over(graph, table_domain(graph), block_sites(graph)) >= 3
        monkeypatch.setattr(TemporalDomain, "entry_per_row", False)
    assert same(state(together), state(apart))


def test_what_was_known_of_a_site_is_forgotten():
    graph = prepared()
    before = copy.deepcopy(graph.state_dict())
    for module in graph.modules():
        if isinstance(module, TimestepObserver):
            module.high.fill_(1e6)
    calibrate_temporal_block(graph)
    assert same(graph.state_dict(), before)


def test_no_other_observer_is_changed():
    graph = conditional()
    sites = conditional_sites(graph, all_pairs())
    (observer,) = observers(graph)
    assert [graph.get_submodule(str(site.target)) for site in sites] == [observer]
    before = copy.deepcopy(graph.state_dict())
    observer.high.fill_(1e6)
    assert calibrate_conditional_part(graph, all_pairs()) == 1
    assert same(graph.state_dict(), before)


def test_without_sites_or_a_table_nothing_is_calibrated():
    graph = prepared()
    assert calibrate_conditional_part(graph, finite_domain("timestep", {"timestep": TIMESTEPS.double()})) == 0
    assert calibrate_temporal_block(tfmq_fx.capture(small_denoiser(), batch())) == 0


def test_a_range_for_all_timesteps_sees_them_all_and_is_applied_before_the_next_site():
    graph = prepared()
    first, *others = block_sites(graph)
    shared = MinMaxObserver(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    setattr(graph, str(first.target), shared)
    first.args = first.args[:1]
    graph.recompile()
    assert calibrate_temporal_block(graph) == 1 + len(others)
    block, columns = find_temporal_block(graph), {"timestep": TIMESTEPS}
    (seen,) = evaluate_temporal_nodes(graph, block.nodes, [first.args[0]], columns)
    assert (float(shared.low), float(shared.high)) == (min(float(seen.min()), 0.0), float(seen.max()))
    scale, zero = shared.calculate_qparams()
    levels = ((seen / scale).round() + zero).clamp(0, 255)

    def quantized(node, args, value):
        if node is first:
            return (levels - zero) * scale
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module.dequantized() if hasattr(module, "dequantized") else value

    (behind,) = evaluate_temporal_nodes(graph, block.nodes, [others[0].args[0]], columns, hook=quantized)
    observer = graph.get_submodule(str(others[0].target))
    torch.testing.assert_close(observer.high, behind.amax(1).clamp_min(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(observer.low, behind.amin(1).clamp_max(0), rtol=1e-5, atol=1e-6)


def test_observers_of_layers_outside_that_read_the_block_are_left_to_the_batches():
    graph = prepared()
    block = find_temporal_block(graph)
    last = block.features[0]
    outside = MinMaxObserver(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    graph.add_submodule("outside", outside)
    with graph.graph.inserting_after(last):
        watched = graph.graph.call_module("outside", (last,))
    watched.meta.update(last.meta)
    last.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)
    graph.recompile()
    assert watched in find_temporal_block(graph) and watched not in block_sites(graph)
    assert calibrate_temporal_block(graph) == 3
    with pytest.raises(tfmq_fx.CalibrationError):
        outside.calculate_qparams()
