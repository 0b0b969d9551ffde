"""What the sample does not reach is found, cut out, and computed once per prompt, or per timestep and prompt."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, PromptDenoiser, SmallDenoiser, batch, relative, small_denoiser
from tests.processor import on_integer_kernels
from tfmq_fx._torch.graphs import output_structure
from tfmq_fx.lowering.plan import folded_graph
from tfmq_fx.lowering.run.staged import Reused, StagedProgram, stage_inputs
from tfmq_fx.lowering.stages import Layout, split_stages
from tfmq_fx.lowering.time_path import cut_time_path
from tfmq_fx.passes.analysis import find_conditional_part

TOKENS, POOLED = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(7)), torch.linspace(-1, 1, 18).view(3, 6)


def inputs(prompts=(0, 1, 2, 0), timesteps=(0, 500, 900, 0), seed=1):
    sample = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    chosen = list(prompts)
    return sample, torch.tensor(timesteps), TOKENS[chosen], POOLED[chosen]


def prompted(**changes):
    torch.manual_seed(0)
    # One range: where oneDNN's kernels run, programs with ranges by timestep have no stages.
    config = tfmq_fx.QuantizationConfig(**{"activation_groups": 1, **changes})
    batches = [inputs((0, 1, 2, 1, 0), TIMESTEPS[n : n + 5].tolist(), seed=n) for n in range(6)]
    return tfmq_fx.quantize(PromptDenoiser().eval(), config, batches, timesteps=TIMESTEPS, progress=False)


@pytest.fixture(scope="module")
def program():
    return prompted()


def parted(program):
    """The graph that is compiled, cut off the temporal program, and its conditional part."""
    path = cut_time_path(program, folded_graph(program))
    features = [entry.name for entry in path.temporal.inputs]
    return path, lambda samples: find_conditional_part(path.rest, samples, features=features)


def cut(program):
    path, part = parted(program)
    return program.graph_module, split_stages(path.rest, part({"sample"}), path.first)


def staged(program):
    graph, stages = cut(program)
    runs = [stages.runs.get(number, graph_module) for number, graph_module in enumerate(stages.graph_modules)]
    return graph, StagedProgram(stages.layout, output_structure(graph.graph), runs, own=tuple(stages.runs))


def test_the_part_says_which_case_a_model_is(program):
    _, parts = parted(program)
    part = parts({"sample"})
    assert part.conditions == ("tokens", "pooled") and part.layers == (3, 2)
    assert str(part) == ("3 layers depend on (tokens, pooled) alone and 2 on timestep and them, never on the sample")
    everything = parts({"sample", "tokens", "pooled"})
    assert everything.layers == (0, 0) and not everything.conditions
    assert str(everything) == "no layer depends on the conditioning without the sample"


def test_a_model_without_conditions_stays_whole():
    program = tfmq_fx.quantize(small_denoiser(), None, [batch(16)], timesteps=TIMESTEPS, progress=False)
    path, part = parted(program)
    assert split_stages(path.rest, part({"sample"})) is None
    assert len(split_stages(path.rest, part({"sample"}), path.first).layout.stages) == 2


@pytest.mark.parametrize("changes", [{}, {"temporal": "shared"}, {"weight_bits": 4, "temporal": "cache"}])
def test_the_stages_are_the_program(changes):
    graph, run = staged(prompted(**changes))
    assert len(run.layout.stages) == 4 and all(stage.by_row for stage in run.layout.stages)
    with torch.no_grad():
        for given in (inputs(), inputs((1,), (500,)), inputs((2, 2), (0, 900)), inputs(seed=5)):
            assert relative(run(*given), graph(*given)) < 1e-5
    assert run.runs[0].computed == len(set(inputs()[1].tolist()) | {500, 0, 900} | set(inputs(seed=5)[1].tolist()))


def test_a_prompt_is_computed_once(program):
    graph, run = staged(program)
    prompts, both = run.runs[1:3]
    with torch.no_grad():
        run(*inputs((0, 1, 0, 1), (900, 900, 900, 900)))
        assert (prompts.computed, both.computed) == (2, 2)
        run(*inputs((0, 1, 0, 1), (500, 500, 500, 500), seed=2))
        assert (prompts.computed, both.computed) == (2, 4)
        again = inputs((1, 1, 0), (500, 900, 900), seed=3)
        assert relative(run(*again), graph(*again)) < 1e-5
        assert (prompts.computed, both.computed) == (2, 4)
        run(*inputs((2,), (500,)))
        assert (prompts.computed, both.computed) == (3, 5)


def test_a_prompt_that_was_changed_in_place_is_another(program):
    graph, run = staged(program)
    sample, timestep, tokens, pooled = (value.clone() for value in inputs())
    with torch.no_grad():
        run(sample, timestep, tokens, pooled)
        tokens += 0.5
        pooled[0] = 3.0
        assert relative(run(sample, timestep, tokens, pooled), graph(sample, timestep, tokens, pooled)) < 1e-5


def test_the_least_recently_used_gives_way(program):
    _, stages = cut(program)
    stage, run = stages.layout.stages[1], stages.graph_modules[1]
    given = stage_inputs(stages, inputs(), {})[1]
    ask = [[value[n : n + 1] for value in given] for n in range(3)]
    size = sum(value.numel() * 4 for value in run(*ask[0]))
    reused = Reused(stage, run, most_bytes=2 * size)
    for n in (0, 1, 0, 2, 0):
        reused(*ask[n])
    assert reused.computed == 3
    reused(*ask[1])
    assert reused.computed == 4


def test_threads_that_ask_for_the_same_compute_it_once(program):
    _, stages = cut(program)
    given = stage_inputs(stages, inputs((1,), (500,)), {})[1]

    def run(*values):
        time.sleep(0.05)  # long enough for the other threads to ask
        return stages.graph_modules[1](*values)

    reused = Reused(stages.layout.stages[1], run)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: reused(*given), range(4)))
    assert reused.computed == 1
    assert all(torch.equal(one, other) for result in results for one, other in zip(results[0], result, strict=True))


def test_a_fixed_batch_is_kept_as_one():
    torch.manual_seed(0)
    model = PromptDenoiser().eval()
    captured = tfmq_fx.capture(model, inputs(), dynamic_batch=False)
    prepared = tfmq_fx.prepare(captured, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [inputs()], progress=False)
    graph, run = staged(tfmq_fx.convert(prepared))
    assert not any(stage.by_row for stage in run.layout.stages[1:])
    with torch.no_grad():
        for seed in (1, 2):
            given = inputs(seed=seed)
            assert relative(run(*given), graph(*given)) < 1e-5
    assert [reused.computed for reused in run.runs[1:3]] == [1, 1]


def test_compiled(program):
    denoiser = tfmq_fx.lower(program)
    assert "3 layers depend on (tokens, pooled) alone" in denoiser.report.conditioning
    assert denoiser.report.conditioning.endswith("reused from call to call")
    assert on_integer_kernels(denoiser.report, 8)
    for given in (inputs(), inputs((2,), (900,)), inputs((1, 0, 1), (0, 0, 500))):
        assert relative(denoiser(*given), program(*given)) < 0.02
    assert tfmq_fx.lower(program, reuse=False, backend="reference").report.conditioning.endswith(
        "2 with parameters per timestep"
    )


def test_the_layout_goes_through_json(program):
    _, stages = cut(program)
    assert Layout.from_dict(json.loads(json.dumps(stages.layout.to_dict()))) == stages.layout


def test_a_package_reuses_what_it_computed_for_a_prompt(program, tmp_path):
    path = tmp_path / "prompted.pt2"
    lowered = tfmq_fx.lower(program, "aot", path=path)
    assert lowered.report.conditioning.endswith("reused from call to call")
    assert on_integer_kernels(lowered.report, 8)
    loaded = tfmq_fx.load_denoiser(path)
    for given in (inputs(), inputs((2,), (900,)), inputs((1, 0, 1), (0, 0, 500))):
        assert relative(loaded(*given), program(*given)) < 0.02
    assert [reused.computed for reused in loaded._compiled[0].runs[1:3]] == [3, 4]


class Conditioned(torch.nn.Module):
    """Two convs, and between them what depends on the timestep and on a prompt."""

    def __init__(self):
        super().__init__()
        self.time, self.pool = small_denoiser().time, torch.nn.Linear(6, 16)
        self.enter, self.leave = torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, sample, timestep, pooled):
        emb = self.time(timestep) + self.pool(pooled)
        return self.leave(torch.nn.functional.silu(self.enter(sample) + emb[:, :, None, None]))


def test_a_package_without_reuse_is_one_graph(tmp_path):
    torch.manual_seed(0)
    sample, timestep, _, pooled = inputs()
    given = (sample, timestep, pooled)
    program = tfmq_fx.quantize(Conditioned().eval(), None, [given], timesteps=TIMESTEPS, progress=False)
    _, stages = cut(program)
    assert stages is not None
    whole = tfmq_fx.lower(program, "aot", path=tmp_path / "whole.pt2", reuse=False)
    assert not whole.report.conditioning.endswith("reused from call to call")
    assert relative(tfmq_fx.load_denoiser(tmp_path / "whole.pt2")(*given), program(*given)) < 0.02


class ReturnsFeatures(SmallDenoiser):
    """What it computes of the timestep alone is a result too."""

    def forward(self, sample, timestep):
        emb = self.time(timestep)
        return self.denoise(sample, emb), emb


@pytest.mark.parametrize("backend", ["reference", "inductor"])
def test_a_caller_may_write_to_every_result(backend):
    torch.manual_seed(0)
    calibration = [batch(8)]
    program = tfmq_fx.quantize(ReturnsFeatures().eval(), None, calibration, timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program, backend)
    x, _ = batch(1, seed=5)
    expected = [value.clone() for value in denoiser(x, 100)]
    for value in denoiser(x, 100):
        value.zero_()
    assert all(torch.equal(one, other) for one, other in zip(denoiser(x, 100), expected, strict=True))


class Overwriting(SmallDenoiser):
    """It changes what it is given, which a program cannot do without."""

    def forward(self, sample, timestep):
        return super().forward(sample.clamp_(-0.5, 0.5), timestep)


def test_a_write_is_not_lost_between_stages():
    torch.manual_seed(0)
    model = Overwriting().eval()
    program = tfmq_fx.quantize(model, None, [batch(8)], timesteps=TIMESTEPS, progress=False)
    with pytest.raises(tfmq_fx.LoweringError, match=r"writes into memory that others read.* tabulate=False"):
        tfmq_fx.lower(program, "reference")
    denoiser = tfmq_fx.lower(program, "reference", tabulate=False)
    x, t = batch(3)
    assert relative(denoiser(x.clone(), t), model(x.clone(), t)) < 0.1


class Selecting(SmallDenoiser):
    """Adds the mean of the tokens that a mask keeps: how many there are is known only when it runs."""

    def forward(self, sample, timestep, mask, tokens):
        kept = tokens.index_select(0, torch.nonzero(mask).flatten())
        return super().forward(sample, timestep) + torch.cat([kept, kept.new_zeros(5 - kept.shape[0])]).sum()


def test_sizes_that_depend_on_data_are_computed_in_the_stage_that_reads_them():
    torch.manual_seed(0)
    model = Selecting().eval()
    given = [(*batch(2, seed), torch.tensor([1, 1, 0, 1, 0]), torch.randn(5)) for seed in range(4)]
    program = tfmq_fx.quantize(model, None, given, timesteps=TIMESTEPS, dynamic_batch=False, progress=False)
    denoiser = tfmq_fx.lower(program, "reference")
    for mask in ([1, 1, 0, 1, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]):
        call = (*given[0][:2], torch.tensor(mask), torch.randn(5))
        with torch.no_grad():
            assert relative(denoiser(*call), model(*call)) < 0.1
