"""The parts of reconstruction alone: samples, memory, errors, Fisher information, state on disk."""

import gc
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, batch, small_denoiser
from tests.reconstruction_cases import BATCHES, SCALAR_BATCHES, calibrated
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.passes import PartitionUnits
from tfmq_fx.reconstruction.checkpoint import Checkpoint, fingerprint
from tfmq_fx.reconstruction.fisher import fisher_information
from tfmq_fx.reconstruction.report import ReconstructionReport, UnitResult
from tfmq_fx.reconstruction.samples import Samples, Window, gather_samples
from tfmq_fx.reconstruction.store import ActivationStore
from tfmq_fx.reconstruction.unit_error import channel_axis, unit_error
from tfmq_fx.reconstruction.values import Batches, PerSample, Size, collect, in_window


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- samples ----------------------------------------------------------------------------------------


def rows_of(samples):
    """Every row as (sum of the image, timestep): what belongs together."""
    x, t = samples.inputs
    return sorted(zip(x.flatten(1).sum(1).tolist(), t.tolist(), strict=True))


def test_rows_are_shuffled_once_and_stay_together():
    graph = calibrated()
    samples = gather_samples(graph, BATCHES, seed=0)
    assert samples.mixing and samples.count == 48
    x, t = (torch.cat(column) for column in zip(*BATCHES, strict=True))
    assert rows_of(samples) == sorted(zip(x.flatten(1).sum(1).tolist(), t.tolist(), strict=True))
    assert not torch.equal(samples.inputs[0], x)
    assert torch.equal(gather_samples(graph, BATCHES, seed=0).inputs[0], samples.inputs[0])
    assert not torch.equal(gather_samples(graph, BATCHES, seed=1).inputs[0], samples.inputs[0])
    covered = [row for window in samples.chunks for row in range(window.start, window.stop)]
    assert covered == list(range(48)) and max(map(len, samples.chunks)) <= 32


def test_batches_with_one_timestep_stay_whole():
    samples = gather_samples(calibrated(scalar=True), SCALAR_BATCHES, seed=0)
    assert not samples.mixing and samples.count == sum(len(x) for x, _ in SCALAR_BATCHES)
    images, timesteps = samples.inputs
    found = {}
    for window in samples.chunks:
        found[int(timesteps[window.chunk])] = images[window.start : window.stop]
    assert list(found) != TIMESTEPS.tolist()  # shuffled
    for x, t in SCALAR_BATCHES:
        assert torch.equal(found[int(t)], x)
    rows, back = samples.split(0.2)
    held = [window for window in samples.chunks if window.start >= rows]
    assert len(held) == 2 and sum(map(len, held)) == back == samples.count - rows
    assert samples.windows(rows, samples.count) == held
    drawn = {samples.draw(1, rows, random) for random in [generator()] for _ in range(200)}
    assert drawn == set(samples.chunks) - set(held)


@given(st.integers(1, 100), st.floats(0, 0.9), st.integers(1, 64), st.integers(0, 2**31))
def test_mini_batches_are_views_and_never_touch_held_back_rows(rows, share, size, seed):
    samples = Samples((torch.arange(rows),), rows, (Window(0, rows),), mixing=True)
    first, back = samples.split(share)
    assert first + back == rows and first >= 1
    assert (back >= 1) == (share > 0 and rows > 1)
    assert abs(back - share * rows) <= 1
    random = generator(seed)
    for _ in range(20):
        window = samples.draw(size, first, random)
        assert len(window) == min(size, first)
        drawn = in_window(PerSample(samples.inputs[0]), window)
        assert drawn.untyped_storage().data_ptr() == samples.inputs[0].untyped_storage().data_ptr()
        assert int(drawn.min()) >= 0 and int(drawn.max()) < first
    held = [row for window in samples.windows(first, rows) for row in range(window.start, window.stop)]
    assert held == list(range(first, rows))


def test_every_row_to_train_on_is_drawn_sometimes():
    samples = Samples((torch.arange(10),), 10, (Window(0, 10),), mixing=True)
    random = generator()
    windows = [samples.draw(3, 8, random) for _ in range(300)]
    seen = {row for window in windows for row in range(window.start, window.stop)}
    assert seen == set(range(8))


# --- values and memory ------------------------------------------------------------------------------


def test_values_are_collected_by_what_grows_with_the_batch():
    graph = calibrated()
    samples, store = gather_samples(graph, BATCHES, seed=0), ActivationStore(2**20)
    sample = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"]
    size, fixed = sample.shape[0], torch.zeros(3)
    x = samples.inputs[0]
    tokens = sample.reshape(size * 64, 1)

    def compute(window):
        part = x[window.start : window.stop]
        return (2 * part, fixed, len(window), part.reshape(-1, 1))

    rows, constant, number, expanded = collect(samples, (sample, fixed, size, tokens), compute, store)
    window = Window(5, 9)
    assert isinstance(rows, PerSample) and torch.equal(rows.at(window), 2 * x[5:9])
    assert isinstance(constant, Batches) and constant.at(window) is fixed
    assert isinstance(number, Size) and number.at(window) == 4
    assert expanded.per_item == 64 and torch.equal(expanded.at(window), x[5:9].reshape(-1, 1))
    assert store.in_memory == 2 * x.numel() * 4


def test_the_store_counts_what_is_held(tmp_path):
    store = ActivationStore(1000, tmp_path)
    small = store.allocate((100,), torch.float32)
    assert (store.in_memory, store.in_files) == (400, 0)
    large = store.allocate((30, 10), torch.float32)
    assert (store.in_memory, store.in_files) == (400, 1200)
    assert large.shape == (30, 10) and large.dtype == torch.float32
    large.copy_(torch.arange(300.0).reshape(30, 10))
    assert float(large[29, 9]) == 299.0
    assert not list(tmp_path.iterdir())
    view = small[:3]
    del small
    gc.collect()
    assert store.in_memory == 400  # the view holds it
    del view, large
    gc.collect()
    assert (store.in_memory, store.in_files) == (0, 0)
    exact = store.allocate((250,), torch.float32)
    assert (store.in_memory, store.in_files) == (1000, 0)
    assert store.allocate((0, 5), torch.float32).shape == (0, 5)
    byte = store.allocate((1,), torch.int8)
    assert (store.in_memory, store.in_files) == (exact.nbytes, byte.nbytes)
    assert (store.peak, store.peak_in_files) == (1600, 1200)


def test_a_store_without_a_directory_to_write_to_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ReconstructionError, match="raise cache_bytes") as caught:
        ActivationStore(0, tmp_path / "file" / "inside").allocate((4,), torch.float32)
    assert "\n" not in str(caught.value)


# --- errors -----------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers, one behind the other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (Two(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)), (2, 3, 6, 6), 1),
        (Two(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 5, 1)), (2, 3, 6), 1),
        (Two(nn.Linear(3, 4), nn.Linear(4, 5)), (2, 6, 3), 2),
        (Two(nn.Linear(3, 4), nn.Linear(4, 5)), (2, 3), 1),
        (Two(nn.Conv1d(3, 4, 1), nn.Linear(6, 5)), (2, 3, 6), 2),
        (nn.SiLU(), (2, 3), 1),
    ],
)
def test_the_channel_axis_is_where_the_last_layer_has_its_channels(module, shape, axis):
    graph = torch.export.export(module, (torch.randn(shape),)).module().graph
    assert channel_axis(graph, len(shape)) == axis


def naive_error(outputs, targets, axes, fisher):
    """Mean over all but channels, sum over channels, sum over outputs: written with loops."""
    total = 0.0
    for output, target, axis, weight in zip(outputs, targets, axes, fisher, strict=True):
        squares = (output - target) ** 2 * (1 if weight is None else weight)
        rows = squares.movedim(axis, 0).flatten(1) if squares.ndim > 1 else squares[None]
        total += sum(float(row.mean()) for row in rows)
    return total


def test_the_error_sums_over_channels_and_averages_over_everything_else():
    shapes, axes = [(4, 3, 5, 5), (4, 7, 3), (4, 6)], [1, 2, 1]
    outputs, targets = ([torch.randn(shape, generator=generator(seed)) for shape in shapes] for seed in (0, 1))
    fisher = [None, torch.rand((7, 3), generator=generator(2)), torch.rand(6, generator=generator(3))]
    for weights in ([None] * 3, fisher):
        error = unit_error(outputs, targets, axes, weights)
        assert float(error) == pytest.approx(naive_error(outputs, targets, axes, weights), rel=1e-5)
    # Twice as many tokens or pixels weigh no more.
    doubled = [torch.cat([t, t], 2) for t in (outputs[0], targets[0])]
    one = unit_error(outputs[:1], targets[:1], [1], [None])
    assert float(unit_error(doubled[:1], doubled[1:], [1], [None])) == pytest.approx(float(one), rel=1e-5)


class Chain(nn.Module):
    """Three linears, nothing in between, so that the Jacobians are products of weights."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, sample):
        return self.three(self.two(self.one(sample)))


def test_fisher_information_is_the_mean_squared_jacobian():
    torch.manual_seed(0)
    model = Chain().eval()
    samples = torch.randn(4096, 3)
    config = tfmq_fx.QuantizationConfig(temporal="float", keep_float=(), weight_bits=2)
    graph = tfmq_fx.prepare(tfmq_fx.capture(model, (samples[:2],)), config)
    tfmq_fx.calibrate(graph, [(samples[:64],)], progress=False)
    tfmq_fx.fake_quantizers.insert_fake_quantizers(graph)
    gathered = gather_samples(graph, [(samples,)], seed=0)
    PartitionUnits(granularity="layer")(graph)
    units = {node.meta["tfmq_fx.unit"][0]: node for node in graph.graph.nodes if "tfmq_fx.unit" in node.meta}
    found = fisher_information(graph, gathered, set(units.values()), seed=0)
    jacobians = {
        "one": model.three.weight @ model.two.weight,
        "two": model.three.weight,
        "three": torch.eye(2),
    }
    assert units.keys() == jacobians.keys()
    for name, jacobian in jacobians.items():
        (weights,) = found[units[name]]
        diagonal = jacobian.detach().square().sum(0)
        torch.testing.assert_close(weights, diagonal / diagonal.mean(), rtol=0.1, atol=0.02)
        assert float(weights.mean()) == pytest.approx(1.0, rel=1e-4)
    again = fisher_information(graph, gathered, set(units.values()), seed=0)
    assert all(torch.equal(again[node][0], found[node][0]) for node in found)


def test_fisher_information_of_a_denoiser_has_a_mean_of_one_and_the_shape_of_each_output():
    graph = calibrated()
    samples = gather_samples(graph, BATCHES[:1], seed=0)
    graph.requires_grad_(False)  # as in reconstruction: the time embed has no input that collects gradients
    PartitionUnits()(graph)
    units = {node for node in graph.graph.nodes if "tfmq_fx.unit" in node.meta}
    found = fisher_information(graph, samples, units, seed=0)
    weights = 0
    for node in units:
        value = node.meta["val"]
        for output, weight in zip(value if isinstance(value, tuple) else (value,), found[node], strict=True):
            if not output.is_floating_point():  # the row of each item's ranges
                assert weight is None
                continue
            assert tuple(weight.shape) == tuple(output.shape[1:])
            assert float(weight.min()) >= 0 and float(weight.mean()) == pytest.approx(1.0, rel=1e-4)
            weights += 1
    assert weights >= 7


# --- state on disk and the report -------------------------------------------------------------------


RESULT = UnitResult("up", "residual", 10, 0.5, 0.25, 0.1, 7, 1.5, "")


def test_a_fingerprint_changes_with_everything():
    weight = torch.randn(4, 3, generator=generator())
    prints = [
        fingerprint({"a": 1}, [weight]),
        fingerprint({"a": 2}, [weight]),
        fingerprint({"a": 1}, [weight.reshape(3, 4)]),
        fingerprint({"a": 1}, [weight.view(torch.int32)]),
        fingerprint({"a": 1}, [weight.nextafter(torch.tensor(9.0))]),
        fingerprint({"a": 1}, [weight, weight]),
        fingerprint({"a": 1}, [weight.t()]),
        fingerprint({"a": 1}, []),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": 1}, [weight.clone()]) == prints[0]
    assert fingerprint({"b": 2, "a": 1}, []) == fingerprint({"a": 1, "b": 2}, [])
    assert fingerprint({}, [torch.tensor(True), torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16)])


def test_a_unit_is_kept_and_found_again(tmp_path):
    state = {"q.up": torch.tensor([True, False]), "q.scale": torch.rand(3)[::2], "q.zero": torch.tensor(3)}
    Checkpoint(tmp_path / "a" / "b", {"weights": "key"}).save(3, RESULT, state)
    checkpoint = Checkpoint(tmp_path / "a" / "b", {"weights": "key"})
    result, found = checkpoint.load(3)
    assert result == RESULT and found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert checkpoint.load(2) is None
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["plan.json", "unit-0003.safetensors"]


def test_without_a_folder_nothing_is_kept():
    checkpoint = Checkpoint(None, {"weights": "key"})
    checkpoint.save(0, RESULT, {})
    assert checkpoint.load(0) is None


def test_the_report_says_what_became_of_each_unit():
    kept = UnitResult("down", "residual", 10, 0.5, 0.5, 0.0, 7, 1.0, "the error rose to 0.6")
    report = ReconstructionReport((RESULT, kept, UnitResult("in", "layer", reason="not quantized")), seconds=12.3)
    assert str(report).splitlines() == [
        "2 of 3 units reconstructed in 12 s",
        "  up [residual]: 0.5 → 0.25 (0.50 ×), 10% of the roundings changed",
        "  down [residual]: 0.5 → 0.5 (1.00 ×), 0% of the roundings changed: the error rose to 0.6",
        "  in [layer]: not trained: not quantized",
    ]
    assert json.loads(json.dumps(report.to_dict()))["units"][0]["after"] == 0.25
    empty = UnitResult("x", "layer", before=0.0, after=0.0, iterations=1)
    assert "(1.00 ×)" in str(ReconstructionReport((empty,)))


def test_batches_of_a_fixed_size_stand_alone():
    fixed = [(torch.randn(2, 1, 8, 8, generator=generator(i)), TIMESTEPS[2 * i : 2 * i + 2]) for i in range(5)]
    program = tfmq_fx.capture(small_denoiser(), fixed[0], dynamic_batch=False)
    graph = tfmq_fx.prepare(program, tfmq_fx.QuantizationConfig(weight_bits=4), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, fixed, progress=False)
    config = tfmq_fx.ReconstructionConfig(iterations=8, temporal_iterations=8)
    report = tfmq_fx.reconstruct(graph, fixed, config, progress=False)
    assert all(0 <= unit.after <= unit.before for unit in report.units)
    assert sum(unit.changed > 0 for unit in report.units) >= 2
    with pytest.raises(tfmq_fx.CalibrationError, match=r"captured with \[2, 1, 8, 8\]"):
        tfmq_fx.reconstruct(graph, [batch(3)], config, progress=False)
