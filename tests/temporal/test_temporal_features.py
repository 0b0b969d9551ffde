"""Temporal features: read from any form of a model, their error and their mismatch measured exactly."""

import copy
import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import tfmq_fx
from tests.diagnostics_cases import LAYERS, captured, features, program
from tests.models import TIMESTEPS, small_denoiser
from tfmq_fx import ConfigError, diagnostics
from tfmq_fx.diagnostics import TemporalFeatures

# --- temporal features ------------------------------------------------------------------------------


def test_feature_error_is_exact_on_vectors_made_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    x_hat = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    error = diagnostics.temporal_feature_error(features(x), features(x_hat))
    assert error.cosine.flatten().tolist() == pytest.approx([1, 0, 1, -1], abs=1e-15)
    assert (error.mean_cosine, error.least_cosine) == (pytest.approx(1 / 4), pytest.approx(-1))
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
