import copy

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import CalibrationError, QuantizationConfig
from tfmq_fx.observers import GroupedObserver, PerChannelWeightObserver, PerTensorObserver, TimestepObserver
from tfmq_fx.temporal.calibrate import calibrate_temporal_block


def prepared(config=None):
    return tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), config, timesteps=TIMESTEPS)


def test_batches_may_be_tuples_mappings_and_generators():
    x, t = batch()
    assert tfmq_fx.calibrate(prepared(), [(x, t), {"sample": x, "timestep": t}], progress=False) == 2
    assert tfmq_fx.calibrate(prepared(), (batch(seed=i) for i in range(3)), progress=False) == 3


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "at least one batch"),
        ([(batch()[0] * float("nan"), batch()[1])], "NaN"),
        ([(batch()[0][:, :, :4], batch()[1])], "does not fit"),
        ([(batch()[0],)], "does not fit"),
        ([(batch()[0], batch()[1] + 1)], "none of the calibration timesteps"),
    ],
)
def test_bad_batches_are_one_clear_sentence(batches, words):
    with pytest.raises(CalibrationError, match=words) as caught:
        tfmq_fx.calibrate(prepared(), batches, progress=False)
    assert "\n" not in str(caught.value)


def test_the_temporal_ranges_are_exact_and_need_no_images():
    """Against a naive walk over the block: float weights replaced by quantized ones, one timestep at a time."""
    graph = prepared()
    tfmq_fx.calibrate(graph, [batch(1)], progress=False)
    model = small_denoiser()

    def quantized(linear):
        observer = PerChannelWeightObserver(bits=8, symmetric=True, search=False)
        observer(linear.weight)
        return observer.dequantized()

    def level(x):
        low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        scale = max((high - low) / 255, 1e-8)
        zero = round(-low / scale)
        return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale

    path = model.time
    observers = [m for m in graph.modules() if isinstance(m, TimestepObserver)]
    functional = torch.nn.functional
    with torch.no_grad():
        for row, t in enumerate(TIMESTEPS):
            frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(8) / 8)
            angles = t.float() * frequencies
            x = torch.cat([angles.sin(), angles.cos()])
            y = functional.silu(functional.linear(level(x), quantized(path.one), path.one.bias))
            z = functional.silu(functional.linear(level(y), quantized(path.two), path.two.bias))
            for site, value in zip(observers[:3], (x, y, z), strict=True):
                assert site.low[row].item() == pytest.approx(min(value.min().item(), 0), abs=2e-3)
                assert site.high[row].item() == pytest.approx(value.max().item(), abs=2e-3)


def test_calibrating_the_block_again_changes_nothing():
    graph = prepared()
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    before = {name: value.clone() for name, value in graph.named_buffers()}
    assert calibrate_temporal_block(graph) == 3
    for name, value in graph.named_buffers():
        if "temporal_observer" in name:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("timestep", [torch.tensor(100), torch.tensor([100])])
def test_the_captured_form_of_the_timestep_does_not_matter(timestep):
    x, _ = batch(2)

    class Scalar(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_denoiser()

        def forward(self, sample, timestep):
            return self.inner(sample, timestep.reshape(-1) * torch.ones(sample.shape[0], dtype=torch.int64))

    dynamic = timestep.ndim == 0
    program = tfmq_fx.capture(Scalar(), (x, timestep), dynamic_batch=dynamic)
    scalar = tfmq_fx.prepare(program, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(scalar, [(x, timestep)], progress=False)
    ours = [m for m in scalar.modules() if isinstance(m, TimestepObserver)]
    graph = prepared()
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    theirs = [m for m in graph.modules() if isinstance(m, TimestepObserver)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.low, b.low, atol=1e-5) and torch.allclose(a.high, b.high, atol=1e-5)


def test_mse_ranges():
    graph = prepared(QuantizationConfig(activation_range="mse"))
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    model, (x, t) = small_denoiser(), batch()
    with torch.no_grad():
        error = (tfmq_fx.convert(graph)(x, t) - model(x, t)).norm() / model(x, t).norm()
    assert error < 0.05


def test_minmax_ranges_hold_all_that_was_seen_and_ema_ranges_less():
    batches = [batch(8, seed=i) for i in range(6)]
    widths = {}
    for choice in ("minmax", "ema"):
        graph = prepared(QuantizationConfig(activation_range=choice, activation_groups=1, defer_softmax=False))
        tfmq_fx.calibrate(graph, batches, progress=False)
        observers = [
            m for n, m in graph.named_modules() if n.startswith("activation_post_process") and "temporal" not in n
        ]
        scales = [m.calculate_qparams()[0] for m in observers if getattr(m, "qscheme", None) == torch.per_tensor_affine]
        widths[choice] = torch.cat([scale.reshape(-1) for scale in scales])
    assert len(widths["ema"]) == len(widths["minmax"]) > 5
    assert bool((widths["minmax"] >= widths["ema"] * 0.999).all()) and bool((widths["minmax"] > widths["ema"]).any())


def scales(batches, **config):
    graph = prepared(QuantizationConfig(**config))
    tfmq_fx.calibrate(graph, batches, progress=False)
    found = {}
    for name, module in graph.named_modules():
        if isinstance(module, PerTensorObserver | GroupedObserver):
            found[name] = module.calculate_qparams()[0]
    assert len(found) > 8
    return found


def items_of(count=96):
    """Items of every timestep, in random order."""
    x, t = batch(count, seed=3)
    return x * (1 + t / 200)[:, None, None, None], t


@pytest.mark.parametrize(
    "config", [{}, {"activation_groups": 1}, {"activation_range": "minmax"}, {"activation_groups": 3}]
)
@pytest.mark.parametrize("size", [1, 7, 32])
def test_ranges_do_not_depend_on_how_items_were_cut_into_batches(config, size):
    x, t = items_of()
    whole = scales([(x, t)], **config)
    cut = scales(zip(x.split(size), t.split(size), strict=True), **config)
    for name, scale in whole.items():
        assert torch.allclose(scale, cut[name], rtol=1e-5), name


@pytest.mark.parametrize("groups", [1, 3])
def test_batches_of_one_timestep_are_smoothed_over_timesteps(groups):
    """Recorded trajectories have batches of one timestep: the moving average over them is the one over timesteps."""
    x, t = items_of()
    by_timestep = [(x[t == value], t[t == value]) for value in dict.fromkeys(t.tolist())]
    by_timestep = [(x[:8], t[:8]) for x, t in by_timestep if len(t) >= 8]
    config = QuantizationConfig(activation_groups=groups, scale_channels=False)
    graph = prepared(config)
    for args in by_timestep:
        graph(*args)
    calibrated = scales(by_timestep, activation_groups=groups, scale_channels=False)
    observers = {name: graph.get_submodule(name) for name in calibrated}
    assert len(by_timestep) >= 5
    assert all(torch.equal(observers[name].calculate_qparams()[0], scale) for name, scale in calibrated.items())


def test_few_items_are_taken_together_with_their_neighbours():
    """A range of one item each would be too narrow: it is that of all where there are fewer than eight."""
    x, t = batch(6, seed=3)
    graph = prepared()
    tfmq_fx.calibrate(graph, [(x, t)], progress=False)
    plain = prepared(QuantizationConfig(activation_range="minmax"))
    tfmq_fx.calibrate(plain, [(x, t)], progress=False)
    for name, module in graph.named_modules():
        if isinstance(module, PerTensorObserver):
            assert torch.allclose(module.calculate_qparams()[0], plain.get_submodule(name).calculate_qparams()[0])


def test_calibrating_in_two_runs_is_calibrating_in_one():
    x, t = items_of()
    graph = prepared(QuantizationConfig(scale_channels=False))  # which channels are scaled, the first run decides
    for half in (slice(0, 48), slice(48, 96)):
        tfmq_fx.calibrate(graph, [(x[half], t[half])], progress=False)
    together = scales([(x, t)], scale_channels=False)
    for name, scale in together.items():
        assert torch.allclose(graph.get_submodule(name).calculate_qparams()[0], scale, rtol=1e-5)


def test_without_a_timestep_ranges_are_smoothed_over_batches():
    model = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(size * torch.randn(2, 4, 8, 8, generator=generator),) for size in (1.0, 4.0, 2.0)]
    captured = tfmq_fx.capture(model, batches[0])
    at_once, in_two_runs, by_hand = (
        prepare_pt2e(copy.deepcopy(captured), tfmq_fx.TFMQQuantizer(QuantizationConfig(keep_float=())))
        for _ in range(3)
    )
    tfmq_fx.calibrate(at_once, batches, progress=False)
    tfmq_fx.calibrate(in_two_runs, batches[:1], progress=False)
    tfmq_fx.calibrate(in_two_runs, batches[1:], progress=False)
    for args in batches:
        by_hand(*args)
    names = [name for name, module in by_hand.named_modules() if isinstance(module, PerTensorObserver)]
    assert names
    for name in names:
        scale = by_hand.get_submodule(name).calculate_qparams()[0]
        assert all(
            torch.equal(graph.get_submodule(name).calculate_qparams()[0], scale) for graph in (at_once, in_two_runs)
        )
