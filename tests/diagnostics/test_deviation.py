"""How far trajectories and single layers drift from float, against numbers worked out by hand."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn

import tfmq_fx
from tests.diagnostics_cases import LAYERS, WEIGHTED, Doubled, captured, features, program
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ConfigError, TimestepError, diagnostics
from tfmq_fx.diagnostics.comparison import psnr
from tfmq_fx.diagnostics.layer_error import match_layers

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
    with pytest.raises(ConfigError, match="'timestep' is missing; this program was captured with"):
        diagnostics.layer_errors(captured(), program(), [{"sample": batch()[0]}])
    with pytest.raises(ConfigError, match="'timestep' is missing; this program was captured with"):
        diagnostics.layer_errors(captured(), program(), [batch()[0]])
    with pytest.raises(ConfigError, match="does not fit the captured model"):
        diagnostics.layer_errors(captured(), program(), [(torch.randn(2, 3, 8, 8), TIMESTEPS[:2])])
    with pytest.raises(TimestepError) as caught:
        diagnostics.layer_errors(captured(), program(), [(torch.randn(1, 1, 8, 8), torch.tensor([55]))])
    assert "\n" not in str(caught.value)
