import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, SmallDenoiser, batch, relative, small_denoiser, tiny_unet
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


# --- fractional timesteps ---------------------------------------------------------------------------


def test_fractional_timesteps_are_added_to_a_diffusers_model():
    """It multiplies its timestep by whole ones before it becomes a float."""
    model, (x, t), new = tiny_unet().eval(), batch(), torch.tensor([908.1818, 0.25, 55.5, 100.0])
    program = tfmq_fx.quantize(model, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
    grown = tfmq_fx.add_timesteps(program, new.tolist())
    with torch.no_grad():
        assert relative(grown(x, new).sample, model(x, new).sample) < 0.05
    assert torch.equal(grown(x, t).sample, program(x, t).sample)


def test_fractional_timesteps_are_added_to_a_program_of_whole_ones(tmp_path):
    """Those of Euler's linspace and of Karras' sigmas."""
    model, (x, t), new = small_denoiser(), batch(), torch.tensor([908.1818, 0.25, 55.5, 100.0])
    program = tfmq_fx.quantize(model, None, [(x, t)], timesteps=TIMESTEPS, progress=False)
    grown = tfmq_fx.add_timesteps(program, new.tolist())
    assert torch.equal(grown(x, t), program(x, t))
    with torch.no_grad():
        wanted = model(x, new)
    assert relative(grown(x, new), wanted) < 0.05
    tfmq_fx.save(grown, tmp_path / "grown")
    loaded = tfmq_fx.load(tmp_path / "grown")
    assert torch.equal(loaded(x, new), grown(x, new))
    denoiser = tfmq_fx.lower(loaded, "reference", unknown_timestep="error")
    assert relative(denoiser(x, new), wanted) < 0.05
    assert torch.equal(denoiser(x, t), denoiser(x, t.float()))
    with pytest.raises(tfmq_fx.TimestepError, match="timestep 908 is not in the table"):
        denoiser(x, 908)


@pytest.mark.parametrize("temporal", ["fsc", "shared", "cache"])
def test_a_program_is_quantized_for_fractional_timesteps_as_if_they_had_been_added(temporal):
    config, new = QuantizationConfig(temporal=temporal), torch.tensor([908.1818, 0.25])
    built = quantized(torch.cat([TIMESTEPS.double(), new.double()]), config)
    x, _ = batch(2)
    with torch.no_grad():
        assert relative(tfmq_fx.lower(built, "reference")(x, new), small_denoiser()(x, new)) < 0.03
    if temporal == "fsc":
        assert torch.equal(built(x, new), tfmq_fx.add_timesteps(quantized(TIMESTEPS), new)(x, new))


class WholeDenoiser(SmallDenoiser):
    """One that casts its timestep to another integer."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep.long())


def test_a_model_that_casts_its_timestep_to_integers_says_so():
    torch.manual_seed(0)
    model, (x, t) = WholeDenoiser().eval(), batch()
    program = tfmq_fx.quantize(model, None, [(x, t.int())], timesteps=TIMESTEPS, progress=False)
    words = (
        r"timestep 908\.182 is fractional, .* captured with int32 timesteps and 'to' takes them as integers: capture"
    )
    with pytest.raises(tfmq_fx.ConfigError, match=words) as caught:
        tfmq_fx.add_timesteps(program, [908.1818])
    assert "\n" not in str(caught.value)
    with pytest.raises(tfmq_fx.ConfigError, match=words):
        tfmq_fx.prepare(tfmq_fx.capture(model, (x, t.int())), timesteps=[908.1818])
    # Captured with a float one, the model truncates by itself, and so does the program.
    floats = tfmq_fx.quantize(model, None, [(x, t.float())], timesteps=TIMESTEPS, progress=False)
    grown, new = tfmq_fx.add_timesteps(floats, [908.1818]), torch.full((4,), 908.1818)
    with torch.no_grad():
        assert relative(grown(x, new), model(x, new)) < 0.03


def test_timesteps_of_another_precision_are_in_the_table_already():
    table = torch.linspace(0, 999, 10, dtype=torch.float64)
    x, _ = batch(10)
    program = tfmq_fx.quantize(small_denoiser(), None, [(x, table.float())], timesteps=table, progress=False)
    assert len(tfmq_fx.add_timesteps(program, table.float()).timesteps) == 10
    assert len(tfmq_fx.add_timesteps(program, table + 0.01).timesteps) == 20


def test_small_noise_levels_are_added_as_rows_of_their_own():
    sigmas = torch.tensor([0.0002, 1e-5, 0.0])
    program = tfmq_fx.quantize(
        small_denoiser(), None, [(batch(3)[0], sigmas)], timesteps=sigmas.double(), progress=False
    )
    assert len(tfmq_fx.add_timesteps(program, [0.00025, 8e-5, 1e-6]).timesteps) == 6
