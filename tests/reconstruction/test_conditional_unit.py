"""Layers of the timestep and the conditioning: reconstructed over pairs of both."""

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel

import tfmq_fx
from tests.conditional_cases import BATCHES, CONDITIONS, captured, conditional_outputs, observers, prepared
from tests.lowering.test_stages import inputs
from tests.models import TIMESTEPS, PromptDenoiser, relative
from tests.reconstruction_cases import interrupt_after, same, state
from tfmq_fx import CaptureError, ConfigError, QuantizationConfig, ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, quantizers_of
from tfmq_fx.passes.analysis import conditioning_inputs, evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers
from tfmq_fx.temporal.domain import conditioned_domain
from tfmq_fx.temporal.inputs import collect_conditionings

SHORT = ReconstructionConfig(granularity="none", temporal_iterations=60)


def learned(graph, config=SHORT, batches=BATCHES, **options):
    report = tfmq_fx.reconstruct(graph, batches, config, progress=False, **options)
    return {unit.kind: unit for unit in report.units}


def inside(graph):
    """Names of the fake quantizers of the conditional part."""
    path = find_temporal_block(graph, finite=CONDITIONS)
    inner = set(find_temporal_block(graph).nodes)
    return {str(node.target) for node in path.nodes if node.op == "call_module" and node not in inner}


@pytest.mark.parametrize("temporal", ["fsc", "shared", "cache"])
@pytest.mark.parametrize("learned_steps", [False, True])
def test_reconstruction_brings_the_conditional_outputs_closer_to_float(temporal, learned_steps):
    graph = prepared(temporal=temporal)
    model = conditional_outputs(captured())
    nearest = relative(conditional_outputs(tfmq_fx.convert(graph).graph_module), model)
    config = ReconstructionConfig(granularity="none", temporal_iterations=150, learned_steps=learned_steps)
    unit = learned(graph, config)["conditional"]
    assert unit.after < 0.8 * unit.before and unit.reason == ""
    # The layers of the prompt alone that lead to nothing else learn with it.
    assert unit.weights == 6 * 16 + 2 * 8 * 16
    ours = conditional_outputs(tfmq_fx.convert(graph).graph_module)
    assert relative(ours, model) < 0.8 * nearest
    assert float((ours - model).square().sum()) / len(ours) == pytest.approx(unit.after, rel=1e-2)


def test_nothing_but_the_time_path_is_touched():
    graph = prepared()
    learned(graph, ReconstructionConfig(granularity="none", temporal="nearest"))
    before = state(graph)
    names = inside(graph) | {
        str(n.target) for n in find_temporal_block(graph).nodes if n.op == "call_module"
    }  # fmt: skip
    learned(graph)
    changed = {name.rpartition(".")[0] for name, value in state(graph).items() if not torch.equal(value, before[name])}
    assert changed & inside(graph) and changed <= names


def test_the_ranges_at_the_end_are_those_of_the_learned_weights():
    graph = prepared()
    learned(graph)
    before = state(graph)
    again = tfmq_fx.reconstruct(
        graph, BATCHES, ReconstructionConfig(granularity="none", temporal="nearest"), progress=False
    )
    assert {unit.kind for unit in again.units} == {"temporal", "conditional"}
    assert all(unit.iterations == 0 and "nearest" in unit.reason for unit in again.units)
    assert not same(state(graph), before)  # rounded to nearest again
    program = tfmq_fx.convert(graph)
    assert len(find_grouped_quantizers(program.graph_module)) == 1


def test_the_rest_is_reconstructed_behind_it():
    graph = prepared()
    config = ReconstructionConfig(iterations=4, temporal_iterations=8, batch_size=8)
    report = tfmq_fx.reconstruct(graph, BATCHES, config, progress=False)
    names = [unit.name for unit in report.units]
    assert names[:2] == ["temporal block", "conditional part"] and {"down", "up", "key", "value"} <= set(names)
    assert "pool" not in names and "down.embed" not in names
    blocks = prepared()
    report = tfmq_fx.reconstruct(
        blocks, BATCHES, ReconstructionConfig(iterations=4, temporal="blocks", batch_size=8), progress=False
    )
    assert not {"temporal", "conditional"} & {unit.kind for unit in report.units}
    assert sum(q.up.numel() for q in quantizers_of(graph).values() if isinstance(q, AdaRoundQuantizer)) == sum(
        unit.weights for unit in report.units
    )


def test_without_conditionings_it_stays_rounded_to_nearest_with_a_reason():
    unit = learned(prepared(), batches=[])["conditional"]
    assert unit.iterations == 0 and "pass batches" in unit.reason
    unit = learned(prepared(weight_bits=32))["conditional"]
    assert unit.iterations == 0 and unit.reason == "its weights are not quantized"


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    whole, parts = prepared(), prepared()
    learned(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)  # the temporal block is done, the conditional part is not
        with pytest.raises(KeyboardInterrupt):
            learned(parts, directory=tmp_path)
    resumed = tfmq_fx.reconstruct(parts, BATCHES, SHORT, directory=tmp_path, progress=False)
    assert resumed.resumed == 1
    assert same(state(parts), state(whole))
    again = prepared()
    assert tfmq_fx.reconstruct(again, BATCHES, SHORT, directory=tmp_path, progress=False).resumed == 2
    assert relative(conditional_outputs(again), conditional_outputs(whole)) < 1e-5


class ScalarTimestep(PromptDenoiser):
    """One timestep for the whole batch, 0-dim."""

    def forward(self, sample, timestep, tokens, pooled):
        return super().forward(sample, timestep.reshape(-1).expand(sample.shape[0]), tokens, pooled)


def test_a_timestep_for_the_whole_batch_gives_the_same():
    scalar = [(sample[:3], timestep[n % 5], tokens[:3], pooled[:3])
              for n, (sample, timestep, tokens, pooled) in enumerate(BATCHES)]  # fmt: skip
    torch.manual_seed(0)
    graph_module = tfmq_fx.capture(ScalarTimestep().eval(), scalar[0])
    graph = tfmq_fx.prepare(graph_module, QuantizationConfig(weight_bits=4), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, scalar, progress=False)
    (ours,), (theirs,) = observers(graph), observers(prepared())
    # The prompt's own range is smoothed over other batches.
    torch.testing.assert_close(ours.high, theirs.high, rtol=1e-2, atol=1e-3)
    unit = learned(graph, batches=scalar)["conditional"]
    assert unit.reason == "" and unit.after < 0.8 * unit.before
    program = tfmq_fx.convert(graph)
    with torch.no_grad():
        assert relative(program(*scalar[2]), graph_module(*scalar[2])) < 0.2


class WhollyConditional(PromptDenoiser):
    """A guidance embedding is added to the sinusoid, as in LCM: no layer depends on the timestep alone."""

    def forward(self, sample, timestep, tokens, pooled):
        return self.denoise(sample, self.time.two(torch.sin(timestep[:, None] / 500 + self.pool(pooled))))


def test_a_wholly_conditional_time_path_needs_no_temporal_block():
    graph_module = captured(WhollyConditional)
    assert "wholly conditional" in find_temporal_block(graph_module).reason
    with pytest.raises(ConfigError, match=r"layers of 'timestep' and 'pooled', so its timesteps are needed"):
        tfmq_fx.prepare(graph_module)
    graph = tfmq_fx.prepare(graph_module, QuantizationConfig(weight_bits=4), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    assert len(observers(graph)) == 2
    report = tfmq_fx.reconstruct(graph, BATCHES, SHORT, progress=False)
    (unit,) = report.units
    assert unit.kind == "conditional" and unit.after < unit.before
    program = tfmq_fx.convert(graph)
    with torch.no_grad():
        assert relative(program(*inputs(seed=9)), graph_module(*inputs(seed=9))) < 0.2
    assert program.timesteps.tolist() == TIMESTEPS.tolist()
    with pytest.raises(CaptureError, match="no temporal block"):
        tfmq_fx.prepare(graph_module, timestep="moment")


# -- a model of diffusers ---------------------------------------------------------------


@functools.cache
def sdxl():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    ).eval()
    torch.manual_seed(1)
    prompts, texts = torch.randn(3, 5, 12), torch.randn(3, 10)

    def given(seed, size=4):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.arange(size) % 3
        return {
            "sample": torch.randn(size, 4, 8, 8, generator=generator),
            "timestep": TIMESTEPS[torch.randint(len(TIMESTEPS), (size,), generator=generator)],
            "encoder_hidden_states": prompts[chosen],
            "added_cond_kwargs": {
                "text_embeds": texts[chosen],
                "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(size, 1),
            },
        }

    return model, given


def test_sdxl_from_end_to_end(tmp_path):
    model, given = sdxl()
    batches = [given(seed) for seed in range(4)]
    config = QuantizationConfig(
        weight_bits=4, reconstruction=ReconstructionConfig(granularity="none", temporal_iterations=60)
    )
    graph_module = tfmq_fx.capture(model, example_kwargs=batches[0])
    samples, wide = {"sample"}, ("added_cond_kwargs_text_embeds", "added_cond_kwargs_time_ids")
    assert conditioning_inputs(graph_module, samples) == wide
    graph = tfmq_fx.prepare(graph_module, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, batches, progress=False)
    # One SiLU for all embedding layers; those of the prompt alone see the same at every timestep.
    assert len(observers(graph)) == 1
    nearest = tfmq_fx.convert(graph)
    report = tfmq_fx.reconstruct(graph, batches, progress=False)
    unit = next(unit for unit in report.units if unit.kind == "conditional")
    assert unit.after < 0.8 * unit.before
    program = tfmq_fx.convert(graph)
    path = find_temporal_block(graph_module, finite=wide)
    outputs = len(path.embedding_layers)
    assert outputs == 8
    errors = {}
    with torch.no_grad():
        for name, module in (("nearest", nearest.graph_module), ("learned", program.graph_module)):
            found = find_temporal_block(module, finite=wide)
            conditionings = collect_conditionings(graph_module, wide, batches[:1])
            columns = conditioned_domain("timestep", TIMESTEPS.double(), conditionings).columns()
            ours, theirs = (
                torch.cat(evaluate_temporal_nodes(m, p.nodes, [g.linear for g in p.embedding_layers], columns), 1)
                for m, p in ((module, found), (graph_module, path))
            )
            errors[name] = relative(ours, theirs)
    assert errors["learned"] < 0.8 * errors["nearest"]
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "sdxl"))
    fresh = given(9)
    denoiser = tfmq_fx.lower(loaded, backend="reference")
    assert relative(denoiser(**fresh).sample, program(**fresh).sample) < 0.02
    with torch.no_grad():
        assert relative(program(**fresh).sample, model(**fresh).sample) < 0.3
    assert f"and {outputs} on timestep and them" in denoiser.report.conditioning
    assert f"{outputs} with parameters per timestep" in denoiser.report.conditioning
