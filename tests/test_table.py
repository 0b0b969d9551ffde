import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import QuantizationConfig


def quantized(timesteps, config=None):
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=timesteps, progress=False)


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_added_timesteps_are_those_of_a_program_built_with_them(temporal):
    config = QuantizationConfig(temporal=temporal)
    program = quantized(TIMESTEPS, config)
    grown = tfmq_fx.add_timesteps(program, [55, 777, 100])
    x, t = batch()
    assert torch.equal(grown(x, t), program(x, t))
    assert len(program.timesteps) == 10 and grown.timesteps.tolist() == [*TIMESTEPS.tolist(), 55, 777]
    new = torch.tensor([55, 777, 55, 100])
    if temporal == "fsc":
        built = quantized(torch.cat([TIMESTEPS, torch.tensor([55, 777])]), config)
        assert torch.equal(grown(x, new), built(x, new))
    lowered = tfmq_fx.lower(grown, backend="reference")
    assert torch.allclose(lowered(x, new), grown(x, new), atol=1e-5)


def test_nothing_to_add_changes_nothing():
    program = quantized(TIMESTEPS)
    assert torch.equal(tfmq_fx.add_timesteps(program, TIMESTEPS).timesteps, program.timesteps)


def test_a_program_without_a_table_is_refused():
    program = tfmq_fx.quantize(
        torch.nn.Linear(3, 3), QuantizationConfig(temporal="float"), [(torch.randn(2, 3),)], progress=False
    )
    with pytest.raises(tfmq_fx.ConfigError, match="no timestep table"):
        tfmq_fx.add_timesteps(program, [1])
