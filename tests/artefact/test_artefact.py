import gzip
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tfmq_fx
from tests.artefact.artefacts import change_manifest, read_graph, write_graph
from tests.models import TIMESTEPS, batch, small_denoiser
from tfmq_fx import ArtefactError, QuantizationConfig
from tfmq_fx.artefact import save
from tfmq_fx.artefact.packing import needed_bits, pack, unpack


@pytest.fixture(scope="module")
def program():
    return tfmq_fx.quantize(
        small_denoiser(), QuantizationConfig(weight_bits=4), [batch()], timesteps=TIMESTEPS, progress=False
    )


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    return tfmq_fx.save(program, tmp_path_factory.mktemp("artefacts") / "saved")


@pytest.fixture
def artefact(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "artefact")


@given(st.integers(1, 7), st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_packing_is_lossless(bits, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    lowest = torch.randint(-128, 128 - 2**bits + 1, (shape[0],), generator=generator)
    values = torch.randint(0, 2**bits, shape, generator=generator)
    tensor = (values + lowest.reshape([-1] + [1] * (len(shape) - 1))).to(torch.int8)
    needed = needed_bits(tensor)
    assert needed <= bits
    packed, low = pack(tensor, needed)
    assert packed.numel() == -(-tensor.numel() * needed // 8)
    assert torch.equal(unpack(packed, low, needed, shape), tensor)


def test_the_round_trip_is_exact(program, saved):
    loaded = tfmq_fx.load(saved)
    x, t = batch()
    assert torch.equal(loaded(x, t), program(x, t))
    for field in ("config", "timestep", "kept_float", "interface", "scheduler"):
        assert getattr(loaded, field) == getattr(program, field)
    assert torch.equal(loaded.timesteps, program.timesteps)
    assert loaded.graph_module.state_dict().keys() == program.graph_module.state_dict().keys()
    once, twice = tfmq_fx.lower(program, "reference"), tfmq_fx.lower(loaded, "reference")
    assert torch.equal(once(x, t), twice(x, t))
    assert [e.name for e in once.report.entries] == [e.name for e in twice.report.entries]


def test_what_is_in_the_folder(saved):
    assert sorted(f.name for f in saved.iterdir()) == ["graph.json.gz", "manifest.json", "tensors.safetensors"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert all(how["bits"] <= 4 for how in manifest["packed"].values()) and len(manifest["packed"]) == 11
    assert manifest["layers"]["down_conv1_weight_int4"] == "down.conv1"
    assert "/" not in gzip.decompress((saved / "graph.json.gz").read_bytes()).decode()  # no local paths


def test_a_program_of_a_diffusers_model_loads_in_a_fresh_process(tmp_path):
    import subprocess
    import sys

    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    program = tfmq_fx.quantize(model, None, [batch()], timesteps=TIMESTEPS, progress=False)
    tfmq_fx.save(program, tmp_path / "saved")
    code = (
        "import sys, torch, tfmq_fx; p = tfmq_fx.load(sys.argv[1]);"
        "print(type(p(torch.zeros(1, 1, 8, 8), torch.tensor([100]))).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "UNet2DOutput"


def test_a_loaded_program_takes_new_timesteps(saved, program):
    grown = tfmq_fx.add_timesteps(tfmq_fx.load(saved), [123])
    x, _ = batch()
    t = torch.full((4,), 123)
    assert torch.equal(grown(x, t), tfmq_fx.add_timesteps(program, [123])(x, t))


@pytest.mark.parametrize("name", ["tensors.safetensors", "graph.json.gz", "manifest.json"])
def test_truncated_files_are_named(artefact, name):
    data = (artefact / name).read_bytes()
    (artefact / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtefactError, match=name):
        tfmq_fx.load(artefact)


@pytest.mark.parametrize("name", ["tensors.safetensors", "graph.json.gz"])
def test_changed_and_missing_files_are_named(artefact, name):
    data = bytearray((artefact / name).read_bytes())
    data[-1] ^= 1
    (artefact / name).write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=f"{name}.*checksum"):
        tfmq_fx.load(artefact)
    (artefact / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        tfmq_fx.load(artefact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="other"), "format"),
        (lambda m: m.update(format_version=99), "format version 99"),
        (lambda m: m.pop("packed"), "'packed'"),
        (lambda m: m["timesteps"].append(5), "timesteps"),
        (lambda m: m["config"].update(weight_bits=99), "weight_bits=99"),
        (lambda m: m["tensors"].pop("down_conv1_weight_scale"), "down_conv1_weight_scale"),
        (lambda m: m["tensors"].update({"enter.bias": [[9], "float32"]}), "enter.bias"),
    ],
)
def test_a_manifest_that_differs_says_where(artefact, change, words):
    change_manifest(artefact, change)
    with pytest.raises(ArtefactError, match=words):
        tfmq_fx.load(artefact)


def test_other_versions_are_mentioned(artefact):
    change_manifest(artefact, lambda m: m["versions"].update(torch="1.0"))
    with pytest.warns(UserWarning, match=r"torch 1\.0"):
        tfmq_fx.load(artefact)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("torch.ops.aten.silu.default", "torch.os.system", "torch.os.system"),
        ("torch.ops.aten.silu.default", "torch.ops.evil.run.default", "evil"),
        ("Symbol('s", "__import__('os').system('s", "size expression"),
    ],
)
def test_a_hostile_graph_is_refused_before_it_is_read(artefact, old, new, words):
    """A manifest with matching checksums: only the look at the graph itself can stop it."""
    text = json.dumps(read_graph(artefact))
    assert old in text
    write_graph(artefact, text.replace(old, new).encode())
    with pytest.raises(ArtefactError, match=words):
        tfmq_fx.load(artefact)


def test_foreign_folders_are_neither_read_nor_overwritten(program, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="not an artefact"):
        tfmq_fx.load(tmp_path)
    with pytest.raises(ArtefactError, match="choose another path"):
        tfmq_fx.save(program, tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_old_artefact(program, artefact, monkeypatch):
    before = {f.name: f.read_bytes() for f in artefact.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        tfmq_fx.save(program, artefact)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in artefact.iterdir()} == before
    assert [p.name for p in artefact.parent.iterdir()] == ["artefact"]
    tfmq_fx.load(artefact)


def test_saving_over_an_old_artefact_replaces_it(program, artefact):
    change_manifest(artefact, lambda m: m.update(timestep="other"))
    tfmq_fx.save(program, artefact)
    assert tfmq_fx.load(artefact).timestep == "timestep"
    assert [p.name for p in artefact.parent.iterdir()] == ["artefact"]
