"""A folder of a quantized model is data: whatever was done to it, loading it gives the model or one sentence."""

import json
import pickle
import shutil

import pytest
import torch
from diffusers import ControlNetModel, DDPMPipeline, PipelineQuantizationConfig, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file

import tfmq_fx
from tests.diffusers.pipelines import CASES
from tfmq_fx import ArtefactError, ConfigError, UnsupportedError
from tfmq_fx.artefact.layout import FILES
from tfmq_fx.diffusers import TFMQConfig

STUB = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(saved, tmp_path):
    """The folder of a quantized UNet, to do something to."""
    return shutil.copytree(saved("ddpm") / "unet", tmp_path / "unet")


def change(path, values):
    """Other values for some fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, text, error=ArtefactError, **arguments):
    with pytest.raises(error, match=text) as caught:
        UNet2DModel.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value)


def test_it_holds_the_files_of_an_artefact_and_those_of_diffusers(folder):
    assert {path.name for path in folder.iterdir()} == {*FILES, STUB, "config.json"}
    assert (folder / STUB).stat().st_size < 300
    program, model = tfmq_fx.load(folder), UNet2DModel.from_pretrained(folder)
    assert model.served.program.config == program.config
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel" and config["quantization_config"]["quant_method"] == "tfmq_fx"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, rf"{name} (of tfmq_fx|is missing)")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, "truncated or|not JSON|manifest")


@pytest.mark.parametrize("name", [*FILES, STUB, "config.json"])
def test_a_link_in_place_of_a_file_is_refused(folder, name):
    moved = folder.parent / name
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    refused(folder, rf"{name} is a link: copy the file itself there")


def test_a_folder_behind_a_link_is_one(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert UNet2DModel.from_pretrained(tmp_path / "link").is_quantized


def test_a_file_that_grew_is_refused_and_not_read(folder):
    with (folder / "tensors.safetensors").open("ab") as file:
        file.truncate(2**36)  # sparse: it takes no room
    refused(folder, "truncated or was changed")


def test_a_manifest_without_end_is_refused(folder):
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(2**36)
    refused(folder, "is not an artefact of tfmq_fx")


def test_weights_beside_the_artefact_are_refused(folder):
    save_file({"conv_in.weight": torch.zeros(8, 3, 3, 3)}, folder / STUB, metadata={"format": "pt"})
    refused(folder, rf"has weights in {STUB}, which such a model has in its artefact")


class Bomb:
    """Whose unpickling shows."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(folder):
    (folder / STUB).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception, match=r"checkpoint file|weights"):  # diffusers' own; it loads tensors alone
        UNet2DModel.from_pretrained(folder)
    torch.save({"conv_in.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.bin")
    refused(folder, r"has weights in diffusion_pytorch_model\.bin")


def test_a_configuration_that_is_not_the_program_s_is_named(folder):
    path = folder / "config.json"
    text = path.read_text()
    change(path, {"sample_size": 16})
    refused(folder, "'sample_size' is 16 in config.json, but the quantized program was made with 8")
    path.write_text(text)
    stored = json.loads(text)["quantization_config"]
    change(path, {"quantization_config": {**stored, "weight_bits": 4}})
    refused(folder, "quantization_config in config.json is not what the program was quantized with")
    change(path, {"quantization_config": {**stored, "lower": "aot"}})
    refused(folder, "a file cannot choose 'lower'", ConfigError)


def test_another_class_is_named(saved):
    with pytest.raises(ArtefactError, match="holds a quantized 'UNet2DConditionModel'; load it with that class"):
        ControlNetModel.from_pretrained(saved("sd") / "unet")


def test_float_weights_are_not_quantized_while_they_are_loaded(tmp_path, monkeypatch):
    """Refused before the weights are looked for: they are not even there."""
    pipeline = CASES["ddpm"].pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / STUB).unlink()
    refused(tmp_path / "unet", r"loading has no calibration data.*tfmq_fx.quantize", ConfigError,
            quantization_config=TFMQConfig())  # fmt: skip
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": TFMQConfig(weight_bits=8)})
    with pytest.raises(ConfigError, match=r"to_diffusers\(quantized\)\) and save the pipeline"):
        DDPMPipeline.from_pretrained(tmp_path, quantization_config=mapping)


def test_a_single_file_of_float_weights_is_refused_too(tmp_path):
    unet = CASES["sd"].pipeline().unet
    unet.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="these are float weights"):
        UNet2DConditionModel.from_single_file(
            str(tmp_path / STUB), config=str(tmp_path), quantization_config=TFMQConfig()
        )


def test_saving_what_cannot_be_saved_so_is_refused(unet, tmp_path):
    for arguments, text in (
        ({"safe_serialization": False}, "safe_serialization=False: its files are never pickled"),
        ({"save_function": torch.save}, "save_function"),
        ({"use_flashpack": True}, "use_flashpack"),
        ({"push_to_hub": True}, "huggingface_hub.upload_folder"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            unet.save_pretrained(tmp_path / "new", **arguments)
    unet.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_what_links_lead_to_is_not_written(folder, tmp_path):
    """As in a cache of the Hub, where every file is a link."""
    model = UNet2DModel.from_pretrained(folder)
    others = {name: f"of others: {name}" for name in (*FILES, STUB, "config.json")}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text('{"format": "tfmq_fx.quantized_program"}')
    model.save_pretrained(folder)
    assert {name: (tmp_path / name).read_text() for name in others} == others
    assert UNet2DModel.from_pretrained(folder).is_quantized


def test_a_variant_is_part_of_the_name(unet, tmp_path):
    unet.save_pretrained(tmp_path, variant="int8")
    assert (tmp_path / "diffusion_pytorch_model.int8.safetensors").is_file()
    assert UNet2DConditionModel.from_pretrained(tmp_path, variant="int8").is_quantized
