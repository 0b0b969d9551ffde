"""The configuration of reconstruction: checked, named, and plain JSON both ways."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx import ConfigError, QuantizationConfig
from tfmq_fx.config.reconstruction import CHECKS, RECONSTRUCTIONS, ReconstructionConfig

WRONG = [
    ("method", "optq"),
    ("damping", 0.0),
    ("adapter_rank", 0),
    ("granularity", "blocks"),
    ("temporal", "fsc"),
    ("temporal_objective", "tiar"),
    ("iterations", 0),
    ("iterations", 1.5),
    ("iterations", True),
    ("temporal_iterations", 0),
    ("temporal_iterations", "many"),
    ("batch_size", 0),
    ("learning_rate", 0.0),
    ("learning_rate", 1.1),
    ("learning_rate", "fast"),
    ("round_weight", -0.1),
    ("round_weight", float("nan")),
    ("beta", (2.0, 20.0)),
    ("beta", (20.0, 0.5)),
    ("beta", (20.0,)),
    ("beta", (20.0, 4.0, 2.0)),
    ("warmup", -0.1),
    ("warmup", 1.1),
    ("quantized_inputs", 1.1),
    ("quantized_inputs", None),
    ("drop_activations", -0.5),
    ("step_learning_rate", 2.0),
    ("precision", "float16"),
    ("temporal_precision", "int8"),
    ("held_back", 0.95),
    ("held_back", float("inf")),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**33),
    ("fisher", "no"),
    ("fisher", 1),
    ("fisher", None),
    ("learned_steps", []),
    ("learned_steps", "before"),
    ("learned_steps", 1),
    ("step_share", -0.1),
    ("step_share", "half"),
    ("learned_steps", float("nan")),
    ("beta", (float("inf"), 2.0)),
    ("beta", (True, True)),
    ("beta", torch.tensor([20.0, 2.0])),
    ("iterations", np.float64(3)),
    ("iterations", torch.tensor(3)),
    ("iterations", np.arange(3)),
    ("warmup", np.bool_(True)),
    ("warmup", torch.tensor([[0.1], [0.2]])),
    ("learning_rate", np.array([1e-3, 1e-3])),
    ("granularity", np.array(["block", "layer"])),
    ("precision", None),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_one_sentence_that_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        ReconstructionConfig(**{field: value})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=field):
        QuantizationConfig(reconstruction={field: value})


def test_every_field_has_a_wrong_value_above():
    checked = {field for field, _ in WRONG}
    assert checked == {f.name for f in dataclasses.fields(ReconstructionConfig)} == set(CHECKS)


def test_numbers_of_numpy_become_plain():
    config = ReconstructionConfig(
        granularity=np.str_("layer"), iterations=np.int64(5), batch_size=np.uint8(4), learning_rate=np.float32(0.5),
        beta=[np.int64(20), np.float64(2)], fisher=np.bool_(True), held_back=0, seed=np.int32(3),
            temporal_objective=np.str_("features"),
    )  # fmt: skip
    same = ReconstructionConfig(
        granularity="layer",
        iterations=5,
        batch_size=4,
        learning_rate=0.5,
        fisher=True,
        held_back=0.0,
        seed=3,
        temporal_objective="features",
    )
    assert config == same and hash(config) == hash(same)
    plain = [entry for value in dataclasses.astuple(config) for entry in (value if type(value) is tuple else [value])]
    assert {type(value) for value in plain} == {str, int, float, bool}
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(same))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 1),
        ("temporal_iterations", 1),
        ("batch_size", 1),
        ("learning_rate", 1e-8),
        ("learning_rate", 1),
        ("round_weight", 0),
        ("beta", (1, 1)),
        ("warmup", 0),
        ("warmup", 1),
        ("quantized_inputs", 0),
        ("drop_activations", 1),
        ("step_learning_rate", 0),
        ("damping", 1e-6),
        ("held_back", 0.9),
        ("seed", 0),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field, value):
    assert getattr(ReconstructionConfig(**{field: value}), field) == value


def test_blocks_without_blocks_are_refused():
    with pytest.raises(ConfigError, match="granularity='none' trains no block"):
        ReconstructionConfig(granularity="none", temporal="blocks")


def test_names():
    assert QuantizationConfig().reconstruction is None
    assert ReconstructionConfig.of(None) is None
    assert (
        ReconstructionConfig.of("none") == ReconstructionConfig.of("nearest") == ReconstructionConfig(method="nearest")
    )
    assert ReconstructionConfig.of("gptq") == ReconstructionConfig(method="gptq", granularity="layer")
    assert ReconstructionConfig.of("tfmq-dm") == ReconstructionConfig()
    assert ReconstructionConfig.of("brecq") == ReconstructionConfig(temporal="blocks")
    assert ReconstructionConfig.of("adaround") == ReconstructionConfig(granularity="layer", temporal="blocks")
    assert ReconstructionConfig.of("tiar") == ReconstructionConfig(granularity="none")
    for name, config in RECONSTRUCTIONS.items():
        assert QuantizationConfig(reconstruction=name).reconstruction == config


def test_a_configuration_and_its_fields():
    config = ReconstructionConfig(iterations=7)
    assert ReconstructionConfig.of(config) is config
    assert ReconstructionConfig.of({"iterations": 7}) == config
    assert ReconstructionConfig.of({}) == ReconstructionConfig()


def resolved(**fields):
    return QuantizationConfig(**fields).resolved_reconstruction


def test_narrow_weights_are_rounded_by_gptq_unless_something_else_is_asked_for():
    gptq = RECONSTRUCTIONS["gptq"]
    assert [resolved(weight_bits=bits) for bits in (2, 4, 6, 7, 8, 16, 32)] == [gptq] * 3 + [None] * 4
    assert resolved(overrides={"mid.*": {"weight_bits": 6}, "up.*": {"activation_bits": 4}}) == gptq
    assert resolved(overrides={"mid.*": {"weight_bits": 7}, "up.*": {"activation_bits": 4}}) is None
    for name in ("nearest", "none", {"method": "nearest"}):
        assert resolved(weight_bits=4, reconstruction=name) is None
        assert QuantizationConfig(weight_bits=4, reconstruction=name).reconstruction.method == "nearest"
    assert resolved(weight_bits=8, reconstruction="gptq") == gptq
    assert resolved(weight_bits=4, reconstruction="tiar") == RECONSTRUCTIONS["tiar"]


def test_gptq_goes_layer_by_layer():
    assert ReconstructionConfig(method="gptq", granularity="block").granularity == "layer"
    assert ReconstructionConfig(method="gptq", granularity="none").granularity == "none"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tfmq", "'tiar'"),
        (3, "or a name"),
        ({"steps": 3}, "unknown reconstruction field 'steps'"),
        ({3: 3}, "unknown reconstruction field 3"),
        (torch.ones(3, 3), "or a name"),
        ([], "or a name"),
    ],
)
def test_anything_else_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationConfig(reconstruction=value)


@st.composite
def configurations(draw):
    granularity = draw(st.sampled_from(["block", "layer", "none"]))
    method = draw(st.sampled_from(["adaround", "gptq", "adapters", "distillation", "nearest"]))
    share = st.floats(0, 1)
    return ReconstructionConfig(
        method=method,
        granularity=granularity,
        temporal=draw(st.sampled_from(["tiar", "nearest"] if granularity == "none" else ["tiar", "blocks", "nearest"])),
        iterations=draw(st.integers(1, 10**6)),
        temporal_iterations=draw(st.integers(1, 10**6)),
        batch_size=draw(st.integers(1, 1000)),
        learning_rate=draw(st.none() | st.floats(1e-8, 1)),
        round_weight=draw(st.floats(0, 1e6)),
        beta=tuple(sorted((draw(st.floats(1, 50)), draw(st.floats(1, 50))), reverse=True)),
        warmup=draw(share),
        quantized_inputs=draw(share),
        drop_activations=draw(share),
        fisher=draw(st.booleans()),
        learned_steps=draw(st.sampled_from([False, True, "after"])),
        step_share=draw(st.floats(0, 10)),
        step_learning_rate=draw(share),
        precision=draw(st.sampled_from(["float32", "bfloat16"])),
        adapter_rank=draw(st.integers(1, 1000)),
        damping=draw(st.floats(1e-6, 10)),
        held_back=draw(st.floats(0, 0.9)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(configurations())
def test_json_both_ways(config):
    whole = QuantizationConfig(weight_bits=4, reconstruction=config)
    plain = json.loads(json.dumps(whole.to_dict()))
    assert QuantizationConfig.from_dict(plain) == whole
    assert QuantizationConfig.from_dict(plain).reconstruction.beta == config.beta
    assert hash(config) == hash(ReconstructionConfig.of(plain["reconstruction"]))


def test_the_rate_grows_as_training_gets_shorter():
    config = ReconstructionConfig()
    assert config.rate(20_000) == pytest.approx(1e-3)
    assert config.rate(100_000) == pytest.approx(1e-3)
    assert config.rate(2_000) == pytest.approx(1e-2)
    assert config.rate(10) == pytest.approx(3e-2)
    assert ReconstructionConfig(learning_rate=0.5).rate(10) == 0.5
