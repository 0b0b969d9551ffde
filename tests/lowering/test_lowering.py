"""Lowering to the reference and, once each, to the compiling backends (on a very small model)."""

import zipfile
from collections import Counter

import pytest
import torch
import torch._inductor.config
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tests.processor import on_integer_kernels
from tfmq_fx import LoweringError, QuantizationConfig, TimestepError
from tfmq_fx.lowering.backends.inductor import backend as inductor
from tfmq_fx.lowering.report.eligibility import classify
from tfmq_fx.lowering.report.matching import match_kernels
from tfmq_fx.lowering.report.reasons import MISSED, NO_MATMUL, PER_ROW
from tfmq_fx.lowering.report.report import ReportEntry


@pytest.fixture(scope="module")
def program():
    config = QuantizationConfig(unknown_timestep="error", activation_groups=1, shortcut_bits=None)
    return tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)


@pytest.fixture(scope="module")
def reference(program):
    return tfmq_fx.lower(program, "reference")


def test_the_temporal_block_is_a_table(program, reference):
    x, t = batch()
    assert reference.report.temporal_layers == 0 and reference.report.table_rows == len(TIMESTEPS)
    assert torch.allclose(reference(x, t), program(x, t), atol=1e-5)
    kept = tfmq_fx.lower(program, "reference", tabulate=False)
    assert kept.report.temporal_layers == 4
    assert torch.allclose(kept(x, t), program(x, t), atol=1e-5)
    assert sum(e.reason == PER_ROW for e in kept.report.entries) == 4


def test_nothing_stays_float_without_a_reason(reference):
    assert all(entry.reason for entry in reference.report.entries if entry.kernel == "float")
    reasons = {entry.name: entry.reason for entry in reference.report.entries}
    assert reasons["enter"] == "keep_float has 'input'" and reasons["leave"] == "keep_float has 'output'"
    assert sum(entry.reason == NO_MATMUL for entry in reference.report.entries) == 2


@pytest.mark.parametrize("timestep", [100, 100.0, torch.tensor(100), torch.tensor([100]), torch.tensor([100] * 3)])
def test_every_form_of_a_timestep(reference, timestep):
    x, _ = batch(3)
    assert torch.equal(reference(x, timestep), reference(sample=x, timestep=torch.full((3,), 100)))


def test_a_model_without_a_timestep_is_called_without_one():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    program = tfmq_fx.quantize(model, QuantizationConfig(temporal="float"), [(x,)], progress=False)
    denoiser = tfmq_fx.lower(program, "reference")
    with torch.no_grad():
        assert denoiser.timesteps is None and relative(denoiser(x), model(x)) < 0.05
    # Another batch than that of the capture.
    assert torch.allclose(denoiser(x[:1]), denoiser(x)[:1], atol=1e-5)


def test_bad_calls_are_one_clear_sentence(reference):
    x, t = batch()
    for call, error, words in (
        (lambda: reference(x, 101), TimestepError, "timestep 101"),
        (lambda: reference(x, t + 1), TimestepError, "not in the table"),
        (lambda: reference(x, 100.5), TimestepError, r"100\.5"),
        (lambda: reference(x), LoweringError, "'timestep' is missing"),
        (lambda: reference(x, t, label=1), LoweringError, "'label' was not captured"),
        (lambda: reference(x[:, :, :4], t), LoweringError, "captured with"),
        (lambda: reference(x.double(), t), LoweringError, "float64"),
        (lambda: reference(x, t, x), LoweringError, "takes 2 arguments"),
    ):
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_program_that_does_not_compile_is_refused_with_a_way_out(program, monkeypatch):
    def fail(*arguments):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no such shape"), None)

    monkeypatch.setattr(inductor, "compile_inductor", fail)
    with pytest.raises(LoweringError, match=r"could not compile this program \(.*no such shape.*dynamic_batch=False"):
        tfmq_fx.lower(program)


def test_unknown_backends_are_refused(program):
    with pytest.raises(LoweringError, match="'cuda'"):
        tfmq_fx.lower(program, "cuda")
    with pytest.raises(LoweringError, match="path="):
        tfmq_fx.lower(program, "aot")


def test_a_kernel_that_the_compiler_missed_is_reported(program):
    entries = classify(tfmq_fx.lower(program, "reference")._compiled[0].runs[-1], program.kept_float)
    names = [e.name for e in entries if e.eligible]
    matched = match_kernels(entries, Counter(names[1:]))
    assert [e.name for e in matched if e.reason == MISSED] == [names[0]]


def test_a_kernel_that_took_in_an_addition_is_found_in_the_module_around():
    names = ("block.attention.out", "block.embed", "block.embed.project", "other.layer")
    entries = [ReportEntry(name, "linear", "integer", eligible=True) for name in names]

    def missed(**found):
        matched = match_kernels(entries, Counter({path.replace("_", "."): count for path, count in found.items()}))
        return [entry.name for entry in matched if entry.reason == MISSED]

    assert missed(block=3, other_layer=1) == []
    assert missed(block=1, block_embed=2, other_layer=1) == []
    # Not in the module beside it, and each kernel once.
    assert missed(block=3, otherwise=1) == ["other.layer"]
    assert missed(block=2, other=1) == ["block.embed.project"]


def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    ).eval()  # fmt: skip


def test_a_diffusers_unet_keeps_its_face_and_drops_into_a_pipeline():
    model, scheduler = unet(), DDIMScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8)
    quantized = tfmq_fx.quantize(
        model, None, [(x, scheduler.timesteps[:2])], timesteps=scheduler.timesteps, progress=False
    )
    denoiser = tfmq_fx.lower(quantized, "reference")
    t = scheduler.timesteps[0]
    assert type(denoiser(x, t)) is type(model(x, t))
    assert isinstance(denoiser(x, t, return_dict=False), tuple)
    assert denoiser(x, t, class_labels=None).sample.shape == x.shape
    assert denoiser.config.in_channels == 1 and denoiser.dtype == torch.float32
    pipeline = DDIMPipeline(unet=model, scheduler=scheduler)
    pipeline.unet = denoiser
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    # diffusers' upsampler takes at most 63 in one call; the denoiser splits.
    many = torch.randn(70, 1, 8, 8)
    assert torch.allclose(denoiser(many, t).sample[60:], denoiser(many[60:], t).sample, atol=1e-2)


def test_inductor_puts_every_eligible_layer_on_integer_kernels(program, reference):
    freezing = torch._inductor.config.freezing
    denoiser = tfmq_fx.lower(program, "inductor")
    report = denoiser.report
    assert report.eligible == 7 and on_integer_kernels(report, 7)
    assert report.temporal_layers == 0
    assert torch._inductor.config.freezing is freezing and torch._inductor.config.post_grad_custom_post_pass is None
    for size in (1, 3, 9):  # one compilation serves every batch
        x, t = batch(size)
        assert relative(denoiser(x, t), reference(x, t)) < 0.05
    with pytest.raises(TimestepError, match="101"):
        denoiser(batch(2)[0], 101)


def flipped(data, entry):
    """The archive with a byte in the middle of one file changed."""
    name, extra = (int.from_bytes(data[entry.header_offset + at :][:2], "little") for at in (26, 28))
    position = entry.header_offset + 30 + name + extra + entry.compress_size // 2
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


def test_an_aot_package_needs_nothing_but_itself(program, reference, tmp_path):
    path = tmp_path / "denoiser.pt2"
    made = tfmq_fx.lower(program, "aot", path=path)
    loaded = tfmq_fx.load_denoiser(path)
    assert loaded.report == made.report and on_integer_kernels(made.report, 7)
    for size in (1, 5):
        x, t = batch(size)
        assert torch.equal(loaded(x, t), made(x, t))
        assert relative(loaded(x, t), reference(x, t)) < 0.05
    with pytest.raises(TimestepError, match="101"):
        loaded(batch(2)[0], 101)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compiled = [entry for entry in entries if entry.filename.endswith(".so")]
    weights = max((entry for entry in entries if "/data/" in entry.filename), key=lambda entry: entry.file_size)
    data, damaged = path.read_bytes(), tmp_path / "damaged.pt2"
    for entry in (*compiled, weights):
        damaged.write_bytes(flipped(data, entry))
        with pytest.raises(tfmq_fx.ArtefactError, match=r"damaged\.pt2 is damaged: .*; copy it again") as caught:
            tfmq_fx.load_denoiser(damaged)
        assert "\n" not in str(caught.value)
    (tmp_path / "broken.pt2").write_bytes(data[:1000])
    for bad in (tmp_path / "broken.pt2", tmp_path / "missing.pt2"):
        with pytest.raises(tfmq_fx.ArtefactError):
            tfmq_fx.load_denoiser(bad)


@pytest.mark.parametrize(("name", "words"), [("a.pt2", "is not a package"), ("a.zip", r"does not end in \.pt2")])
def test_a_file_of_somebody_else_is_refused_before_anything_is_compiled(program, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr("tfmq_fx.lowering.backends.backend.make_plan", lambda *_: pytest.fail("it was planned"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(LoweringError, match=words) as caught:
        tfmq_fx.lower(program, "aot", path=tmp_path / name)
    assert "\n" not in str(caught.value) and (tmp_path / name).read_text() == "mine"


def test_asymmetric_4_bit_weights_reach_the_kernels_exactly():
    """The kernels ignore weight zero points; folded weights must not depend on them."""
    config = QuantizationConfig(weight_bits=4, activation_groups=1, shortcut_bits=None)
    program = tfmq_fx.quantize(small_denoiser(), config, [batch()], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program, "inductor")
    assert on_integer_kernels(denoiser.report, 7)
    x, t = batch()
    assert relative(denoiser(x, t), tfmq_fx.lower(program, "reference")(x, t)) < 0.05
