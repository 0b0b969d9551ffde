"""What a layer loses alone is what a program loses in which it alone is quantized."""

import dataclasses

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, relative
from tests.search.conftest import CONFIG
from tfmq_fx.quantization.probes import measure
from tfmq_fx.search.operand_quantizers import OperandQuantizers
from tfmq_fx.search.rounding import round_weights
from tfmq_fx.search.sensitivity import measure_sensitivities


@pytest.fixture(scope="module")
def sensitivities(calibrated):
    return measure_sensitivities(
        calibrated.prepared, calibrated.layers, calibrated.quantizers, calibrated.probes, progress=False
    )


def program_of(calibrated, name, widths):
    """The model with one layer at these widths and all others in float."""
    others = {layer.name: layer.override(layer.options[-1])[1] for layer in calibrated.layers if layer.name != name}
    own = dict([calibrated.layer(name).override(widths)])
    config = dataclasses.replace(CONFIG, overrides={**own, **others})
    prepared = tfmq_fx.prepare(calibrated.program, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, calibrated.rest, progress=False)
    return tfmq_fx.convert(prepared)


@pytest.mark.parametrize(
    ("name", "option", "apart"),
    [("time.one", 0, 0.02), ("down.conv1", 1, 0.02), ("qkv", 1, 0.02), ("up.shortcut", 0, 0.02), ("up.embed", 1, 0.15),
     ("matmul_default_1", 0, 0.02)],
)  # fmt: skip
def test_a_layer_alone_loses_what_a_program_does(calibrated, sensitivities, name, option, apart):
    """Of the temporal block, a layer with scaled channels, the parts of a convolution, and a product of attention.

    The ranges of the block are those under quantized weights, so behind others in float they are a little different.
    """
    place = calibrated.layers.index(calibrated.layer(name))
    program = program_of(calibrated, name, calibrated.layers[place].options[option])
    fidelity = measure(program.graph_module, sensitivities.probes)
    expected = {entry.timestep: entry.difference**2 for entry in fidelity.timesteps}
    errors = sensitivities.errors[place][option].tolist()
    found = dict(zip((probe.timestep for probe in sensitivities.probes), errors, strict=True))
    assert len(found) == len(TIMESTEPS) and found.keys() == expected.keys()
    assert all(value > 0 for value in found.values())
    assert relative(torch.tensor(list(found.values())), torch.tensor([expected[t] for t in found])) < apart


def test_float_loses_nothing_and_fewer_bits_more(calibrated, sensitivities):
    for layer, errors in zip(calibrated.layers, sensitivities.errors, strict=True):
        assert errors.shape == (len(layer.options), len(calibrated.probes))
        assert not errors[-1].any()
        if layer.weights:
            assert errors[1].sum() > errors[0].sum() > 0


def test_the_predictions_are_the_models(calibrated, sensitivities):
    with torch.no_grad():
        for probe in sensitivities.probes:
            assert relative(probe.expected[0], calibrated.model(*probe.call.leaves)) < 1e-5


def test_measuring_changes_nothing(calibrated, sensitivities):
    before = {name: value.clone() for name, value in calibrated.prepared.state_dict().items() if value is not None}
    again = measure_sensitivities(
        calibrated.prepared, calibrated.layers[:2], calibrated.quantizers, calibrated.probes[:3], progress=False
    )
    after = calibrated.prepared.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(again.errors[1], sensitivities.errors[1][:, :3])


def test_gptq_loses_less_than_rounding_to_nearest(calibrated, sensitivities):
    quantizers = OperandQuantizers(calibrated.prepared, CONFIG)
    layers = [calibrated.layer(name) for name in ("down.conv1", "up.conv2", "up.shortcut")]
    gptq = tfmq_fx.ReconstructionConfig(method="gptq")
    count = round_weights(calibrated.prepared, layers, quantizers, calibrated.rest, "timestep", gptq, progress=False)
    assert count == 4  # the shortcut has two parts
    rounded = measure_sensitivities(calibrated.prepared, layers, quantizers, calibrated.probes, progress=False)
    nearest = [sensitivities.errors[calibrated.layers.index(layer)] for layer in layers]
    # The shortcut has eight columns a part: too few to make up for one another.
    for place in (0, 1):
        assert rounded.errors[place][1].sum() < 0.9 * nearest[place][1].sum()
    # Weights of eight bits are rounded to nearest.
    assert all(torch.equal(e[0], n[0]) for e, n in zip(rounded.errors, nearest, strict=True))
