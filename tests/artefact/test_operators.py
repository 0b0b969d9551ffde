"""What the list of operators promises, read off their schemas."""

import re

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.artefact.artefacts import change_graph, inputs, tiny_program
from tests.models import TIMESTEPS, batch, small_denoiser, tiny_unet
from tfmq_fx import ArtefactError, QuantizationConfig
from tfmq_fx.artefact.operators import FIXED, OPERATORS, PYTHON_OPERATORS, TEXTS

#: The words that the names of operators with a side effect have.
WORDS = ("file", "load", "save", "print", "warn", "record", "profil", "debug", "import", "empty", "rand", "drop")


def overload(name):
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_no_operator_writes_draws_or_takes_a_text_that_is_not_known(name):
    target = overload(name)
    assert isinstance(target, torch._ops.OpOverload)
    assert not target._schema.is_mutable
    texts = [argument.name for argument in target._schema.arguments if "str" in str(argument.type)]
    assert set(texts) <= TEXTS.keys()
    kinds = " ".join(str(argument.type) for argument in target._schema.arguments)
    assert not re.search("Generator|Storage|Stream|Any|Dict|__torch__", kinds)
    if torch.Tag.nondeterministic_seeded in target.tags:
        assert {argument.name for argument in target._schema.arguments} & FIXED.keys()
    assert not any(word in name.split(".")[3] for word in WORDS)


def test_those_that_compute_with_sizes_are_pure():
    assert not {
        name
        for name in PYTHON_OPERATORS
        if re.search("attr|call|item|pow|shift|load|import|__|^_operator.i[a-z]", name)
    }


def test_texts_have_values_that_no_path_is():
    for pattern in TEXTS.values():
        assert not any(
            re.fullmatch(pattern, text, re.ASCII) for text in ("/etc/passwd", "../x", "a/b", "x\n", "a" * 1000)
        )


class InPlace(nn.Module):
    """Writes into what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter, self.leave = (
            nn.Linear(1, 4),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 1, 3, padding=1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, sample, timestep):
        h = self.enter(sample)
        h += self.time(timestep[:, None].float() / 1000)[:, :, None, None]
        return self.leave(self.act(h).mul_(0.5))


def quantized(model):
    return tfmq_fx.quantize(
        model, QuantizationConfig(), [inputs()], timesteps=torch.tensor([0, 250, 500, 750]), progress=False
    )


def test_a_model_that_writes_into_what_it_computed_is_saved(tmp_path):
    torch.manual_seed(0)
    program = quantized(InPlace().eval())
    assert not any(node.target is torch.ops.aten.add_.Tensor for node in program.graph_module.graph.nodes)
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "saved"))
    assert loaded(*inputs()).equal(program(*inputs()))


def test_what_cannot_be_loaded_is_refused_when_it_is_saved(tmp_path):
    class Noise(InPlace):
        def forward(self, sample, timestep):
            return super().forward(sample, timestep) + torch.randn_like(sample)

    torch.manual_seed(0)
    with pytest.raises(ArtefactError, match=r"cannot be saved as an artefact.*randn_like"):
        tfmq_fx.save(quantized(Noise().eval()), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_that_writes_into_its_input_is_refused_when_it_is_saved(tmp_path):
    class Writes(InPlace):
        def forward(self, sample, timestep):
            sample[:, :, 0] = 0
            return super().forward(sample, timestep)

    torch.manual_seed(0)
    with pytest.raises((ArtefactError, tfmq_fx.TfmqError)):
        tfmq_fx.save(quantized(Writes().eval()), tmp_path / "saved")


@pytest.mark.parametrize(
    ("make", "bits"), [(small_denoiser, 4), (small_denoiser, 8), (small_denoiser, 32), (tiny_unet, 4)]
)
def test_programs_of_models_are_on_the_list(tmp_path, make, bits):
    program = tfmq_fx.quantize(
        make(), QuantizationConfig(weight_bits=bits), [batch()], timesteps=TIMESTEPS, progress=False
    )
    assert tfmq_fx.save(program, tmp_path / "saved").is_dir()


def test_values_of_nodes_are_computed_and_not_read(tmp_path):
    """Kernels are chosen by shapes: a file cannot say other ones than there are."""
    folder = tfmq_fx.save(tiny_program(), tmp_path / "saved")

    def lie(values):
        values["graph_module"]["graph"]["tensor_values"]["silu"] = {"sizes": [{"as_int": 9}]}

    change_graph(folder, lie)
    graph = tfmq_fx.load(folder).graph_module.graph
    node = next(node for node in graph.nodes if node.target is torch.ops.aten.silu.default)
    assert tuple(node.meta["val"].shape)[-1] == 4
