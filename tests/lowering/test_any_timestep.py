"""A denoiser serves timesteps that it was not quantized for, with exact features and nothing compiled anew."""

import subprocess
import sys
import threading
import zipfile

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser, tiny_unet
from tests.temporal.test_inputs import inputs as labelled
from tests.temporal.test_inputs import quantized as with_labels
from tfmq_fx import QuantizationConfig
from tfmq_fx.errors import ArtefactError, CalibrationError, ConfigError, TimestepError

NEW = torch.tensor([55.0, 777.0, 3.5, 908.1818])
MIXED = torch.tensor([100.0, 55.0, 900.0, 3.5])


def program(**config):
    return tfmq_fx.quantize(
        small_denoiser(), QuantizationConfig(**config), [batch()], timesteps=TIMESTEPS, progress=False
    )


@pytest.fixture(scope="module")
def made():
    return program()


@pytest.fixture(scope="module")
def package(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "small.pt2"
    tfmq_fx.lower(made, "aot", path=path)
    return path


def assert_serves(denoiser, grown, exact):
    """The denoiser and one of a program with these timesteps compute the same."""
    (x, t), compiled_anew = batch(), tfmq_fx.lower(grown, denoiser.report.backend) if exact else grown
    for asked in (NEW, MIXED, t, NEW[:1].expand(4)):
        wanted = compiled_anew(x, asked)
        assert torch.equal(denoiser(x, asked), wanted) if exact else relative(denoiser(x, asked), wanted) < 2e-2


@pytest.mark.parametrize("backend", ["reference", "openvino", "onnxruntime", "inductor"])
def test_a_new_timestep_is_served_as_if_it_had_been_added(made, backend):
    if backend not in ("reference", "inductor"):
        pytest.importorskip(backend)
    denoiser = tfmq_fx.lower(made, backend)
    assert_serves(denoiser, tfmq_fx.add_timesteps(made, NEW), exact=True)
    x, _ = batch()
    assert torch.equal(denoiser(x, 55), denoiser(x, NEW[:1].expand(4)))
    with pytest.raises(TimestepError, match="nan is no finite number"):
        denoiser(x, float("nan"))


def test_attention_with_one_timestep_for_the_whole_batch_is_lowered():
    """As pipelines call it: linears then get one row for all tokens of all items, whose number no input has."""
    model, timestep = tiny_unet(), torch.tensor(100)
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = tfmq_fx.quantize(model, None, [(sample, timestep)], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(made, "reference")
    wanted = made(sample, timestep).sample
    assert torch.equal(denoiser(sample, timestep).sample, wanted)
    assert denoiser(torch.cat([sample, sample, sample[:1]]), timestep).sample.shape == (5, 1, 8, 8)


def test_with_timestep_groups_a_new_one_joins_its_nearest():
    made = program(activation_groups=3)
    for backend in ("reference", "inductor"):
        assert_serves(tfmq_fx.lower(made, backend), tfmq_fx.add_timesteps(made, NEW), exact=True)


def test_a_package_serves_new_timesteps(made, package):
    assert_serves(tfmq_fx.load_denoiser(package), tfmq_fx.add_timesteps(made, NEW), exact=False)
    x, _ = batch()
    with pytest.raises(TimestepError, match="timestep 55 is not in the table"):
        tfmq_fx.load_denoiser(package, unknown_timestep="error")(x, 55)
    nearest = tfmq_fx.load_denoiser(package, unknown_timestep="nearest")
    assert torch.equal(nearest(x, 120), nearest(x, 100))


def test_a_package_serves_them_in_a_process_of_its_own(package, tmp_path):
    x, _ = batch()
    torch.save((x, NEW), tmp_path / "inputs.pt")
    script = (
        "import sys, torch, tfmq_fx\n"
        "x, t = torch.load(sys.argv[2])\n"
        "torch.save(tfmq_fx.load_denoiser(sys.argv[1])(x, t), sys.argv[3])\n"
    )
    arguments = [str(package), str(tmp_path / "inputs.pt"), str(tmp_path / "result.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "result.pt"), tfmq_fx.load_denoiser(package)(x, NEW))


def changed_package(package, path, change):
    """A copy of a package with the files of its temporal program changed."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if "/temporal/" in name:
                data = change(name.rpartition("/")[2], data)
            if data is not None:
                new.writestr(name, data)
    return path


@pytest.mark.parametrize("file", ["graph.json.gz", "tensors.safetensors"])
def test_a_temporal_program_that_was_changed_is_refused(package, tmp_path, file):
    flipped = lambda name, data: data[:-1] + bytes([data[-1] ^ 1]) if name == file else data  # noqa: E731
    with pytest.raises(ArtefactError, match="is damaged: the checksum of"):
        tfmq_fx.load_denoiser(changed_package(package, tmp_path / "flipped.pt2", flipped))
    longer = lambda name, data: data + b"0" if name == file else data  # noqa: E731
    with pytest.raises(ArtefactError, match="is damaged: the checksum of"):
        tfmq_fx.load_denoiser(changed_package(package, tmp_path / "longer.pt2", longer))
    missing = lambda name, data: None if name == file else data  # noqa: E731
    with pytest.raises(ArtefactError, match="is damaged: it lacks the file"):
        tfmq_fx.load_denoiser(changed_package(package, tmp_path / "missing.pt2", missing))


def test_labels_are_served_at_new_timesteps():
    made, given = with_labels(), labelled()
    new = {**given, "timestep": torch.tensor([900, 123, 321, 20, 20, 123])}
    denoiser, grown = tfmq_fx.lower(made, "reference"), tfmq_fx.add_timesteps(made, [123, 321])
    assert torch.equal(denoiser(**new), tfmq_fx.lower(grown, "reference")(**new))
    with pytest.raises(TimestepError, match="class_labels 7 is not among the 4 values"):
        denoiser(**{**new, "class_labels": torch.full((6,), 7)})


def test_two_threads_serve_new_timesteps(made):
    denoiser, (x, _), wrong = tfmq_fx.lower(made, "reference"), batch(), []
    alone = tfmq_fx.lower(made, "reference")
    wanted = {}

    def serve_alone():
        # In a thread as well: a new one has the process's own number of cores, whatever this one was told.
        wanted.update((t, alone(x, t)) for t in (5, 6.5, 7))

    first = threading.Thread(target=serve_alone)
    first.start()
    first.join()

    def serve():
        wrong.extend(t for t in (5, 6.5, 7, 5, 6.5, 7) if not torch.equal(denoiser(x, t), wanted[t]))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_alone_name_a_timestep_that_they_lack():
    denoiser, (x, _) = tfmq_fx.lower(program(temporal="cache"), "reference"), batch()
    with pytest.raises(TimestepError, match="timestep 55 is not among the 10 whose features this program has"):
        denoiser(x, 55)


def test_a_block_that_stays_in_the_graph_is_searched_there(made):
    x, t = batch()
    denoiser = tfmq_fx.lower(made, "reference", tabulate=False)
    assert relative(denoiser(x, t), made(x, t)) < 1e-5 and denoiser.report.temporal_layers == 4
    with pytest.raises(TimestepError, match="timestep 55 is not in the table"):
        denoiser(x, 55)
    # Without parameters per timestep there is no table to search.
    shared = program(temporal="shared")
    assert torch.equal(tfmq_fx.lower(shared, "reference", tabulate=False)(x, NEW.long()), shared(x, NEW.long()))


ADD = "add it with add_timesteps"
STORED = "no temporal block to compute others"
INSIDE = "add it with add_timesteps, lower with tabulate=True and unknown_timestep='extend'"


@pytest.mark.parametrize(
    "config, lowered, called",
    [
        ({"unknown_timestep": "error"}, {}, (ADD, ADD)),
        ({"temporal": "cache"}, {}, (STORED, STORED)),
        ({"temporal": "auto"}, {}, (STORED, STORED)),
        ({"temporal": "cache", "unknown_timestep": "error"}, {}, (STORED, STORED)),
        ({"temporal": "cache"}, {"tabulate": False}, (STORED, STORED)),
        ({}, {"tabulate": False}, (None, INSIDE)),
    ],
    ids=str,
)
def test_the_advice_is_what_works(config, lowered, called):
    made, (x, _) = program(**config), batch()
    for call, advice in zip((made, tfmq_fx.lower(made, "reference", **lowered)), called, strict=True):
        if advice is not None:
            with pytest.raises(TimestepError, match="timestep 55 is not") as caught:
                call(x, torch.tensor([55]))
            assert advice in str(caught.value)


@pytest.mark.parametrize("config, lowered", [({"temporal": "cache"}, {}), ({}, {"tabulate": False})], ids=str)
def test_extending_that_is_asked_for_and_impossible_is_refused(config, lowered):
    made = program(**config)
    with pytest.raises(ConfigError, match="unknown_timestep='extend' cannot be had"):
        tfmq_fx.lower(made, "reference", unknown_timestep="extend", **lowered)
    shared = program(temporal="shared")
    assert tfmq_fx.lower(shared, "reference", unknown_timestep="extend", tabulate=False)(*batch()).shape


def test_a_package_without_a_block_cannot_be_asked_to_extend(tmp_path):
    path = tmp_path / "small.pt2"
    tfmq_fx.lower(program(temporal="cache"), "aot", path=path)
    with pytest.raises(ConfigError, match=r"small.pt2 has the rows of its table and no temporal block"):
        tfmq_fx.load_denoiser(path, unknown_timestep="extend")
    assert tfmq_fx.load_denoiser(path)(*batch()).shape


def test_a_batch_outside_the_table_is_told_to_quantize_with_it():
    x, _ = batch()
    with pytest.raises(CalibrationError, match=r"batch 1 .* timestep 55 .*; quantize with it in timesteps="):
        tfmq_fx.quantize(
            small_denoiser(), None, [batch(), (x, torch.tensor([55] * 4))], timesteps=TIMESTEPS, progress=False
        )


def test_a_program_called_eagerly_extends_its_table_in_a_copy(made):
    x, t = batch()
    before, grown = str(made.graph_module.graph), tfmq_fx.add_timesteps(made, [55, 777])
    asked = torch.tensor([55, 100, 777, 55])
    assert torch.equal(made(x, asked), grown(x, asked)) and torch.equal(made(x, t), grown(x, t))
    assert str(made.graph_module.graph) == before and len(made.timesteps) == 10
    with pytest.raises(TimestepError, match="timestep 55 is not in the table"):
        made.graph_module(x, asked)
