"""Layers of the timestep and the conditioning: parameters per timestep, calibrated and reconstructed over pairs."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from tfmq_fx.passes import UseOneTimestepGroup
from tfmq_fx.passes.analysis import conditioning_inputs, evaluate_temporal_nodes, find_temporal_block, layer_name
from tfmq_fx.passes.group_timesteps import EACH_TIMESTEP
from tfmq_fx.passes.predicates import is_weighted
from tfmq_fx.passes.use_one_timestep_group import find_grouped_quantizers
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, ClassDenoiser, PromptDenoiser, batch, relative
from tests.reconstruction_cases import interrupt_after, same, state
from tests.test_stages import inputs
from tfmq_fx import CaptureError, ConfigError, QuantizationConfig, ReconstructionConfig, TFMQQuantizer
from tfmq_fx.conditionings import Conditionings
from tfmq_fx.convert import program_from_graph
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, quantizers_of
from tfmq_fx.lowering.lower import _apart, _final_graph
from tfmq_fx.observers import ConditionalObserver

BATCHES = [inputs((0, 1, 2, 1, 0), TIMESTEPS[n : n + 5].tolist(), seed=n) for n in range(6)]
CONDITIONS = ("pooled",)


@functools.cache
def captured(model=PromptDenoiser, **options):
    torch.manual_seed(0)
    return tfmq_fx.capture(model().eval(), BATCHES[0], **options)


def prepared(batches=BATCHES, **config):
    graph = tfmq_fx.prepare(captured(), QuantizationConfig(**{"weight_bits": 4, **config}), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, batches, progress=False)
    return graph


def all_pairs():
    conditionings = Conditionings(CONDITIONS)
    for given in BATCHES:
        conditionings.add(captured(), given)
    assert len(conditionings.rows) == 3
    return conditionings.with_timesteps(TIMESTEPS.double(), "timestep")


def conditional_outputs(graph, pairs=None):
    """What the embedding layers give for every timestep and prompt, side by side."""
    path = find_temporal_block(graph, finite=CONDITIONS)
    columns = (pairs or all_pairs()).columns()
    outputs = [layer.linear for layer in path.embedding_layers]
    assert len(outputs) == 2
    with torch.no_grad():
        return torch.cat(evaluate_temporal_nodes(graph, path.nodes, outputs, columns), 1)


def observers(graph):
    return [module for module in graph.modules() if isinstance(module, ConditionalObserver)]


# -- what is found --------------------------------------------------------------------


def test_the_conditioning_is_what_meets_the_timestep_and_never_the_sample():
    assert conditioning_inputs(captured(), {"sample"}) == CONDITIONS
    assert conditioning_inputs(captured(), {"sample", "pooled"}) == ()
    assert conditioning_inputs(captured(), set()) == ()
    path = find_temporal_block(captured(), finite=CONDITIONS)
    assert [layer.fqn for layer in path.embedding_layers] == ["down.embed", "up.embed"]
    assert {"time.one", "time.two"} < {str(node.args[1].target).removesuffix(".weight") for node in path.time_embedding}


def test_pairs_have_every_timestep_and_go_round_the_conditionings():
    pairs = all_pairs()
    assert len(pairs) == 30 and pairs.columns()["pooled"].shape == (30, 6)
    conditionings = Conditionings(("a",), [(torch.tensor([float(n)]),) for n in range(5)])
    few = conditionings.with_timesteps(torch.arange(10.0), "t", most=20)
    assert few.numbers.bincount().tolist() == [2] * 10 and few.chosen.bincount().tolist() == [4] * 5
    assert len(conditionings.with_timesteps(torch.arange(10.0), "t", most=3)) == 10
    sampled = few.sampled(7, seed=0)
    assert len(sampled) == 7 and bool((sampled.numbers.diff() >= 0).all())
    assert torch.equal(sampled.columns()["a"][:, 0], sampled.chosen.float())


# -- parameters per timestep ------------------------------------------------------------


def test_each_timestep_has_the_range_of_all_prompts():
    graph = prepared()
    (observer,) = observers(graph)  # both layers read one SiLU
    assert bool(observer.seen.all()) and len(observer.seen) == len(TIMESTEPS)
    program = tfmq_fx.convert(graph)
    quantizers = find_grouped_quantizers(program.graph_module, (EACH_TIMESTEP,))
    assert len(quantizers) == 1
    path = find_temporal_block(program.graph_module, finite=CONDITIONS)
    pairs = all_pairs()
    with torch.no_grad():
        (seen,) = evaluate_temporal_nodes(
            program.graph_module, path.nodes, [quantizers[0].args[0]], pairs.columns()
        )  # fmt: skip
    for row in range(len(TIMESTEPS)):
        own = seen[pairs.numbers == row]
        assert float(observer.low[row]) == pytest.approx(min(0.0, float(own.min())), abs=1e-5)
        assert float(observer.high[row]) == pytest.approx(float(own.max()), rel=1e-4)
    assert len(set(observer.high.tolist())) == len(TIMESTEPS)


def test_what_stands_before_keeps_its_calibrated_range():
    """Running over the pairs leaves no trace in observers with one range for all."""
    scales = {}
    for temporal in ("fsc", "shared"):
        graph = prepared(temporal=temporal)
        pool = next(node for node in graph.graph.nodes if layer_name(node) == "pool" and is_weighted(node))
        observer = graph.get_submodule(str(pool.args[0].target))
        assert int(observer.batches) == len(BATCHES)
        scales[temporal] = observer.calculate_qparams()[0]
    assert torch.equal(scales["fsc"], scales["shared"])


def test_the_order_of_batches_and_the_sample_do_not_matter():
    reference = observers(prepared())[0]
    loud = [(100 * sample, *rest) for sample, *rest in reversed(BATCHES)]
    other = observers(prepared(loud))[0]
    torch.testing.assert_close(other.high, reference.high, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_ranges_per_timestep_are_better_than_one(bits):
    model = conditional_outputs(captured())
    errors = {}
    for temporal in ("fsc", "cache", "shared"):
        graph = prepared(temporal=temporal, weight_bits=32, activation_bits=bits)
        errors[temporal] = relative(conditional_outputs(tfmq_fx.convert(graph).graph_module), model)
    assert errors["fsc"] < errors["shared"]
    assert errors["cache"] < errors["shared"]


@pytest.mark.parametrize("temporal", ["shared", "float"])
def test_one_range_for_all_timesteps_where_it_is_asked_for(temporal):
    graph = prepared(temporal=temporal)
    assert not observers(graph)
    assert not find_grouped_quantizers(tfmq_fx.convert(graph).graph_module)


def test_other_groups_of_timesteps_stay_as_they_are():
    program = tfmq_fx.convert(prepared(activation_groups=2))
    both = {name: len(find_grouped_quantizers(program.graph_module, (name,))) for name in
            ("timestep_groups", EACH_TIMESTEP)}  # fmt: skip
    assert both[EACH_TIMESTEP] == 1 and both["timestep_groups"] > 3
    given = inputs()
    apart = torch.cat([program(*(value[n : n + 1] for value in given)) for n in range(4)])
    assert relative(program(*given), apart) < 1e-5


def test_without_our_calibration_a_timestep_that_was_not_seen_takes_the_nearest():
    graph = prepare_pt2e(copy.deepcopy(captured()), TFMQQuantizer(QuantizationConfig(), timesteps=TIMESTEPS))
    graph(*inputs((0, 1), (0, 900)))
    program = program_from_graph(convert_pt2e(graph))
    (site,) = find_grouped_quantizers(program.graph_module)
    scales = program.graph_module.get_buffer(str(site.args[1].args[0].target))
    assert len(scales) == 10 and torch.equal(scales[:5], scales[:1].expand(5))
    assert torch.equal(scales[5:], scales[9:].expand(5)) and scales[0] != scales[9]
    never = prepare_pt2e(copy.deepcopy(captured()), TFMQQuantizer(QuantizationConfig(), timesteps=TIMESTEPS))
    with pytest.raises(tfmq_fx.CalibrationError, match="an activation was never observed"):
        convert_pt2e(never)


def test_timesteps_are_needed_and_said_to_be():
    with pytest.raises(ConfigError, match=r"has a temporal block .* pass timesteps=scheduler\.timesteps"):
        tfmq_fx.prepare(captured())


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


def test_class_labels_that_are_not_finite_are_a_conditioning():
    torch.manual_seed(0)
    model = ClassDenoiser().eval()
    given = [(*batch(8, seed=n), torch.arange(8) % 4) for n in range(3)]
    program = tfmq_fx.quantize(model, None, given, timesteps=TIMESTEPS, progress=False)
    assert len(find_grouped_quantizers(program.graph_module, (EACH_TIMESTEP,))) == 1
    with torch.no_grad():
        assert relative(program(*given[0]), model(*given[0])) < 0.05


# -- the artefact, and more timesteps ---------------------------------------------------


def test_save_and_load_are_bit_for_bit(tmp_path):
    program = tfmq_fx.convert(prepared())
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "program"))
    for given in (inputs(), inputs((1,), (500,))):
        assert torch.equal(loaded(*given), program(*given))
    assert len(find_grouped_quantizers(loaded.graph_module)) == 1


def test_an_added_timestep_takes_the_parameters_of_the_nearest():
    program = tfmq_fx.convert(prepared())
    grown = tfmq_fx.add_timesteps(program, [510, 899])
    numbers = grown.graph_module.get_buffer(EACH_TIMESTEP).tolist()
    assert numbers == [*range(10), 5, 9]
    assert torch.equal(grown(*inputs()), program(*inputs()))
    assert bool(torch.isfinite(grown(*inputs(timesteps=(510, 899, 0, 510)))).all())


# -- lowering ---------------------------------------------------------------------------


@pytest.mark.parametrize("temporal", ["fsc", "cache", "auto"])
def test_the_reference_mixes_timesteps(temporal):
    program = tfmq_fx.convert(prepared(temporal=temporal))
    denoiser = tfmq_fx.lower(program, backend="reference")
    given = inputs()
    assert relative(denoiser(*given), program(*given)) < 2e-2
    assert "2 layers" not in denoiser.report.conditioning
    assert denoiser.report.conditioning.endswith("2 with parameters per timestep")
    assert denoiser.report.temporal_layers == 0


def test_a_batch_of_one_timestep_is_quantized_with_its_parameters():
    reference = _final_graph(tfmq_fx.convert(prepared()), tabulate=True)
    assert _apart(reference).tolist() == list(range(10))
    one = copy.deepcopy(reference)
    assert UseOneTimestepGroup()(one).modified and not find_grouped_quantizers(one)
    with torch.no_grad():
        for timestep in (0, 500, 900):
            given = inputs((0, 1, 2), (timestep,) * 3)
            assert relative(one(*given), reference(*given)) < 1e-5
        mixed = inputs()
        assert relative(one(*mixed), reference(*mixed)) > 1e-4


def test_compiled_as_a_whole_it_splits_a_batch_that_mixes_timesteps():
    program = tfmq_fx.convert(prepared(weight_bits=8))
    denoiser = tfmq_fx.lower(program, reuse=False)
    assert denoiser.report.conditioning.endswith("2 with parameters per timestep")
    layers = {entry.name: entry.kernel for entry in denoiser.report.entries}
    assert layers["down.embed"] == layers["up.embed"] == "integer"
    for given in (inputs(), inputs((0, 1, 2), (500,) * 3)):
        assert relative(denoiser(*given), program(*given)) < 0.02


# -- reconstruction ---------------------------------------------------------------------

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
        interrupt_after(patch, 90)  # the temporal block is done, the conditional part is not
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
    # Its ranges wait for the size of the batch, which circles with the blocks: the layers learn inside these.
    assert "conditional" not in learned(graph, batches=scalar)


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
            conditionings = Conditionings(wide)
            conditionings.add(graph_module, batches[0])
            columns = conditionings.with_timesteps(TIMESTEPS.double(), "timestep").columns()
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
