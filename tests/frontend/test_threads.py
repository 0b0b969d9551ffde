"""Stages in several threads at once: as in one thread, and the process goes on as before."""

import copy
import os
import threading

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import QuantizationConfig, ReconstructionConfig
from tfmq_fx._torch.exclusion import exclusive
from tfmq_fx.passes import PropagateValues

# Made once: their seed is the one generator of all threads.
MODEL, BATCH = small_denoiser(), batch()
TRAINED = QuantizationConfig(weight_bits=4, reconstruction=ReconstructionConfig(iterations=2, temporal_iterations=2))
OUTSIDE = torch.tensor([3, 7, 11, 13])


def quantized(config=None):
    return tfmq_fx.quantize(MODEL, config, [BATCH], timesteps=TIMESTEPS, progress=False)


@pytest.fixture(scope="module")
def program():
    return quantized()


@pytest.fixture(scope="module")
def artefact(program, tmp_path_factory):
    return tfmq_fx.save(program, tmp_path_factory.mktemp("threads") / "artefact")


def in_threads(*functions):
    """What each of the functions returns, called in threads of their own that begin together."""
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def run(number):
        barrier.wait()
        try:
            results[number] = functions[number]()
        except Exception as error:  # raised below, in the thread of the test
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def captured(program, artefact, path):
    return tfmq_fx.capture(MODEL, BATCH)


def prepared(program, artefact, path):
    graph = tfmq_fx.prepare(tfmq_fx.capture(MODEL, BATCH), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, [BATCH], progress=False)
    return tfmq_fx.convert(graph)


def reconstructed(program, artefact, path):
    return quantized(TRAINED)


def saved(program, artefact, path):
    return tfmq_fx.load(tfmq_fx.save(program, path / f"artefact-{threading.get_ident()}"))


def loaded(program, artefact, path):
    return tfmq_fx.load(artefact)


def lowered(program, artefact, path):
    return tfmq_fx.lower(program, "reference")


def extended(program, artefact, path):
    return tfmq_fx.add_timesteps(program, OUTSIDE)


def rewritten(program, artefact, path):
    graph = copy.deepcopy(program.graph_module)
    PropagateValues()(graph)
    return graph


@pytest.mark.parametrize("stage", [captured, prepared, reconstructed, saved, loaded, lowered, extended, rewritten])
def test_a_stage_in_two_threads(stage, program, artefact, tmp_path):
    wanted = stage(program, artefact, tmp_path)(*BATCH)
    for found in in_threads(*[lambda: stage(program, artefact, tmp_path)] * 2):
        assert torch.equal(found(*BATCH), wanted)
    assert torch.equal(quantized()(*BATCH), program(*BATCH))


def test_calls_beside_stages(program):
    denoiser, own = tfmq_fx.lower(program, "reference"), copy.deepcopy(program)
    x = BATCH[0]
    wanted = denoiser(x[:4], OUTSIDE), program(x[:4], OUTSIDE)

    def denoise():
        return [denoiser(x[:1], torch.tensor([value])) for value in range(100)][3:4]

    called, extended_calls, _ = in_threads(
        denoise, lambda: [own(x[:4], OUTSIDE + n) for n in range(5)], lambda: tfmq_fx.lower(quantized(), "reference")
    )
    assert torch.allclose(called[0], wanted[0][:1], atol=1e-5)
    assert torch.equal(extended_calls[0], wanted[1])


def test_calls_wait_for_no_stage(program):
    denoiser = tfmq_fx.lower(program, "reference")
    x, t = BATCH
    with exclusive():  # a stage of this thread
        outputs = in_threads(lambda: denoiser(x, t), lambda: program(x, t))
    assert torch.equal(outputs[0], outputs[1])


def test_a_stage_may_call_stages_while_it_reads_batches(program):
    def batches():
        tfmq_fx.lower(program, "reference")
        yield BATCH

    found = tfmq_fx.quantize(MODEL, None, batches(), timesteps=TIMESTEPS, progress=False)
    assert torch.equal(found(*BATCH), program(*BATCH))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_waits_for_no_thread_of_its_parent():
    inside, done = threading.Event(), threading.Event()

    def hold():
        with exclusive():
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        threading.Timer(30, lambda: os._exit(1)).start()
        with exclusive():
            os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_the_default_dtype_is_as_it_was_behind_calls_of_several_threads(program):
    denoiser = tfmq_fx.lower(program, "reference")
    x, t = BATCH
    wanted = denoiser(x, t)
    torch.set_default_dtype(torch.float64)
    try:
        outputs = in_threads(
            *[lambda: [denoiser(x, t) for _ in range(20)]] * 3, lambda: [lowered(program, "", "")(x, t)]
        )
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, wanted) for values in outputs for value in values)
