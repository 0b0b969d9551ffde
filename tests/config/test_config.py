import pytest

from tfmq_fx import ConfigError, QuantizationConfig


@pytest.mark.parametrize("bits", [1, 0, 9, 15, 33, 4.5, True, "8"])
def test_bits_outside_the_range_are_refused(bits):
    with pytest.raises(ConfigError, match="2 to 8, 16, or 32"):
        QuantizationConfig(weight_bits=bits)
    with pytest.raises(ConfigError, match="activation_bits"):
        QuantizationConfig(activation_bits=bits)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temporal", "fcs"), ("weight_range", "max"), ("activation_range", "kl"), ("unknown_timestep", "skip"),
     ("symmetric_activations", "maybe"), ("softmax_bits", 7), ("output_bits", 1),
     ("reconstruction", "smooth")],
)  # fmt: skip
def test_unknown_choices_are_named(field, value):
    with pytest.raises(ConfigError, match=str(value)):
        QuantizationConfig(**{field: value})


def test_an_asymmetric_8_bit_weight_is_refused():
    with pytest.raises(ConfigError, match="at most 7"):
        QuantizationConfig(weight_bits=8, symmetric_weights=False)


def test_overrides_are_checked_and_the_first_match_holds():
    with pytest.raises(ConfigError, match="weigt_bits"):
        QuantizationConfig(overrides={"a": {"weigt_bits": 4}})
    with pytest.raises(ConfigError, match="weight_bits=1"):
        QuantizationConfig(overrides={"a": {"weight_bits": 1}})
    config = QuantizationConfig(overrides={"mid.*": {"weight_bits": 4}, "*": {"weight_bits": 6}})
    assert config.for_layer("mid.conv").weight_bits == 4
    assert config.for_layer("up.conv").weight_bits == 6


def test_json_round_trip():
    config = QuantizationConfig.preset(
        "tfmq-dm", weight_bits=4, keep_float=("input", "mid.*"), overrides={"a": {"weight_bits": 3}}
    )
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="'bits'"):
        QuantizationConfig.from_dict({"bits": 8})

    config = QuantizationConfig(symmetric_activations=True, softmax_bits=16, output_bits=6)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_defaults_follow_the_width():
    assert QuantizationConfig(weight_bits=8).resolved_symmetric_weights
    four = QuantizationConfig(weight_bits=4)
    assert not four.resolved_symmetric_weights and four.resolved_weight_range == "mse"
