"""In a process of its own, whichever of the two is imported first, saved pipelines give the same images to the bit."""

import hashlib
import json
import subprocess
import sys

import pytest

from tests.diffusers.pipelines import CASES
from tests.house.sources import ROOT
from tfmq_fx.diffusers import to_diffusers

#: ``tfmq_fx`` before diffusers, after it, in the middle of it, and only by a module of the plug.
ORDERS = {
    "tfmq_fx first": "import tfmq_fx, sys\nassert not {'torch', 'diffusers'} & set(sys.modules)\nimport diffusers",
    "diffusers first": "import diffusers.pipelines.ddpm, diffusers.quantizers.auto\nimport tfmq_fx",
    "diffusers, lazily": "import diffusers\nimport tfmq_fx",
    "the configuration": "from tfmq_fx.diffusers import TFMQConfig",
    "the quantizer": "import tfmq_fx.diffusers.quantizer",
}
CHECK = """
from diffusers.quantizers import auto
from tfmq_fx.diffusers import TFMQConfig, TFMQDiffusersQuantizer
assert auto.AUTO_QUANTIZER_MAPPING["tfmq_fx"] is TFMQDiffusersQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tfmq_fx"] is TFMQConfig
assert hasattr(auto.DiffusersAutoQuantizer.merge_quantization_configs, "keeps_options_of_tfmq_fx")
"""
SAMPLE = """
import hashlib, json, sys
import tfmq_fx
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, PipelineQuantizationConfig
from tests.diffusers.pipelines import CASES
from tfmq_fx.diffusers import TFMQConfig
folder, absent = sys.argv[1], json.loads(sys.argv[2])
config = TFMQConfig(lower="reference")
mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
pipeline = StableDiffusionPipeline.from_pretrained(folder, quantization_config=mapping, **absent)
images = CASES["sd"].sample(pipeline)
pipeline.unet = UNet2DConditionModel.from_pretrained(folder + "/unet", quantization_config=config)
again = CASES["sd"].sample(pipeline)
print(json.dumps([hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in (images, again)]))
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("order", ORDERS)
def test_diffusers_knows_us_whichever_is_imported_first(order):
    done = run(ORDERS[order] + CHECK)
    assert done.returncode == 0, done.stderr
    assert "takes no quantizers" not in done.stderr


def test_a_saved_pipeline_gives_the_same_images_in_a_new_process(saved):
    case, folder = CASES["sd"], saved("sd")
    pipeline = case.pipeline()
    absent = case.absent(pipeline)
    loaded = type(pipeline).from_pretrained(folder, **absent)
    loaded.unet = to_diffusers(loaded.unet.served.program, "reference")
    images = case.sample(loaded)
    done = run(SAMPLE, str(folder), json.dumps(absent))
    assert done.returncode == 0, done.stderr
    wanted = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, wanted]


def test_without_us_diffusers_says_what_it_lacks(saved):
    code = "import sys\nfrom diffusers import UNet2DModel\nUNet2DModel.from_pretrained(sys.argv[1])"
    done = run(code, str(saved("ddpm") / "unet"))
    assert done.returncode and "Unknown quantization type, got tfmq_fx" in done.stderr
