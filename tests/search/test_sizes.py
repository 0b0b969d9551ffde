"""What a layer is said to take is what the artefact has of it."""

import dataclasses

from safetensors import safe_open

import tfmq_fx
from tests.models import TIMESTEPS
from tests.search.conftest import CONFIG
from tfmq_fx.artefact.layout import TENSORS
from tfmq_fx.search.sizes import artefact_bytes, entry_bytes, float_bytes, layer_bytes


def stored(program, folder):
    tfmq_fx.save(program, folder)
    with safe_open(folder / TENSORS, "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  (it is no mapping)


def quantized_bytes(calibrated, folder, overrides):
    """The bytes of all tensors of a program with these overrides, all other layers at eight bits."""
    config = dataclasses.replace(CONFIG, overrides=overrides)
    program = tfmq_fx.quantize(calibrated.program, config, calibrated.rest, timesteps=TIMESTEPS, progress=False)
    return sum(stored(program, folder).values())


def test_the_bytes_are_those_of_the_file(calibrated, tmp_path):
    """The tensors of programs that differ in one layer differ by its bytes, to the last one."""
    layer = calibrated.layer("up.conv2")
    sizes = layer_bytes(calibrated.layers, calibrated.quantizers)[calibrated.layers.index(layer)]
    first, packed, whole = (
        quantized_bytes(calibrated, tmp_path / str(widths), dict([layer.override(widths)])) for widths in layer.options
    )
    words = sum(map(entry_bytes, layer.weights))
    assert packed - first == int(sizes[1] - sizes[0]) - words < 0
    assert whole - first == int(sizes[2] - sizes[0]) > 0


def test_the_artefact_is_measured_as_it_is_saved(calibrated, tmp_path):
    program = tfmq_fx.convert(calibrated.prepared)
    tfmq_fx.save(program, tmp_path / "artefact")
    files = (tmp_path / "artefact").iterdir()
    assert artefact_bytes(program) == sum(file.stat().st_size for file in files)


def test_the_float_model_is_measured_in_float32(calibrated):
    assert float_bytes(calibrated.program) == 4 * sum(p.numel() for p in calibrated.model.parameters())
