"""Diagnostics: exact values on cases made by hand, and a float model against itself."""

import copy
import functools
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from tfmq_fx.passes.analysis import find_temporal_block
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig, QuantizedProgram, TimestepError, diagnostics
from tfmq_fx.comparison import psnr
from tfmq_fx.diagnostics import Diagnosis, TemporalFeatures
from tfmq_fx.diagnostics.layer_error import match_layers

LAYERS = ("down.embed", "up.embed")
WEIGHTED = 12


class Doubled(nn.Module):
    """One layer that runs twice, and a sum of both results that is no split convolution's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample):
        once = self.layer(sample)
        return self.layer(once) * once


@functools.cache
def captured():
    return tfmq_fx.capture(small_denoiser(), batch())


@functools.cache
def program(**changes):
    config = QuantizationConfig(**changes)
    found = tfmq_fx.quantize(small_denoiser(), config, [batch(16)], timesteps=TIMESTEPS, progress=False)
    found.scheduler = dict(DDPMScheduler().config)
    return found


def float_program():
    """The float graph, dressed as a program."""
    return QuantizedProgram(
        graph_module=copy.deepcopy(captured()),
        config=QuantizationConfig(temporal="float"),
        timesteps=TIMESTEPS.double(),
        scheduler=dict(DDPMScheduler().config),
    )


def features(*values, timesteps=None, layers=None):
    steps = torch.arange(len(values[0])) * 10 if timesteps is None else timesteps
    return TemporalFeatures(layers or tuple(f"g{i}" for i in range(len(values))), steps.double(), values)


# --- temporal features ------------------------------------------------------------------------------


def test_feature_error_is_exact_on_vectors_made_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    x_hat = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    error = diagnostics.temporal_feature_error(features(x), features(x_hat))
    assert error.cosine.flatten().tolist() == pytest.approx([1, 0, 1, -1], abs=1e-15)
    assert error.relative.flatten().tolist() == pytest.approx([0, math.sqrt(2), 0, 1.5])
    assert error.overall == pytest.approx(math.sqrt((2 + 9) / (25 + 1 + 4)))
    assert error.cosine.dtype == error.relative.dtype == torch.float64


def test_an_error_on_top_of_nothing_is_infinite_and_orthogonal():
    error = diagnostics.temporal_feature_error(features(torch.zeros(1, 2)), features(torch.ones(1, 2)))
    assert (error.relative.item(), error.overall) == (math.inf, math.inf)
    assert error.cosine.item() == pytest.approx(0, abs=1e-15)


def test_cosine_keeps_digits_that_a_product_would_lose():
    angle = 1e-7  # 1 - cos is 5e-15: a float64 product of unit vectors keeps one digit of it
    x, x_hat = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[math.cos(angle), math.sin(angle)]]).double()
    closer = torch.tensor([[math.cos(angle / 2), math.sin(angle / 2)]]).double()
    rows, margin = diagnostics.match_timesteps(torch.cat([x, x_hat]), torch.cat([closer * 0.9999, x_hat]))
    assert rows.tolist()[1] == 1
    assert margin[1].item() == pytest.approx(angle**2 / 2, rel=1e-3)


def test_features_are_those_of_the_module():
    model = small_denoiser()
    found = diagnostics.temporal_features(captured(), TIMESTEPS)
    emb = nn.functional.silu(model.time(TIMESTEPS))
    assert found.layers == LAYERS
    assert torch.equal(found.timesteps, TIMESTEPS.double())
    for value, layer in zip(found.values, (model.down.embed, model.up.embed), strict=True):
        assert torch.allclose(value, layer(emb), atol=1e-6)


def test_features_of_a_program_come_from_its_table_or_from_rows_added_to_a_copy():
    quantized = program()
    assert torch.equal(diagnostics.temporal_features(quantized).timesteps, TIMESTEPS.double())
    found = diagnostics.temporal_features(quantized, [55, 100, 777, 55])
    assert found.timesteps.tolist() == [55, 100, 777]
    assert len(quantized.timesteps) == len(TIMESTEPS)
    grown = tfmq_fx.add_timesteps(quantized, [55, 777])
    assert torch.equal(found.values[1], diagnostics.temporal_features(grown, [55, 100, 777]).values[1])


def test_a_program_that_takes_the_nearest_timestep_is_measured_as_it_is():
    nearest = program(unknown_timestep="nearest")
    one, added = (diagnostics.temporal_features(p, [140]).values[0] for p in (nearest, program()))
    assert not torch.equal(one, added)  # parameters of 100, not of 140
    assert torch.allclose(one, added, rtol=0.2, atol=0.2)


def test_layers_are_matched_by_name_or_else_by_order():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    ours = features(a, b, layers=("one", "two"))
    swapped = features(b, a, layers=("two", "one"))
    renamed = features(a, b, layers=("x", "y"))
    for other in (swapped, renamed):
        assert diagnostics.temporal_feature_error(ours, other).overall == 0
    assert diagnostics.temporal_feature_error(ours, features(b, a, layers=("x", "y"))).overall > 0


def test_features_that_do_not_belong_together_are_refused():
    a, b = torch.randn(3, 4), torch.randn(3, 5)
    with pytest.raises(ConfigError, match="2 of widths 4, 5 against 1 of widths 4"):
        diagnostics.temporal_feature_error(features(a, b), features(a))
    with pytest.raises(ConfigError, match="different timesteps"):
        diagnostics.find_mismatch(features(a), features(a, timesteps=torch.arange(3)))
    with pytest.raises(ConfigError, match="no timesteps to evaluate"):
        diagnostics.temporal_features(captured())
    with pytest.raises(ConfigError, match="no temporal features: the model has no input named 'timestep'"):
        diagnostics.temporal_features(tfmq_fx.capture(nn.Linear(4, 4), (torch.randn(2, 4),)), [1])


def test_a_model_with_a_time_embed_alone_has_its_last_linear_as_the_feature():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3,
    ).eval()  # fmt: skip
    graph = tfmq_fx.capture(model, (torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])))
    found = diagnostics.temporal_features(graph, [3, 600])
    assert found.layers == ("time_embedding.linear_2",)
    expected = model.time_embedding(model.time_proj(torch.tensor([3, 600])))
    assert torch.allclose(found.values[0], expected, atol=1e-6)


# --- mismatch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cosine", "distance"])
def test_the_float_model_matches_itself_everywhere(measure):
    for timesteps in (TIMESTEPS, range(1000)):
        found = diagnostics.temporal_mismatch(captured(), captured(), timesteps, measure=measure)
        assert found.delta.shape == (len(timesteps), 2)
        assert not found.delta.any()
        assert (found.share_right, found.mean_shift) == (1.0, 0.0)
        assert (found.margin > 0).all()


def test_float_features_that_do_not_change_match_themselves():
    constant = features(torch.ones(5, 3), torch.zeros(5, 3))
    for measure in ("cosine", "distance"):
        found = diagnostics.find_mismatch(constant, constant, measure)
        assert not found.delta.any()
        assert not found.margin.any()


@pytest.mark.parametrize("measure", ["cosine", "distance"])
def test_a_permuted_table_is_caught_with_the_right_deltas(measure):
    ours = diagnostics.temporal_features(captured(), TIMESTEPS)
    permutation = torch.tensor([1, 0, 2, 3, 6, 4, 5, 7, 8, 9])
    wrong = TemporalFeatures(ours.layers, ours.timesteps, (ours.values[0][permutation], ours.values[1]))
    found = diagnostics.find_mismatch(ours, wrong, measure)
    assert found.delta[:, 0].tolist() == [100, -100, 0, 0, 200, -100, -100, 0, 0, 0]
    assert not found.delta[:, 1].any()
    assert found.share_right == 15 / 20
    assert found.mean_shift == 600 / 20
    assert torch.equal(found.margin[:, 0] < 0, found.delta[:, 0] != 0)


def test_a_permuted_table_inside_a_program_is_caught():
    """Rows of the scale tables are swapped: what a row counter gone wrong would do."""
    broken = copy.deepcopy(program())
    values = next(name for name, _ in broken.graph_module.named_buffers() if name.endswith("timestep_values"))
    table = getattr(broken.graph_module, values)
    clean = diagnostics.temporal_feature_error(
        diagnostics.temporal_features(captured(), TIMESTEPS), diagnostics.temporal_features(broken)
    )
    setattr(broken.graph_module, values, table.roll(1))
    error = diagnostics.temporal_feature_error(
        diagnostics.temporal_features(captured(), TIMESTEPS), diagnostics.temporal_features(broken)
    )
    assert error.overall > 1.5 * clean.overall


def test_cosine_does_not_see_lengths_and_distance_does():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 5.0]])
    x_hat = torch.tensor([[2.0, 0.0], [2.0, 0.1], [0.0, 5.0]])
    by_cosine = diagnostics.find_mismatch(features(x), features(x_hat))
    by_distance = diagnostics.find_mismatch(features(x), features(x_hat), "distance")
    assert by_cosine.delta.flatten().tolist() == [0, 0, 0]
    assert by_distance.delta.flatten().tolist() == [10, 0, 0]
    cosine = 2 / math.hypot(2, 0.1)
    assert by_cosine.margin.flatten().tolist() == pytest.approx([1 - cosine, 1 - cosine, 1 - 0.1 / math.hypot(2, 0.1)])
    # (distance to the best wrong one - distance to the right one) / norm of the right one
    assert by_distance.margin[0].item() == pytest.approx((0.1 - 1) / 1)
    assert by_distance.margin[2].item() == pytest.approx(math.hypot(1, 5) / 5)


def test_mismatch_refuses_bad_input():
    with pytest.raises(ConfigError, match="measure='angle'"):
        diagnostics.match_timesteps(torch.ones(2, 2), torch.ones(2, 2), "angle")
    with pytest.raises(ConfigError, match="at least two timesteps"):
        diagnostics.match_timesteps(torch.ones(1, 2), torch.ones(1, 2))


def test_fewer_bits_mistake_more_timesteps():
    shares = [
        diagnostics.temporal_mismatch(captured(), program(weight_bits=bits), range(0, 1000, 5)).share_right
        for bits in (8, 2)
    ]
    assert shares[0] > shares[1]


# --- trajectories -----------------------------------------------------------------------------------


def test_deviation_is_that_of_ddim_states_by_hand():
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    steps_done = []
    found = diagnostics.compare_trajectories(
        lambda x, t: 0.5 * x,
        lambda x, t: (0.4 * x,),
        DDPMScheduler(),
        steps=5,
        noise=noise,
        on_step=lambda: steps_done.append(1),
    )
    ddim = DDIMScheduler.from_config(DDPMScheduler().config)
    ddim.set_timesteps(5)
    x, x_hat, expected = noise, noise, []
    for t in ddim.timesteps:
        x, x_hat = ddim.step(0.5 * x, t, x).prev_sample, ddim.step(0.4 * x_hat, t, x_hat).prev_sample
        expected.append([float((b - a).norm() / a.norm()) for a, b in zip(x, x_hat, strict=True)])
    assert torch.allclose(found.relative, torch.tensor(expected).double(), rtol=1e-5)
    assert found.timesteps.tolist() == ddim.timesteps.tolist()
    assert torch.equal(found.psnr, psnr(x, x_hat))
    assert len(steps_done) == 10
    assert torch.allclose(found.mean, found.relative.mean(1))
    assert torch.equal(found.quantile(1.0), found.relative.max(1).values)


def test_a_denoiser_does_not_deviate_from_itself():
    run = diagnostics.graph_denoiser(captured())
    found = diagnostics.compare_trajectories(run, run, DDPMScheduler(), steps=3, noise=torch.randn(2, 1, 8, 8))
    assert not found.relative.any()
    assert found.psnr.tolist() == [math.inf] * 2


def test_trajectories_that_cannot_be_compared_are_refused():
    def record(noise, steps):
        return diagnostics.record_trajectory(lambda x, t: x, DDPMScheduler(), steps=steps, noise=noise)

    one = record(torch.ones(1, 1, 4, 4), 2)
    for other in (record(torch.zeros(1, 1, 4, 4), 2), record(torch.ones(1, 1, 4, 4), 3)):
        with pytest.raises(ConfigError, match="same noise with the same steps"):
            diagnostics.trajectory_deviation(one, other)
    with pytest.raises(ConfigError, match="at least one sample"):
        record(torch.ones(0, 1, 4, 4), 2)


def test_a_graph_is_called_like_the_model_in_pieces_that_it_takes():
    model = small_denoiser()
    x = torch.randn(5, 1, 8, 8)
    expected = model(x, torch.full((5,), 300))
    for most in (None, 2):
        got = diagnostics.graph_denoiser(captured(), max_batch=most)(x, torch.tensor(300))
        assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="not a sample and 'timestep'"):
        diagnostics.graph_denoiser(tfmq_fx.capture(Doubled(), (torch.randn(2, 4),)))


def test_foreign_temporal_features_replace_the_models_own():
    """Those of another model with the same trunk: the same as putting its layers into this one."""
    model, other = small_denoiser(), small_denoiser(seed=1)
    theirs = diagnostics.temporal_features(tfmq_fx.capture(other, batch()), TIMESTEPS)
    x = torch.randn(3, 1, 8, 8)
    model.time, model.down.embed, model.up.embed = other.time, other.down.embed, other.up.embed
    run = diagnostics.with_temporal_features(captured(), theirs)
    assert torch.allclose(run(x, torch.tensor(300)), model(x, torch.full((3,), 300)), atol=1e-5)
    assert not torch.allclose(run(x, torch.tensor(300)), captured()(x, torch.full((3,), 300)), atol=1e-3)
    with pytest.raises(TimestepError, match="timestep 55 is not in the table"):
        run(x, torch.tensor(55))
    with pytest.raises(ConfigError, match="2 of widths 8, 8 against 1 of widths 2"):
        diagnostics.with_temporal_features(captured(), features(torch.ones(2, 2)))


def test_foreign_features_fit_a_graph_with_a_scalar_timestep():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    graph = tfmq_fx.capture(model, (torch.randn(2, 1, 8, 8), torch.tensor(1)))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor(20)
    run = diagnostics.with_temporal_features(graph, diagnostics.temporal_features(graph, [10, 20]))
    expected = model(x, t).sample
    assert torch.allclose(run(x, t).sample, expected, atol=1e-5)
    assert torch.allclose(diagnostics.graph_denoiser(graph, max_batch=2)(x, t).sample, expected, atol=1e-5)


# --- layers -----------------------------------------------------------------------------------------


def test_layer_error_is_exact_where_only_a_bias_differs():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].bias += torch.tensor([1.0, 0.0, 2.0])
    x = torch.randn(5, 4)
    graphs = [tfmq_fx.capture(m, (x,)) for m in (model, moved)]
    accumulated = diagnostics.layer_errors(*graphs, [x[:2], (x[2:],)])
    first, second = accumulated.layers
    assert (first.name, second.name, accumulated.rows) == ("0", "1", 5)
    assert first.error == pytest.approx(math.sqrt(5 * (1 + 4)), rel=1e-5)
    assert first.signal == pytest.approx(model[0](x).norm().item(), rel=1e-5)
    assert first.sqnr == pytest.approx(20 * math.log10(first.signal / first.error))
    shift = model[1].weight @ torch.tensor([1.0, 0.0, 2.0])
    assert second.error == pytest.approx(math.sqrt(5) * shift.norm().item(), rel=1e-4)
    local = diagnostics.layer_errors(*graphs, [x], flavour="local")
    assert local.layers[0].error == pytest.approx(first.error, rel=1e-5)
    assert (local.layers[1].error, local.layers[1].sqnr) == (0, math.inf)
    assert [layer.name for layer in accumulated.worst(1)] == [min(accumulated.layers, key=lambda x: x.sqnr).name]


def test_every_weighted_layer_of_a_program_is_measured_by_its_name():
    found = diagnostics.layer_errors(captured(), program(), [batch()])
    assert found.unmatched == ()
    assert len(found.layers) == WEIGHTED
    names = [layer.name for layer in found.layers]
    assert set(names) >= {*LAYERS, "enter", "leave", "qkv", "up.shortcut", "time.one"}
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["enter"].sqnr == math.inf  # it stays float, and nothing is before it
    assert all(10 < by_name[name].sqnr < 80 for name in (*LAYERS, "qkv", "leave", "up.shortcut"))
    assert by_name["leave"].signal == pytest.approx(captured()(*batch()).norm().item(), rel=1e-5)
    error = (program()(*batch()) - captured()(*batch())).norm().item()
    assert by_name["leave"].error == pytest.approx(error, rel=1e-4)


def test_a_split_convolution_is_one_layer():
    split = [n for n in program().graph_module.graph.nodes if "shortcut" in str(n.meta.get("nn_module_stack"))]
    assert sum(str(n.target) == "aten.conv2d.default" for n in split) == 2
    (ours, theirs) = match_layers(captured(), program().graph_module)[0]["up.shortcut"]
    assert "conv2d" in str(ours.target) and "add" in str(theirs.target)


def test_each_layer_alone_loses_less_than_the_whole_before_it():
    accumulated, local = (
        {x.name: x for x in diagnostics.layer_errors(captured(), program(weight_bits=4), [batch()], flavour=f).layers}
        for f in ("accumulated", "local")
    )
    for name in ("qkv", "up.conv2", "up.shortcut"):
        assert local[name].sqnr > accumulated[name].sqnr
    assert local["leave"].sqnr == math.inf


def test_a_layer_that_runs_twice_has_two_entries():
    model = Doubled()
    graph = tfmq_fx.capture(model, (torch.randn(2, 4),))
    found = diagnostics.layer_errors(graph, copy.deepcopy(graph), [torch.randn(3, 4)])
    assert [layer.name for layer in found.layers] == ["layer", "layer#2"]
    assert all(layer.error == 0 for layer in found.layers)


def test_layers_that_do_not_correspond_are_listed():
    ours = tfmq_fx.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),))
    theirs = tfmq_fx.capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    assert diagnostics.layer_errors(ours, theirs, [torch.randn(2, 4)]).unmatched == ("1",)


def test_layer_errors_refuse_bad_input():
    with pytest.raises(ConfigError, match="flavour='global'"):
        diagnostics.layer_errors(captured(), program(), [batch()], flavour="global")
    with pytest.raises(ConfigError, match="at least one batch"):
        diagnostics.layer_errors(captured(), program(), [])
    with pytest.raises(ConfigError, match="no 'timestep'; the graph takes sample, timestep"):
        diagnostics.layer_errors(captured(), program(), [{"sample": batch()[0]}])
    with pytest.raises(ConfigError, match="1 inputs; the graph takes"):
        diagnostics.layer_errors(captured(), program(), [batch()[0]])
    with pytest.raises(ConfigError, match="does not fit the captured model"):
        diagnostics.layer_errors(captured(), program(), [(torch.randn(2, 3, 8, 8), TIMESTEPS[:2])])
    with pytest.raises(TimestepError) as caught:
        diagnostics.layer_errors(captured(), program(), [(torch.randn(1, 1, 8, 8), torch.tensor([55]))])
    assert "\n" not in str(caught.value)


# --- the whole diagnosis ----------------------------------------------------------------------------


@functools.cache
def diagnosis(label="W4A8", **changes):
    return diagnostics.diagnose(captured(), program(**(changes or {"weight_bits": 4})), label=label, samples=3)


def test_the_float_model_lost_nothing():
    found = diagnostics.diagnose(captured(), float_program(), samples=2)
    assert found.skipped == {}
    assert found.features.overall == 0
    assert (found.features.cosine == 1).all()
    assert not found.features.relative.any()
    for mismatch in (found.mismatch, found.nearest):
        assert (mismatch.share_right, mismatch.mean_shift) == (1, 0)
    for deviation in (found.trajectory, found.temporal_trajectory):
        assert not deviation.relative.any()
        assert deviation.psnr.tolist() == [math.inf] * 2
    for layers in (found.layers, found.local_layers):
        assert len(layers.layers) == WEIGHTED
        assert all(layer.error == 0 for layer in layers.layers)


def test_a_diagnosis_holds_what_its_parts_measure():
    found = diagnosis()
    quantized = program(weight_bits=4)
    assert found.skipped == {}
    expected = diagnostics.temporal_mismatch(captured(), quantized)
    assert torch.equal(found.mismatch.matched, expected.matched)
    assert found.trajectory.relative.shape == (10, 3)  # as many steps as the table has rows
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoisers = [diagnostics.graph_denoiser(g) for g in (captured(), quantized.graph_module)]
    alone = diagnostics.compare_trajectories(*denoisers, DDPMScheduler(), steps=10, noise=noise)
    assert torch.equal(found.trajectory.relative, alone.relative)
    assert 0 < found.temporal_trajectory.mean[-1] < found.trajectory.mean[-1]
    assert found.layers.rows == 5 * 3
    assert found.config["weight_bits"] == 4


def test_more_bits_lose_less():
    eight = diagnosis("W8A8", weight_bits=8)
    assert eight.features.overall < diagnosis().features.overall
    assert eight.trajectory.mean[-1] < diagnosis().trajectory.mean[-1]


def test_a_diagnosis_goes_through_json_and_back():
    for found in (diagnosis(), diagnostics.diagnose(captured(), float_program(), samples=1, steps=2)):
        text = found.to_json()
        again = Diagnosis.from_json(text)
        assert again.to_json() == text
        assert torch.equal(again.mismatch.margin, found.mismatch.margin)
        assert torch.equal(again.trajectory.psnr, found.trajectory.psnr)
        assert again.layers == found.layers
        assert str(again) == str(found)
    assert json.loads(text)["trajectory"]["psnr"] == ["inf"]


def test_what_is_no_diagnosis_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        Diagnosis.from_json("{")
    with pytest.raises(ConfigError, match="not those of a diagnosis"):
        Diagnosis.from_dict({"label": "x"})


def test_the_tables_say_what_was_lost_and_what_was_left_out():
    text = str(diagnosis())
    assert "right timestep, by cosine" in text
    assert f"{diagnosis().features.overall:.2%}" in text
    assert diagnosis().layers.worst(1)[0].name in text
    assert "left out" not in text
    together = diagnostics.comparison_table([diagnosis(), diagnosis("W8A8", weight_bits=8)])
    assert [column.header for column in together.columns] == ["", "W4A8", "W8A8"]


def test_a_model_without_a_temporal_block_is_diagnosed_without_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    x = torch.randn(4, 4)
    config = QuantizationConfig(keep_float=(), temporal="float")
    quantized = tfmq_fx.quantize(model, config, [(x,)], progress=False)
    found = diagnostics.diagnose(tfmq_fx.capture(model, (x,)), quantized, batch=(x,), scheduler=DDPMScheduler())
    assert "no temporal block: the model has no input named 'timestep'" in found.skipped["mismatch"]
    assert "not a sample and 'timestep'" in found.skipped["trajectory"]
    assert found.features is found.mismatch is found.nearest is found.trajectory is None
    assert [layer.name for layer in found.layers.layers] == ["0", "2"]
    assert "left out" in str(found)
    assert Diagnosis.from_json(found.to_json()).skipped == found.skipped
    nothing = diagnostics.diagnose(tfmq_fx.capture(model, (x,)), quantized)
    assert "pass batch or a scheduler" in nothing.skipped["layers"]
    assert "pass scheduler" in nothing.skipped["trajectory"]


def test_a_program_whose_block_is_gone_is_diagnosed_without_it():
    from tfmq_fx.passes import IndexTimesteps, StripDeadState, TabulateTemporalBlock

    tabulated = float_program()
    for rewrite in (IndexTimesteps(TIMESTEPS), TabulateTemporalBlock(), StripDeadState()):
        rewrite(tabulated.graph_module)
    assert not find_temporal_block(tabulated.graph_module).linears
    found = diagnostics.diagnose(captured(), tabulated, samples=1)
    assert "the program has no temporal block" in found.skipped["features"]
    assert "the program has no temporal block" in found.skipped["temporal_trajectory"]
    assert found.trajectory.relative.max() < 1e-5
    assert set(found.layers.unmatched) == {"time.one", "time.two", *LAYERS}


def test_progress_counts_every_section_to_its_end():
    seen = {}

    def note(section, done, total):
        seen[section] = done, total

    diagnostics.diagnose(captured(), float_program(), samples=1, steps=2, progress=note)
    assert all(done == total > 0 for done, total in seen.values())
    assert set(seen) == {
        "temporal features", "sampling, float", "sampling, quantized", "sampling, temporal block",
        "layers, as the net runs", "layers, each alone",
    }  # fmt: skip


def test_another_model_and_bad_numbers_are_refused():
    other = tfmq_fx.capture(UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])))  # fmt: skip
    with pytest.raises(ConfigError, match="mine was made from another model: they have no layer in common"):
        diagnostics.diagnose(other, program(), label="mine")
    wider = small_denoiser()
    wider.leave = nn.Conv2d(8, 2, 3, padding=1)
    with pytest.raises(ConfigError, match="its layer leave has 1 outputs, this model's 2"):
        diagnostics.diagnose(tfmq_fx.capture(wider, batch()), program())
    for samples in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"samples={samples}"):
            diagnostics.diagnose(captured(), program(), samples=samples)
    with pytest.raises(ConfigError, match="0 sampling steps are not possible"):
        diagnostics.diagnose(captured(), program(), steps=0)
    with pytest.raises(TimestepError, match="is not in the table"):
        diagnostics.diagnose(captured(), program(), steps=3, samples=1)


def test_nothing_given_is_changed():
    graph, quantized = captured(), program()
    before = [(g.code, {k: v.clone() for k, v in g.state_dict().items()}) for g in (graph, quantized.graph_module)]
    diagnostics.diagnose(graph, quantized, samples=1, timesteps=[0, 100, 150])
    for g, (code, state) in zip((graph, quantized.graph_module), before, strict=True):
        assert g.code == code
        assert all(torch.equal(value, state[name]) for name, value in g.state_dict().items())
