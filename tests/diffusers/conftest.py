"""Models that were quantized once, for all tests of this room."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.diffusers.pipelines import CASES
from tfmq_fx import QuantizedProgram
from tfmq_fx.diffusers import to_diffusers


@pytest.fixture(scope="session")
def quantized():
    """The program of a case, by name."""

    @functools.cache
    def quantize(name: str) -> QuantizedProgram:
        return CASES[name].quantize()

    return quantize


@pytest.fixture(scope="session")
def saved(quantized, tmp_path_factory):
    """The folder of a pipeline with its quantized model, by name; not to be written to."""

    @functools.cache
    def save(name: str) -> Path:
        case = CASES[name]
        pipeline = case.pipeline()
        setattr(pipeline, case.component, to_diffusers(quantized(name), "reference"))
        folder = tmp_path_factory.mktemp(name)
        pipeline.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def unet(quantized):
    """The UNet of Stable Diffusion, quantized."""
    return to_diffusers(quantized("sd"), "reference")
