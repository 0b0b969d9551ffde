"""What of a model's arguments becomes an input, what a constant, and what the batch."""

import pytest
import torch
from torch import Tensor, nn

import tfmq_fx
from tests.models import TIMESTEPS, Block, SmallDenoiser, TimePath, batch, relative
from tfmq_fx import CaptureError, InputError
from tfmq_fx.frontend.interface import ConstantInput, TensorInput
from tfmq_fx.frontend.sizes import BatchSize


class Frames(nn.Module):
    """Numbers of all kinds: one shapes the graph, one enters arithmetic, nested sizes, a required None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, num_frames: int, fps: float, sizes: list[list[int]], text: None):
        x = self.linear(x).reshape(x.shape[0] // 1, num_frames, -1, 4)
        height, width = sizes[0]
        x = x[:, :, :height].repeat(1, 1, width, 1)
        return x.flatten(1) * fps + torch.as_tensor(timestep).reshape(-1, 1)


def frames_inputs(size: int = 2, **other):
    sample = torch.randn(size, 12, 4, generator=torch.Generator().manual_seed(size))
    given = {"x": sample, "timestep": torch.arange(size) * 10, "num_frames": 3, "fps": 0.5}
    return {**given, "sizes": [[2, 2]], "text": None, **other}


def captured():
    torch.manual_seed(0)
    model = Frames().eval()
    return model, tfmq_fx.capture(model, example_kwargs=frames_inputs())


def test_a_number_that_shapes_the_graph_is_a_constant_and_one_in_arithmetic_an_input():
    model, program = captured()
    inputs = {leaf.name: leaf for leaf in program.meta["tfmq_fx.interface"].inputs}
    assert inputs["num_frames"] == ConstantInput("num_frames", 3)
    assert inputs["sizes[0][0]"] == ConstantInput("sizes[0][0]", 2) and inputs["text"] == ConstantInput("text", None)
    assert isinstance(inputs["fps"], TensorInput) and inputs["fps"].sizes == ()
    assert inputs["x"].sizes == (BatchSize(1), 12, 4)
    program = tfmq_fx.convert(calibrated(program))
    for fps in (0.5, 1, torch.tensor(0.25)):
        given = frames_inputs(3, fps=fps)
        assert relative(program(**given), model(**given)) < 0.05
    for wrong, words in (
        ({"num_frames": 4}, "'num_frames' is 4.* captured with 3"),
        ({"sizes": [[2, 3]]}, "sizes.* is 3"),
        ({"sizes": [[2, 2], [2, 2]]}, "a list of 1"),
        ({"text": torch.zeros(2, 3)}, "captured with None"),
        ({"fps": "fast"}, "'fps' is 'fast'"),
        ({"fps": None}, "'fps' is None"),
        ({"fps": torch.nan}, "'fps' holds NaN"),
    ):
        with pytest.raises(InputError, match=words):
            program(**frames_inputs(2, **wrong))


def calibrated(program):
    prepared = tfmq_fx.prepare(program, tfmq_fx.QuantizationConfig(temporal="float", keep_float=()))
    tfmq_fx.calibrate(prepared, [frames_inputs(2), frames_inputs(4, timestep=20)], progress=False)
    return prepared


def test_numbers_pass_every_stage_as_they_were_captured(tmp_path):
    model, program = captured()
    program = tfmq_fx.load(tfmq_fx.save(tfmq_fx.convert(calibrated(program)), tmp_path / "frames"))
    given = frames_inputs(3, fps=4)
    assert relative(tfmq_fx.lower(program, "reference")(**given), model(**given)) < 0.05
    with pytest.raises(InputError, match="'num_frames' is 4"):
        tfmq_fx.lower(program, "reference")(**{**given, "num_frames": 4})


def test_a_number_as_the_timestep_stays_an_input():
    class Scalar(SmallDenoiser):
        def forward(self, sample, timestep):
            t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
            return super().forward(sample, t.reshape(-1).expand(sample.shape[0]))

    model = Scalar().eval()
    program = tfmq_fx.quantize(model, None, [(batch()[0], t) for t in (0, 500)], timesteps=TIMESTEPS, progress=False)
    for t in (0, 300, 300.0, torch.tensor(300), torch.tensor([300])):
        assert relative(program(batch()[0], t), model(batch()[0], t)) < 0.1


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.linear(x) + table.sum(0)


def test_the_batch_is_what_the_user_says_it_is():
    model, x, table = WithTable().eval(), torch.randn(3, 4), torch.randn(3, 4)
    for options in ({"batched": ("x",)}, {"batched": {"x": 0}}, {"dynamic_shapes": {"x": {0: BATCH}, "table": None}}):
        program = tfmq_fx.capture(model, (x, table), **options)
        sizes = {leaf.name: leaf.sizes for leaf in program.meta["tfmq_fx.interface"].inputs}
        assert sizes == {"x": (BatchSize(1), 4), "table": (3, 4)}
        wide = torch.randn(7, 4)
        assert torch.allclose(program(wide, table), model(wide, table), atol=1e-6)
    for options, words in (
        ({"batched": ("y",)}, "batched= names axis 0 of 'y'"),
        ({"batched": {"x": 2}}, "axis 2 of 'x'"),
        ({"batched": {"x": 1, "table": 0}}, "differ in their batch"),
        ({"batched": ("x",), "dynamic_shapes": {}}, "pass one of them"),
    ):
        with pytest.raises(CaptureError, match=words):
            tfmq_fx.capture(model, (x, table), **options)


BATCH = torch.export.Dim("batch", min=1)


def test_a_batch_along_another_axis_and_several_entries_an_item(tmp_path):
    class Guided(nn.Module):
        """Twice as many hints as samples, and a sequence with its batch in the middle."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, hints: Tensor, tokens: Tensor) -> Tensor:
            return self.linear(x) + hints.reshape(-1, 2, 4).sum(1) + tokens.sum(0)

    model = Guided().eval()
    shapes = {"x": {0: BATCH}, "hints": {0: 2 * BATCH}, "tokens": {1: BATCH}}

    def given(size):
        return torch.rand(size, 4), torch.rand(2 * size, 4), torch.rand(5, size, 4)

    config = tfmq_fx.QuantizationConfig(temporal="float", keep_float=())
    prepared = tfmq_fx.prepare(tfmq_fx.capture(model, given(3), dynamic_shapes=shapes), config)
    tfmq_fx.calibrate(prepared, [given(3), given(2)], progress=False)
    program = tfmq_fx.load(tfmq_fx.save(tfmq_fx.convert(prepared), tmp_path / "guided"))
    assert [leaf.sizes[:2] for leaf in program.interface.inputs] == [
        (BatchSize(1), 4), (BatchSize(2), 4), (5, BatchSize(1)),
    ]  # fmt: skip
    for backend in ("reference", "openvino"):
        denoiser = tfmq_fx.lower(program, backend)
        for size in (1, 3, 4):
            call = given(size)
            assert relative(denoiser(*call), model(*call)) < 0.05
    with pytest.raises(InputError, match="'hints' is"):
        program(*given(3)[:1], *given(2)[1:])


def test_two_dynamic_sizes_are_refused():
    model, shapes = nn.Conv2d(1, 1, 3), ({0: BATCH, 2: torch.export.Dim("height", min=4, max=64)},)
    exported = torch.export.export(model, (torch.randn(2, 1, 8, 8),), dynamic_shapes=shapes)
    with pytest.raises(CaptureError, match=r"2 dynamic sizes .*axis 0 .*axis 2"):
        tfmq_fx.capture(exported)


class PerToken(nn.Module):
    """One timestep per token, as some video models take it."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.block = TimePath(), Block(8, 8)
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        emb = self.time(timestep.reshape(-1)).reshape(*timestep.shape, 16).mean(1)
        return self.leave(self.block(self.enter(sample), emb))


@pytest.mark.parametrize("count", [1, 6])
def test_timesteps_per_token_are_refused_or_computed(count):
    model = PerToken().eval()
    given = {"sample": batch(4)[0], "timestep": TIMESTEPS[torch.randint(10, (4, count))]}
    program = tfmq_fx.capture(model, example_kwargs=given)
    with pytest.raises(CaptureError, match=r"2 axes.*one row per item.*temporal='float'"):
        tfmq_fx.prepare(program, timesteps=TIMESTEPS)
    config = tfmq_fx.QuantizationConfig(temporal="float")
    quantized = tfmq_fx.quantize(model, config, [given], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(quantized, "reference")
    assert relative(denoiser(**given), model(**given)) < 0.1
    assert denoiser(given["sample"], 300).shape == denoiser(given["sample"], TIMESTEPS[:4]).shape
    with pytest.raises(tfmq_fx.TfmqError, match="one per item"):
        tfmq_fx.prepare(program, tfmq_fx.QuantizationConfig(temporal="float", activation_groups=3), timesteps=TIMESTEPS)


def test_configurations_are_json_from_the_start(tmp_path):
    from pathlib import Path

    from diffusers import UNet2DModel

    from tests.models import tiny_unet

    tiny_unet().save_pretrained(tmp_path / "unet")
    model = UNet2DModel.from_pretrained(tmp_path / "unet")
    model.register_to_config(_name_or_path=Path(tmp_path), odd={"dtype": torch.float32, "sizes": (1, 2)})
    config = tfmq_fx.capture(model, batch()).meta["tfmq_fx.interface"].config
    assert config["_name_or_path"] == str(tmp_path) and config["odd"] == {"dtype": "torch.float32", "sizes": [1, 2]}
