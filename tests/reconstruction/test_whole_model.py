"""All weights together, from where they were rounded to, against the float model's prediction."""

import pytest
import torch

from tests.models import batch, relative, small_denoiser
from tests.reconstruction_cases import SCALAR_BATCHES, calibrated, rec, same, state
from tfmq_fx import ReconstructionError
from tfmq_fx.reconstruction import whole_model
from tfmq_fx.reconstruction.annealed_adam import AnnealedAdam

FOUR = {"activation_bits": 4, "low_rank": 2}
METHODS = ["adapters", "distillation"]
TRAINED = {"iterations": 30, "batch_size": 16, "step_learning_rate": 3e-3}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_model_learns_on_top_of_gptq(method):
    graph = calibrated(**FOUR)
    rate = {"adapters": 1e-2, "distillation": 3e-3}[method]
    whole = rec(graph, **{**TRAINED, "method": method, "iterations": 200, "learning_rate": rate}).units[-1]
    assert (whole.name, whole.kind, whole.iterations) == ("whole model", "whole", 200)
    assert whole.after < 0.95 * whole.before and 0 < whole.changed < 0.7
    data = batch(24, seed=3)
    other = calibrated(**FOUR)
    rec(other, method="gptq")
    with torch.no_grad():
        assert relative(graph(*data), small_denoiser()(*data)) < relative(other(*data), small_denoiser()(*data))


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_same_each_time_and_a_finished_one_is_taken_up(method, tmp_path):
    one, two, three = (calibrated(**FOUR) for _ in range(3))
    rec(one, **TRAINED, method=method, directory=tmp_path)
    rec(two, **TRAINED, method=method)
    rec(three, **TRAINED, method=method, directory=tmp_path)
    assert same(state(one), state(two)) and same(state(one), state(three))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_in_its_middle(method, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_model, "EVERY", 10)
    whole, again = calibrated(**FOUR), calibrated(**FOUR)
    rec(whole, **TRAINED, method=method)
    error, calls = whole_model._Teacher.error, []

    def interrupted(self, *arguments):
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) == 26:
            raise Interrupted
        return error(self, *arguments)

    monkeypatch.setattr(whole_model._Teacher, "error", interrupted)
    with pytest.raises(Interrupted):
        rec(calibrated(**FOUR), **TRAINED, method=method, directory=tmp_path)
    assert [path.name for path in tmp_path.glob("training-*")]
    rec(again, **TRAINED, method=method, directory=tmp_path)
    # 25 steps, then those behind the twentieth.
    assert sum(calls) == 26 + 10
    assert same(state(whole), state(again)) and not list(tmp_path.glob("training-*"))


def test_a_damaged_state_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_model, "EVERY", 10)
    graph = calibrated(**FOUR)
    monkeypatch.setattr(whole_model.TrainingState, "remove", lambda self: None)
    rec(graph, **TRAINED, method="distillation", directory=tmp_path)
    (kept,) = tmp_path.glob("training-*")
    kept.write_bytes(b"\0" * 100)
    (tmp_path / kept.name.replace("training", "unit")).unlink()
    with pytest.raises(ReconstructionError, match="remove that file to start the training again"):
        rec(calibrated(**FOUR), **TRAINED, method="distillation", directory=tmp_path)


def test_a_compiled_step_learns_what_an_eager_one_does(monkeypatch):
    step, compile_step, losses, compiled = AnnealedAdam.step, whole_model.compiled_if_possible, [], []

    def kept(function, arguments):
        compiled.append(compile_step(function, arguments))
        return compiled[0]

    monkeypatch.setattr(AnnealedAdam, "step", lambda self, loss: losses.append(loss.item()) or step(self, loss))
    monkeypatch.setattr(whole_model, "compiled_if_possible", kept)
    for least in (6, 5):
        monkeypatch.setattr(whole_model, "WORTH_COMPILING", least)
        rec(calibrated(**FOUR), **{**TRAINED, "iterations": 5, "method": "distillation"})
    assert len(compiled) == 1 and not isinstance(compiled[0], torch.fx.GraphModule)
    assert losses[5] == pytest.approx(losses[0], rel=1e-3) and len(set(losses[:5])) == 5
    assert losses[5:] == pytest.approx(losses[:5], rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_batches_that_do_not_mix(method):
    graph = calibrated(scalar=True, **FOUR)
    whole = rec(graph, SCALAR_BATCHES, **TRAINED, method=method).units[-1]
    assert whole.kind == "whole" and whole.after <= whole.before


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_leaves_the_rounding(method, monkeypatch):
    monkeypatch.setattr(whole_model.math, "isfinite", lambda value: False)
    graph = calibrated(**FOUR)
    with pytest.raises(ReconstructionError, match="NaN or infinite"):
        rec(graph, **TRAINED, method=method)
    data = batch(8, seed=3)
    assert torch.isfinite(graph(*data)).all()
