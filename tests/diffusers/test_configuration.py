"""Our configuration as diffusers knows configurations."""

import copy
import json

import pytest
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from tfmq_fx import ConfigError, LoweringError, QuantizationConfig
from tfmq_fx.diffusers import TFMQConfig, TFMQDiffusersQuantizer


def test_it_says_what_diffusers_asks():
    config = TFMQConfig(weight_bits=4)
    assert isinstance(config, QuantizationConfigMixin)
    assert config.quant_method == config.quant_method.value == "tfmq_fx"
    assert config.to_dict() == {"quant_method": "tfmq_fx", "weight_bits": 4}
    assert TFMQConfig(weight_bits=8).to_diff_dict() == {"quant_method": "tfmq_fx"}
    assert repr(config).startswith("TFMQConfig {") and '"weight_bits": 4' in repr(config)


def test_it_goes_through_json_with_all_fields():
    values = QuantizationConfig(weight_bits=4, overrides={"input": {"weight_bits": 8}}, keep_float=()).to_dict()
    config = TFMQConfig(**values)
    again = TFMQConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config == copy.deepcopy(config) and again.given == values
    assert config != TFMQConfig(**values, lower="reference")
    assert DiffusersAutoQuantizer.from_dict(config.to_dict()) == config
    assert isinstance(DiffusersAutoQuantizer.from_config(config.to_dict()), TFMQDiffusersQuantizer)


def test_an_observer_of_others_need_not_be_registered():
    assert TFMQConfig(activation_range="theirs").given == {"activation_range": "theirs"}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"weight_bits": 9}, ConfigError, "weight_bits"),
        ({"wieght_bits": 8}, ConfigError, "wieght_bits"),
        ({"lower": "eager"}, ConfigError, "lower='eager' is no backend: use one of 'aot', 'auto', 'inductor'"),
        ({"lower": "reference", "precision": "f64"}, LoweringError, "precision='f64' is not supported"),
        ({"precision": "bf16"}, ConfigError, "goes with lower="),
        ({"quant_method": "gguf"}, ConfigError, "quant_method='gguf' is not 'tfmq_fx'"),
    ],
)
def test_what_is_not_valid_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        TFMQConfig(**arguments)


@pytest.mark.parametrize("option", ["lower", "precision"])
def test_a_file_does_not_choose_what_runs(option):
    """Else whoever wrote the folder would have its compiled code run."""
    with pytest.raises(ConfigError, match=rf"a file cannot choose '{option}'; remove it from quantization_config"):
        TFMQConfig.from_dict({"quant_method": "tfmq_fx", option: "aot"})


def test_options_of_loading_are_kept_and_the_rest_is_the_folder_s():
    merge = DiffusersAutoQuantizer.merge_quantization_configs
    stored = {"quant_method": "tfmq_fx", "weight_bits": 4, "activation_bits": 8}
    assert merge(stored, None).given == {"weight_bits": 4, "activation_bits": 8}
    merged = merge(stored, TFMQConfig("reference", weight_bits=4))
    assert (merged.lower, merged.given) == ("reference", {"weight_bits": 4, "activation_bits": 8})
    with pytest.raises(ConfigError, match=r"quantized with weight_bits=4, which cannot become 6 while it is loaded"):
        merge(stored, TFMQConfig(weight_bits=6))


def test_configurations_of_others_are_merged_as_before():
    merge = DiffusersAutoQuantizer.merge_quantization_configs
    stored = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        assert merge(stored, TFMQConfig()) is stored
    with pytest.warns(UserWarning, match="from the model will be used"):
        assert merge({"quant_method": "tfmq_fx"}, stored) == TFMQConfig()


def test_a_pipeline_s_configuration_takes_it():
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": TFMQConfig()})
    assert mapping._resolve_quant_config(module_name="unet") == TFMQConfig()
    assert mapping._resolve_quant_config(module_name="vae") is None
