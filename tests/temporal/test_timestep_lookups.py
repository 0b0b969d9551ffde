"""Timesteps meet the table on every backend: which row, in which dtype, and what an unknown one does."""

import copy
import functools

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, TimePath, batch, relative, small_denoiser
from tfmq_fx import ConfigError, QuantizationConfig, TimestepError
from tfmq_fx.lowering.backends.registry import available_backends, find_backend
from tfmq_fx.passes import IndexTimesteps, InlineTimestepRows
from tfmq_fx.passes.analysis import find_row
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.testing import GraphBuilder

SIGMAS = [80.0, 10.0, 1.0, 0.1, 0.02, 0.002, 0.0002, 1e-5, 0.0]
REFUSES = QuantizationConfig(unknown_timestep="error")
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in available_backends(), reason=f"{name} is not installed"))
    for name in ("openvino", "onnxruntime")
]


@functools.cache
def sigma_program():
    """A model that sees noise levels, small ones too."""
    x, _ = batch(len(SIGMAS))
    sigmas = torch.tensor(SIGMAS)
    return tfmq_fx.quantize(small_denoiser(), REFUSES, [(x, sigmas)], timesteps=sigmas, progress=False)


@functools.cache
def program(**changes):
    config = QuantizationConfig(**{"unknown_timestep": "error", **changes})
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)


def expected(timesteps):
    with torch.no_grad():
        return small_denoiser()(batch(len(timesteps))[0], timesteps)


# --- the written-out search on compilers and engines -------------------------------------------------


def asked(dtype):
    """On every value, inside and outside its tolerance, between two, beyond the ends."""
    values = [sigma * (1 + off) for sigma in SIGMAS for off in (0, 2**-20, -(2**-17), 0.3)]
    return torch.tensor([*values, 5.5, 45.0, 1e30, -3.0, float("nan")], dtype=torch.float64).to(dtype)


def lookup(timesteps, unknown):
    builder = GraphBuilder(batch=len(timesteps))
    t = builder.placeholder("timestep", tuple(timesteps.shape), timesteps.dtype)
    x = builder.placeholder("sample", tuple(timesteps.shape))
    graph_module = builder.build(t)
    IndexTimesteps(SIGMAS, unknown=unknown)(graph_module)
    graph_module.graph.output_node().args = ((find_row(graph_module), x),)
    InlineTimestepRows()(graph_module)
    graph_module.recompile()
    search = ValueSearch(torch.tensor(SIGMAS, dtype=torch.float64))
    return graph_module, search.find(timesteps)[0] if unknown == "error" else search.nearest(timesteps)[0]


@pytest.mark.parametrize("unknown", ["error", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_finds_the_same_rows(dtype, unknown):
    timesteps = asked(dtype)
    graph_module, wanted = lookup(timesteps, unknown)
    rows, _ = torch.compile(graph_module, dynamic=False)(timesteps, torch.zeros(len(timesteps)))
    assert torch.equal(rows, wanted)


@pytest.mark.parametrize("unknown", ["error", "nearest"])
@pytest.mark.parametrize("backend", ENGINES)
def test_engines_find_the_same_rows(backend, unknown):
    timesteps = asked(torch.float32)
    graph_module, wanted = lookup(timesteps, unknown)
    run, _ = find_backend(backend).compile_graph(graph_module, len(timesteps), "f32")
    rows, _ = run(timesteps, torch.zeros(len(timesteps)))
    # An engine's comparison with what is no number may say anything; the denoiser names it first.
    assert torch.equal(rows[:-1], wanted[:-1])


# --- a table of noise levels ------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0021, 0.00025, 8e-5, 1e-6])
def test_a_small_noise_level_is_not_served_as_its_neighbour(sigma):
    x, _ = batch(4)
    with pytest.raises(TimestepError, match=f"timestep {sigma:g} is not in the table"):
        sigma_program()(x, torch.full((4,), sigma))
    with pytest.raises(TimestepError, match=f"timestep {sigma:g} is not in the table"):
        tfmq_fx.lower(sigma_program(), "reference")(x, sigma)
    grown = tfmq_fx.add_timesteps(sigma_program(), [sigma])
    assert relative(grown(x, torch.full((4,), sigma)), expected(torch.full((4,), sigma))) < 0.03


@pytest.mark.parametrize("backend", ["reference", *ENGINES])
def test_a_table_over_seven_decades_serves_every_row_and_zero(backend):
    denoiser, x = tfmq_fx.lower(sigma_program(), backend), batch(len(SIGMAS))[0]
    sigmas = torch.tensor(SIGMAS)
    assert relative(denoiser(x, sigmas), expected(sigmas)) < 0.03
    assert torch.equal(denoiser(x, sigmas.double()), denoiser(x, sigmas))


# --- low precision ----------------------------------------------------------------------------------


def test_a_bfloat16_timestep_is_matched_where_the_model_was_captured_with_one_and_else_refused():
    schedule, x = torch.arange(981, 0, -100), batch(10)[0]
    rounded = schedule.to(torch.bfloat16)
    assert not torch.equal(rounded.double(), schedule.double())
    wanted = expected(rounded)
    made = tfmq_fx.quantize(small_denoiser(), None, [(x, rounded)], timesteps=schedule, progress=False)
    denoiser = tfmq_fx.lower(made, "reference")
    assert relative(made(x, rounded), wanted) < 0.03 and relative(denoiser(x, rounded), wanted) < 0.03
    assert relative(denoiser(x, schedule), wanted) < 0.03
    # Captured with whole timesteps, 980 is not 981: the float model computes with 980, the table would with 981.
    made = tfmq_fx.quantize(small_denoiser(), REFUSES, [(x, schedule)], timesteps=schedule, progress=False)
    with pytest.raises(TimestepError, match="timestep 980 is not in the table"):
        made(x, rounded)
    with pytest.raises(TimestepError, match=r"timestep 980 in bfloat16 is not .*nearest: 981\), and bfloat16 rounds"):
        tfmq_fx.lower(made, "reference")(x, rounded)


def test_a_schedule_that_bfloat16_blurs_is_refused_when_it_was_captured_so():
    x, _ = batch(4)
    captured = tfmq_fx.capture(small_denoiser(), (x, torch.tensor([980, 960, 940, 920], dtype=torch.bfloat16)))
    with pytest.raises(ConfigError, match="timestep 981 cannot be told from its neighbours in bfloat16"):
        tfmq_fx.prepare(captured, timesteps=[981, 979])
    tfmq_fx.prepare(captured, timesteps=[981, 961, 941, 921])


# --- what an unknown timestep does ------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"temporal": "shared"}, {"temporal": "cache"}], ids=str)
def test_the_policy_is_chosen_when_the_program_is_lowered(config):
    made, (x, _) = program(**config), batch()
    before = str(made.graph_module.graph)
    nearest = tfmq_fx.lower(made, "reference", unknown_timestep="nearest")
    assert torch.equal(nearest(x, 104.0), nearest(x, 100))
    with pytest.raises(TimestepError, match="nan is no finite number"):
        nearest(x, float("nan"))
    assert made.config.unknown_timestep == "error" and str(made.graph_module.graph) == before
    for denoiser in (tfmq_fx.lower(made, "reference"), tfmq_fx.lower(made, "reference", unknown_timestep="error")):
        stored = config.get("temporal") == "cache"
        advice = "no temporal block to compute" if stored else "or lower with unknown_timestep='extend'"
        with pytest.raises(TimestepError, match=f"104.*{advice}"):
            denoiser(x, 104)


def test_a_program_for_the_nearest_row_may_be_lowered_to_refuse():
    made, (x, _) = program(unknown_timestep="nearest"), batch()
    assert torch.equal(tfmq_fx.lower(made, "reference")(x, 104), tfmq_fx.lower(made, "reference")(x, 100))
    with pytest.raises(TimestepError, match="timestep 104 "):
        tfmq_fx.lower(made, "reference", unknown_timestep="error")(x, 104)
    with pytest.raises(ConfigError, match="unknown_timestep='ignore' is not supported"):
        tfmq_fx.lower(made, "reference", unknown_timestep="ignore")


class Linears(nn.Module):
    """A temporal block and next to nothing behind it, which compiles fast."""

    def __init__(self):
        super().__init__()
        self.time, self.embed, self.leave = TimePath(), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample, timestep):
        return self.leave(sample + self.embed(nn.functional.silu(self.time(timestep))))


@functools.cache
def linears():
    torch.manual_seed(0)
    model, sigmas = Linears().eval(), torch.tensor(SIGMAS)
    made = tfmq_fx.quantize(model, REFUSES, [(torch.randn(9, 16), sigmas)], timesteps=sigmas, progress=False)
    return model, made


def check_nearest(denoiser):
    """Every row is served, and next to it what is near."""
    (model, _), sigmas, x = linears(), torch.tensor(SIGMAS), torch.randn(9, 16)
    with torch.no_grad():
        assert relative(denoiser(x, sigmas), model(x, sigmas)) < 0.03
    # Half way between two, the first of the table.
    assert torch.equal(denoiser(x, sigmas * 1.1), denoiser(x, sigmas))
    assert torch.equal(denoiser(x, 45.0), denoiser(x, 80.0))
    with pytest.raises(TimestepError, match="inf is no finite number"):
        denoiser(x, float("inf"))


@pytest.mark.parametrize("backend", ["inductor", *ENGINES])
def test_the_nearest_row_on_compiled_backends(backend):
    check_nearest(tfmq_fx.lower(linears()[1], backend, unknown_timestep="nearest"))


def test_a_package_is_asked_for_the_nearest_row_when_it_is_loaded(tmp_path):
    path = tmp_path / "linears.pt2"
    tfmq_fx.lower(linears()[1], "aot", path=path)
    check_nearest(tfmq_fx.load_denoiser(path, unknown_timestep="nearest"))
    with pytest.raises(TimestepError, match="timestep 104 "):
        tfmq_fx.load_denoiser(path)(torch.randn(9, 16), 104)
    with pytest.raises(ConfigError, match="unknown_timestep='ignore' is not supported"):
        tfmq_fx.load_denoiser(path, unknown_timestep="ignore")


def test_timestep_groups_are_found_by_the_same_search():
    made = tfmq_fx.quantize(
        small_denoiser(),
        QuantizationConfig(activation_groups=3),
        [(batch(10)[0], TIMESTEPS)],
        timesteps=TIMESTEPS,
        progress=False,
    )
    reference, (x, _) = copy.deepcopy(made), batch(3)
    denoiser = tfmq_fx.lower(made, "reference", unknown_timestep="nearest")
    t = torch.tensor([0, 500, 900])
    assert relative(denoiser(x, t + 4), reference(x, t)) < 1e-3
