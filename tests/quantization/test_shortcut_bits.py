"""Projection shortcuts read 16 bits: in the program, with what is set for layers, and against float."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig
from tfmq_fx.frontend.roles import find_roles
from tfmq_fx.passes.support.predicates import is_conv, is_weighted

aten = torch.ops.aten


def program(model=None, **config):
    batches = [batch(seed=seed) for seed in range(3)]
    return tfmq_fx.quantize(
        model or small_denoiser(), QuantizationConfig(**config), batches, timesteps=TIMESTEPS, progress=False
    )


def levels(quantized):
    """The largest integer that each convolution reads, those of shortcuts apart."""
    roles = find_roles(quantized.graph_module)
    found = {True: set(), False: set()}
    for node in filter(is_weighted, quantized.graph_module.graph.nodes):
        activation = node.args[0]
        if is_conv(node) and "dequantize" in str(activation.target):
            high = activation.args[5 if "channel" in str(activation.target) else 4]
            found["shortcut" in roles.get(node, ())].add(high)
    return found[True], found[False]


@pytest.mark.parametrize(
    "config, shortcuts, others",
    [
        ({}, 65535, 255),
        ({"activation_groups": 1}, 65535, 255),
        ({"shortcut_bits": None}, 255, 255),
        ({"shortcut_bits": 8}, 255, 255),
        ({"activation_bits": 4, "shortcut_bits": 8}, 255, 15),
        ({"activation_bits": 4, "shortcut_bits": None}, 15, 15),
        ({"activation_bits": 16, "shortcut_bits": 8}, 65535, 65535),
        ({"overrides": {"shortcut": {"shortcut_bits": None}}}, 255, 255),
        ({"overrides": {"up.*": {"activation_bits": 6}}}, 65535, None),
        ({"overrides": {"shortcut": {"activation_bits": 6, "shortcut_bits": 8}}}, 255, 255),
    ],
    ids=str,
)
def test_widths(config, shortcuts, others):
    of_shortcuts, of_others = levels(program(**config))
    assert of_shortcuts == {shortcuts}
    assert others is None or of_others == {others}


def test_a_shortcut_that_is_kept_float_or_not_quantized_has_no_width():
    for config in (
        {"keep_float": ("input", "output", "shortcut")},
        {"overrides": {"shortcut": {"activation_bits": 32}}},
    ):
        assert levels(program(**config))[0] == set()


@pytest.mark.parametrize("bits", [4, 12, 32, "16", True])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="shortcut_bits"):
        QuantizationConfig(shortcut_bits=bits)


def test_it_loses_less_than_8_bits():
    """Where most of the result comes through the shortcut, most of the error does."""
    model = small_denoiser()
    with torch.no_grad():
        model.up.shortcut.weight *= 20
    inputs = batch(seed=7)
    with torch.no_grad():
        wanted = model(*inputs)
        errors = [
            relative(program(model, shortcut_bits=bits, weight_bits=32).graph_module(*inputs), wanted)
            for bits in (16, None)
        ]
    assert errors[0] < 0.8 * errors[1]


def test_it_survives_a_file(tmp_path):
    quantized = program()
    tfmq_fx.save(quantized, tmp_path / "artefact")
    loaded = tfmq_fx.load(tmp_path / "artefact")
    assert loaded.config.shortcut_bits == 16 and levels(loaded) == levels(quantized)
    inputs = batch(seed=3)
    assert torch.equal(loaded.graph_module(*inputs), quantized.graph_module(*inputs))
