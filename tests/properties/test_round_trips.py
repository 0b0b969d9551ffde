"""Round trips (P11): any quantized program, saved and loaded, is bit for bit what it was."""

import tempfile

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tfmq_fx
from tests.models import batch, small_denoiser


@st.composite
def configurations(draw):
    bits = draw(st.sampled_from([2, 3, 4, 6, 7, 8, 16, 32]))
    return tfmq_fx.QuantizationConfig(
        weight_bits=bits,
        activation_bits=draw(st.sampled_from([4, 8, 16, 32])),
        temporal=draw(st.sampled_from(["fsc", "shared", "float"])),
        symmetric_weights=None if bits == 8 else draw(st.booleans()),
        keep_float=draw(st.sampled_from([(), ("input", "output"), ("input", "output", "attention"), ("up.*",)])),
        split_concatenations=draw(st.booleans()),
        unknown_timestep=draw(st.sampled_from(["error", "nearest"])),
    )


@settings(max_examples=6)
@given(
    configurations(),
    st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_saved_and_loaded_programs_are_equal(config, values, fractional, seed):
    x, _ = batch(3, seed)
    timesteps = torch.tensor(values) + (0.25 if fractional else 0)
    t = timesteps[torch.randint(len(timesteps), (3,), generator=torch.Generator().manual_seed(seed))]
    program = tfmq_fx.quantize(small_denoiser(seed), config, [(x, t)], timesteps=timesteps, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        loaded = tfmq_fx.load(tfmq_fx.save(program, f"{folder}/artefact"))
    assert torch.equal(loaded(x, t), program(x, t))
    assert torch.equal(loaded.timesteps, program.timesteps) and loaded.config == program.config
    before, after = (tfmq_fx.lower(p, "reference") for p in (program, loaded))
    assert torch.equal(before(x, t), after(x, t))
    assert before.report == after.report
