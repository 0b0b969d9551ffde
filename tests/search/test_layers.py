"""Which layers there are to choose for, and as what they are written down."""

import dataclasses

import pytest

import tfmq_fx
from tests.models import TIMESTEPS
from tests.search.conftest import CONFIG
from tfmq_fx import ConfigError
from tfmq_fx.search.layers import SearchLayer, find_layers
from tfmq_fx.search.widths import Widths, check_candidates

CANDIDATES = check_candidates("w8a8,w4a8,w4a4,float")


def found(calibrated, config, **options):
    prepared = tfmq_fx.prepare(calibrated.program, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, calibrated.rest, progress=False)
    layers = find_layers(prepared, config, "timestep", CANDIDATES, **{"products": True, **options})
    return {layer.name: layer for layer in layers}


def test_every_quantized_layer_is_found_once(calibrated):
    layers = found(calibrated, CONFIG)
    weighted = {"time.one", "time.two", "down.conv1", "down.embed", "down.conv2", "qkv", "up.conv1", "up.embed",
                "up.conv2", "up.shortcut"}  # fmt: skip
    assert set(layers) == {*weighted, "matmul_default", "matmul_default_1"}
    assert all(layers[name].options == CANDIDATES for name in weighted)
    assert len(layers["up.shortcut"].nodes) == 2  # it reads a concatenation
    # The sum of the softmax reads what the second product reads.
    assert {str(node.target) for node in layers["matmul_default_1"].nodes} == {
        "aten.sum.dim_IntList", "aten.matmul.default"
    }  # fmt: skip


def test_products_have_widths_of_activations_alone(calibrated):
    product = found(calibrated, CONFIG)["matmul_default"]
    assert product.options == (Widths(8, 8), Widths(4, 4), Widths(32, 32))
    assert product.override(product.options[1]) == ("matmul_default", {"activation_bits": 4})
    fixed = found(calibrated, CONFIG, products=False)["matmul_default"]
    assert fixed.options == (Widths(8, 8),)


@pytest.mark.parametrize("pattern", ["down.*", "attention"])
def test_what_the_configuration_names_keeps_its_widths(calibrated, pattern):
    config = dataclasses.replace(CONFIG, overrides={pattern: {"activation_bits": 6}})
    layers = found(calibrated, config)
    named = {name for name in layers if (name.startswith("down.") if pattern == "down.*" else "matmul" in name)}
    assert named and all(layers[name].options == (Widths(8, 6),) for name in named)
    assert all(layers[name].options[0] == Widths(8, 8) for name in layers.keys() - named)


def test_a_name_is_no_pattern():
    layer = SearchLayer("blocks[0].conv*", (), (Widths(8, 8),))
    name, _ = layer.override(Widths(4, 4))
    config = tfmq_fx.QuantizationConfig(overrides={name: {"activation_bits": 4}})
    assert config.for_layer("blocks[0].conv*").activation_bits == 4
    assert config.for_layer("blocks0.conv1").activation_bits == 8


def test_a_model_in_float_is_refused(calibrated):
    config = dataclasses.replace(CONFIG, keep_float=("*",))
    with pytest.raises(ConfigError, match="nothing to search"):
        found(calibrated, config)
