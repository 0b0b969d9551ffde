"""Activation ranges by timestep group, from the configuration to the denoiser."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, Block, SmallDenoiser, TimePath, batch, relative, small_denoiser
from tests.processor import needs_exact_sums, on_integer_kernels
from tests.reconstruction_cases import BATCHES, SCALAR_BATCHES, ScalarDenoiser, calibrated, rec
from tfmq_fx import CalibrationError, ConfigError, LoweringError, QuantizationConfig
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.fake_quantizers import GroupedQuantizer
from tfmq_fx.lowering.backends.inductor import backend, native
from tfmq_fx.lowering.plan import folded_graph, with_lookups_written_out
from tfmq_fx.lowering.report.eligibility import classify
from tfmq_fx.lowering.report.reasons import PER_ROW
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.observers import GroupedMSEObserver, GroupedObserver
from tfmq_fx.passes import LowerIndexedConvs, UseOneTimestepGroup
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.temporal.use_one_timestep_group import find_grouped_quantizers


def noisy(timesteps, *, size=4):
    """One batch per timestep; the later, the louder, as the input of a network under a variance-exploding schedule."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(timesteps), size, 1, 8, 8, generator=generator)
    loud = (timesteps.double() / 150).exp().float()
    return [(x[i] * loud[i], timesteps[i].expand(size)) for i in range(len(timesteps))]


class Unnormalized(SmallDenoiser):
    """Without normalization the activations are as loud as the input."""

    def __init__(self):
        super().__init__()
        self.down.norm, self.up.norm = nn.Identity(), nn.Identity()


@functools.cache
def program(groups=10, model=SmallDenoiser, **config):
    torch.manual_seed(0)
    config = QuantizationConfig(
        **{"activation_groups": groups, "activation_range": "minmax", "shortcut_bits": None, **config}
    )
    return tfmq_fx.quantize(model().eval(), config, noisy(TIMESTEPS), timesteps=TIMESTEPS, progress=False)


def test_a_range_per_group_serves_timesteps_that_one_range_does_not():
    torch.manual_seed(0)
    model, (x, t) = Unnormalized().eval(), noisy(TIMESTEPS)[0]
    with torch.no_grad():
        wanted = model(x, t)
    errors = [relative(program(groups, Unnormalized)(x, t), wanted) for groups in (1, 3, 10)]
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0]
    # More groups than timesteps are one per timestep.
    assert torch.equal(program(10, Unnormalized)(x, t), program(1000, Unnormalized)(x, t))


@pytest.mark.parametrize("activation_range", ["ema", "minmax", "mse"])
def test_one_range_per_timestep_is_that_of_a_program_for_this_timestep_alone(activation_range):
    alike = {"activation_range": activation_range, "weight_bits": 32, "scale_channels": False, "shortcut_bits": None}
    every = program(10, **alike)
    torch.manual_seed(0)
    captured = tfmq_fx.capture(SmallDenoiser().eval(), batch())
    for index in (0, 7):
        # Observers of one group have the same arithmetic, which the search needs to agree to the bit.
        config = QuantizationConfig(**alike, activation_groups=2)
        prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
        tfmq_fx.calibrate(prepared, noisy(TIMESTEPS)[index : index + 1], progress=False)
        x, t = noisy(TIMESTEPS)[index]
        assert torch.equal(every(x, t), tfmq_fx.convert(prepared)(x, t))


@pytest.mark.parametrize("temporal", ["fsc", "shared", "observed", "float", "cache"])
def test_a_mixed_batch_is_its_items_apart_and_the_temporal_block_is_as_before(temporal):
    ours, plain = program(4, temporal=temporal), program(1, temporal=temporal)
    x, t = batch(6)
    apart = torch.cat([ours(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    assert relative(apart, ours(x, t)) < 1e-5
    blocks = [find_temporal_block(p.graph_module) for p in (ours, plain)]
    assert [len(block.linears) for block in blocks] == [0 if temporal == "cache" else 4] * 2
    assert len(blocks[0].features) == len(blocks[1].features)
    # The table of features holds no scales.
    reference = tfmq_fx.lower(ours, "reference")
    assert torch.allclose(reference(x, t), ours(x, t), atol=1e-5) and reference.report.temporal_layers == 0
    assert (
        len(find_grouped_quantizers(reference._compiled[0].runs[-1]))
        == len(find_grouped_quantizers(ours.graph_module))
        > 0
    )
    assert sum(entry.reason == PER_ROW for entry in reference.report.entries) == 7


@pytest.mark.parametrize("bits", [4, 8])
def test_save_and_load_are_bit_for_bit(bits, tmp_path):
    ours = program(4, activation_bits=bits)
    loaded = tfmq_fx.load(tfmq_fx.save(ours, tmp_path / "artefact"))
    assert loaded.config.activation_groups == 4
    for size in (1, 5):
        x, t = batch(size)
        assert torch.equal(loaded(x, t), ours(x, t))
    assert len(find_grouped_quantizers(loaded.graph_module)) == len(find_grouped_quantizers(ours.graph_module))


def test_an_added_timestep_joins_the_group_of_the_nearest():
    ours = program(5)
    grown = tfmq_fx.add_timesteps(ours, [5, 333, 990])
    assert ours.graph_module.timestep_groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert grown.graph_module.timestep_groups.tolist()[10:] == [0, 1, 4]
    x, t = batch()
    assert torch.equal(grown(x, t), ours(x, t))
    lowered = tfmq_fx.lower(grown, "reference")
    new = torch.tensor([333, 5, 990, 0])
    assert torch.allclose(lowered(x, new), grown(x, new), atol=1e-5)


@pytest.mark.parametrize("scalar", [False, True])
def test_reconstruction_simulates_the_groups(scalar):
    graph = calibrated(scalar=scalar, activation_groups=3)
    grouped = [m for m in graph.modules() if isinstance(m, GroupedQuantizer)]
    assert grouped and all(m.scale.shape == (3,) for m in grouped)
    before = copy.deepcopy(graph)
    batches = SCALAR_BATCHES if scalar else BATCHES
    report = rec(graph, batches, iterations=30, temporal_iterations=30, learned_steps=True)
    trained = [unit for unit in report.units if unit.iterations]
    assert [unit.name.removeprefix("inner.") for unit in trained] == ["temporal block", "down", "qkv", "up"]
    assert all(unit.after <= unit.before for unit in trained) and any(
        unit.after < 0.95 * unit.before for unit in trained
    )
    x, t = batch(6)
    with torch.no_grad():
        t = t[0] if scalar else t
        learned, nearest = graph(x, t), before(x, t)
        wanted = (ScalarDenoiser if scalar else small_denoiser)().eval()(x, t)
    assert relative(learned, wanted) < relative(nearest, wanted)
    assert relative(tfmq_fx.convert(graph)(x, t), learned) < 1e-2


def test_what_does_not_change_with_the_noise_keeps_one_range():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.block, self.text = TimePath(), Block(4, 4), nn.Linear(8, 4)
            self.enter, self.leave = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, sample, timestep, prompt):
            x = self.block(self.enter(sample), self.time(timestep))
            return self.leave(x + self.text(prompt)[:, :, None, None])

    inputs = (*batch(), torch.randn(4, 8))
    config = QuantizationConfig(activation_groups=3)
    prepared = tfmq_fx.prepare(tfmq_fx.capture(Prompted().eval(), inputs), config, timesteps=TIMESTEPS)
    readers = {
        user.target if user.op != "call_function" else str(user.args[1])
        for node in prepared.graph.nodes
        if node.op == "call_module" and isinstance(prepared.get_submodule(node.target), GroupedObserver)
        for user in node.users
    }
    text = [n for n in prepared.graph.nodes if n.target is torch.ops.aten.linear.default and "text" in str(n.args[1:])]
    assert len(readers) == 2 and not PreparedState.of(prepared).ungrouped
    (observer,) = [prepared.get_submodule(node.args[0].target) for node in text]
    assert not isinstance(observer, GroupedObserver)


def test_a_layer_whose_items_are_not_in_order_is_named():
    class SequenceFirst(SmallDenoiser):
        def forward(self, sample, timestep):
            x = super().forward(sample, timestep)
            tokens = x.flatten(2).permute(2, 0, 1).reshape(-1, 1).expand(-1, 8)
            lost = self.qkv(tokens).mean(1).reshape(64, -1).t().reshape(x.shape)
            return nn.functional.conv2d(x + lost, self.leave.weight[:, :1], padding=1)

    captured = tfmq_fx.capture(SequenceFirst().eval(), batch())
    config = QuantizationConfig(activation_groups=3, keep_float=())
    with pytest.warns(UserWarning, match="1 layers keep one activation range for all timestep groups, 'qkv'"):
        prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    assert list(PreparedState.of(prepared).ungrouped) == ["qkv"]


def test_overridden_widths_hold_group_by_group():
    ours = program.__wrapped__(3, overrides={"down.conv2": {"activation_bits": 4}, "up.conv1": {"activation_bits": 32}})
    limits = [node.args[5] for node in find_grouped_quantizers(ours.graph_module)]
    assert limits.count(15) == 1 and len(limits) == len(find_grouped_quantizers(program(3).graph_module)) - 1


def test_bad_use_is_one_clear_sentence():
    for wrong in (0, -1, 2.0, True, "all"):
        with pytest.raises(ConfigError, match="activation_groups="):
            QuantizationConfig(activation_groups=wrong)
    captured = tfmq_fx.capture(small_denoiser(), batch())
    with pytest.raises(ConfigError, match=r"pass timesteps=scheduler\.timesteps"):
        tfmq_fx.prepare(captured, QuantizationConfig(activation_groups=2, temporal="float"))
    with pytest.raises(ConfigError, match="no input 'timestep'"):
        tfmq_fx.prepare(
            tfmq_fx.capture(nn.Linear(3, 3), (torch.randn(2, 3),)),
            QuantizationConfig(activation_groups=2, temporal="float"), timesteps=TIMESTEPS,
        )  # fmt: skip
    prepared = tfmq_fx.prepare(captured, QuantizationConfig(activation_groups=2), timesteps=TIMESTEPS)
    with pytest.raises(CalibrationError, match="never observed"):
        tfmq_fx.convert(prepared)


def test_the_range_decides_the_observer():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    config = QuantizationConfig(activation_groups=40, activation_range="mse")
    prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    found = [m for m in prepared.modules() if isinstance(m, GroupedObserver)]
    assert found and all(isinstance(m, GroupedMSEObserver) and len(m.low) == 10 for m in found)


# -- kernels: one group a call ----------------------------------------------------------------------------------------


def denoiser_of_kernels(ours, *, integer=True, max_batch=None, calls=None):
    """A denoiser as the compiling backends make it, but eager; ``calls`` collects the timesteps of its calls."""
    graph_module = with_lookups_written_out(folded_graph(ours))
    UseOneTimestepGroup()(graph_module)
    report = LoweringReport("by hand", tuple(classify(graph_module, ours.kept_float)))
    if integer:
        LowerIndexedConvs()(graph_module)
    groups = graph_module.timestep_groups
    interface = replace(ours.interface, max_batch=max_batch)

    def run(x, t):
        if calls is not None:
            calls.append(t.tolist())
        return graph_module(x, t)

    options = {"timesteps": ours.timesteps, "groups": groups, "unknown": "error", "report": report}
    return Denoiser(run, interface, timestep="timestep", **options), graph_module


@needs_exact_sums
def test_a_batch_that_mixes_groups_is_split_and_put_together():
    ours = program(4)
    denoiser, _ = denoiser_of_kernels(ours, integer=False)
    assert sum(entry.eligible for entry in denoiser.report.entries) == 7
    for size in (1, 2, 9):
        x, t = batch(size)
        assert relative(denoiser(x, t), ours(x, t)) < 1e-5
    calls = []
    denoiser, _ = denoiser_of_kernels(ours, max_batch=2, calls=calls)
    x, _ = batch(5)
    t = torch.tensor([900, 0, 100, 900, 0])
    assert relative(denoiser(x, t), ours(x, t)) < 1e-5
    # Groups of 4: 0 and 100 (and 200) are one, 900 another; at most two items a call.
    assert calls == [[0, 100], [0], [900, 900]]


@needs_exact_sums
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_the_integer_kernels_compute_what_the_reference_does(weight_bits):
    ours = program(4, weight_bits=weight_bits)
    denoiser, graph_module = denoiser_of_kernels(ours)
    targets = [str(node.target) for node in graph_module.graph.nodes]
    assert targets.count("onednn.qconv_pointwise.tensor") == 6
    x, t = batch(7)
    assert relative(denoiser(x, t), ours(x, t)) < 1e-4


@needs_exact_sums
def test_a_fixed_batch_cannot_be_split():
    config = QuantizationConfig(activation_groups=4)
    captured = tfmq_fx.capture(small_denoiser(), batch(2), dynamic_batch=False)
    prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [batch(2, seed) for seed in range(6)], progress=False)
    ours = tfmq_fx.convert(prepared)
    denoiser, _ = denoiser_of_kernels(ours)
    x, _ = batch(2)
    assert relative(denoiser(x, 100), ours(x, torch.tensor([100, 100]))) < 1e-4
    with pytest.raises(LoweringError, match="capture it with dynamic_batch=True"):
        denoiser(x, torch.tensor([0, 900]))


def test_inductor_runs_convs_and_linears_with_tensor_parameters_on_integer_kernels(monkeypatch):
    """On oneDNN's kernels, which take one set of parameters a call, as a tensor; ours take any mix."""
    for module in (backend, native):
        monkeypatch.setattr(module, "has_native_kernels", lambda: False)
    ours = program(4, activation_range="ema")
    denoiser = tfmq_fx.lower(ours, "inductor")
    assert denoiser.report.eligible == 7 and on_integer_kernels(denoiser.report, 7)
    for size in (1, 7):
        x, t = batch(size)
        assert relative(denoiser(x, t), ours(x, t)) < 1e-3
    assert relative(denoiser(x, 300), ours(x, torch.full((7,), 300))) < 1e-3
