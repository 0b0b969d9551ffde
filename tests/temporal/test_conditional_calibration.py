"""Layers of the timestep and the conditioning: what they are, and their parameters per timestep."""

import copy

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import tfmq_fx
from tests.conditional_cases import (
    BATCHES,
    CONDITIONS,
    all_pairs,
    captured,
    conditional_outputs,
    observers,
    prepared,
)
from tests.lowering.test_stages import inputs
from tests.models import TIMESTEPS, ClassDenoiser, batch, relative
from tfmq_fx import ConfigError, QuantizationConfig, TFMQQuantizer
from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.lowering.backends.inductor import native
from tfmq_fx.lowering.plan import folded_graph, timestep_groups, with_lookups_written_out
from tfmq_fx.passes import UseOneTimestepGroup
from tfmq_fx.passes.analysis import conditioning_inputs, evaluate_temporal_nodes, find_temporal_block, layer_name
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers
from tfmq_fx.quantization.convert import program_from_graph

# -- what is found --------------------------------------------------------------------


def test_the_conditioning_is_what_meets_the_timestep_and_never_the_sample():
    assert conditioning_inputs(captured(), {"sample"}) == CONDITIONS
    assert conditioning_inputs(captured(), {"sample", "pooled"}) == ()
    assert conditioning_inputs(captured(), set()) == ()
    path = find_temporal_block(captured(), finite=CONDITIONS)
    assert [layer.fqn for layer in path.embedding_layers] == ["down.embed", "up.embed"]
    assert {"time.one", "time.two"} < {str(node.args[1].target).removesuffix(".weight") for node in path.time_embedding}


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
        own = seen[pairs.rows == row]
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
        assert sum(observer.ranges.items.counts.values()) == sum(len(sample) for sample, *_ in BATCHES)
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
    config = QuantizationConfig(activation_groups=1)
    graph = prepare_pt2e(copy.deepcopy(captured()), TFMQQuantizer(config, timesteps=TIMESTEPS))
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
    reference = with_lookups_written_out(folded_graph(tfmq_fx.convert(prepared())))
    assert timestep_groups(reference).tolist() == list(range(10))
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
    # One range a call is oneDNN's, with VNNI; our own kernels take many, but no layers as narrow as these.
    wanted = "float" if native.has_native_kernels() or not sums_bytes_exactly() else "integer"
    assert layers["down.embed"] == layers["up.embed"] == wanted
    for given in (inputs(), inputs((0, 1, 2), (500,) * 3)):
        assert relative(denoiser(*given), program(*given)) < 0.02
