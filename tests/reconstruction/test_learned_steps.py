"""Step sizes of activations that learn behind the weights: what moves when, against what, and for how long."""

import pytest
import torch

import tfmq_fx
from tests.models import batch
from tests.reconstruction_cases import calibrated, interrupt_after, rec, same, state
from tfmq_fx import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, quantizers_of
from tfmq_fx.reconstruction import training
from tfmq_fx.reconstruction.acceptance import undo_if_worse
from tfmq_fx.reconstruction.unit_error import unit_error


def test_how_long_they_learn():
    config = ReconstructionConfig(learned_steps="after")
    assert config.step_iterations(20_000) == 5_000
    assert ReconstructionConfig(learned_steps="after", step_share=0.5).step_iterations(10_000) == 5_000
    assert ReconstructionConfig(learned_steps=True).step_iterations(20_000) == 0


def test_the_rounding_is_final_when_they_begin(monkeypatch):
    graph, seen = calibrated(), []

    def record(activations, loss, iterations, *rest, **options):
        weights = [q for q in quantizers_of(graph).values() if isinstance(q, AdaRoundQuantizer)]
        assert all(weight.soft is None for weight in weights)
        before = [weight.up.clone() for weight in weights]
        training.train_steps(activations, loss, iterations, *rest, **options)
        assert all(torch.equal(weight.up, up) for weight, up in zip(weights, before, strict=True))
        seen.append((len(activations), iterations))

    monkeypatch.setattr("tfmq_fx.reconstruction.unit.train_steps", record)
    monkeypatch.setattr("tfmq_fx.reconstruction.domain_training.train_steps", record)
    report = rec(graph, learned_steps="after", iterations=20, temporal_iterations=8)
    trained = [unit for unit in report.units if unit.iterations]
    assert len(seen) == len(trained) and all(count for count, _ in seen)
    assert {(unit.kind == "temporal", unit.iterations) for unit in trained} == {(True, 10), (False, 25)}
    assert {iterations for _, iterations in seen} == {2, 5}
    with torch.no_grad():
        assert torch.equal(graph(*batch()), tfmq_fx.convert(graph)(*batch()))


def test_no_share_leaves_the_ranges_of_the_learned_weights():
    one, other = calibrated(), calibrated()
    rec(one, granularity="none", learned_steps="after", step_share=0.0)
    rec(other, granularity="none")
    with torch.no_grad():
        torch.testing.assert_close(one(*batch()), other(*batch()))


def test_an_error_is_raised_to_the_power():
    output, target = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.zeros(2, 2)
    assert float(unit_error([output], [target], [1], [None])) == pytest.approx((1 + 4 + 0.25) / 2)
    assert float(unit_error([output], [target], [1], [None], 2.4)) == pytest.approx((1 + 2**2.4 + 0.5**2.4) / 2)


def test_steps_that_make_it_worse_are_undone():
    graph = calibrated()
    quantizers = [q for q in quantizers_of(graph).values() if hasattr(q, "calibrated_scale")][:2]
    before, errors = [q.scale.clone() for q in quantizers], iter([1.0, 2.0, 1.0, 0.5])

    def learn():
        for quantizer in quantizers:
            quantizer.scale = quantizer.scale * 2

    undo_if_worse(quantizers, learn, lambda: next(errors))
    assert all(torch.equal(q.scale, scale) for q, scale in zip(quantizers, before, strict=True))
    undo_if_worse(quantizers, learn, lambda: next(errors))
    assert all(torch.equal(q.scale, 2 * scale) for q, scale in zip(quantizers, before, strict=True))


def test_an_interrupt_among_the_steps_puts_everything_back(monkeypatch):
    graph = calibrated(temporal="shared")
    before = state(graph)
    interrupt_after(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        rec(graph, temporal="nearest", learned_steps="after", iterations=8, step_share=1.0)
    after = state(graph)
    assert all(torch.equal(after[n], before[n]) for n in after if n.endswith(".up"))
    assert all(getattr(q, "log_step", None) is None for q in quantizers_of(graph).values())


def test_it_goes_on_where_it_stopped(tmp_path):
    options = {"learned_steps": "after", "temporal": "blocks", "step_share": 0.5}
    whole, parts = calibrated(), calibrated()
    rec(whole, **options)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            rec(parts, directory=tmp_path, **options)
    parts = calibrated()
    assert rec(parts, directory=tmp_path, **options).resumed
    assert same(state(parts), state(whole))
