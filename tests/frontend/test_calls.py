"""Calls of programs, lowered denoisers and packages: right, or one sentence."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tfmq_fx
from tests.call_cases import BACKENDS, arguments, many_arguments, many_program
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import InputError


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory):
    """By name: the program, each backend's denoiser, and a package that was loaded again."""
    program = many_program()
    path = tmp_path_factory.mktemp("packages") / "many.pt2"
    made = {name: tfmq_fx.lower(program, name, path=path if name == "aot" else None) for name in BACKENDS}
    return {"program": program, **made, "package": tfmq_fx.load_denoiser(path)}


EVERYWHERE = pytest.mark.parametrize("name", ["program", *BACKENDS, "package"])


def expected(given):
    return many_program()(**given)


def close(denoiser, given, **other):
    return relative(denoiser(**{**given, **other}), expected(given)) < 0.03


def strided(x):
    """The same values in other memory: every second element of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def turned(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x):
    wide = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 1)
    return wide[:, x.shape[1] : 2 * x.shape[1]]


@EVERYWHERE
def test_any_memory_layout_is_normal_input(denoisers, name):
    denoiser = denoisers[name]
    for size in (1, 3):
        given = arguments(size)
        assert close(denoiser, given)
        for layout in (strided, turned, sliced):
            prompt = {key: layout(value) for key, value in given["prompt"].items()}
            other = {"sample": layout(given["sample"]), "prompt": prompt, "table": layout(given["table"])}
            assert close(denoiser, given, **other), layout
        last = given["sample"].to(memory_format=torch.channels_last)
        assert close(denoiser, given, sample=last)
        assert close(denoiser, given, sample=given["sample"].clone().requires_grad_())
        assert close(denoiser, given, timestep=turned(given["timestep"]))


@EVERYWHERE
def test_expanded_tensors_are_normal_input(denoisers, name):
    denoiser = denoisers[name]
    for size in (1, 3):
        given = arguments(size)
        one = arguments(1, 5)
        wide = {key: value.expand(size, *value.shape[1:]) for key, value in one["prompt"].items()}
        copied = {key: value.contiguous().clone() for key, value in wide.items()}
        sample = one["sample"].expand(size, 1, 8, 8)
        plain = {**given, "prompt": copied, "sample": sample.clone(), "timestep": torch.full((size,), 100)}
        assert close(denoiser, plain, prompt=wide, sample=sample, timestep=torch.tensor(100).expand(size))
        assert close(denoiser, plain, timestep=100)
        assert close(denoiser, plain, timestep=torch.tensor([100]))
        assert close(denoiser, plain, timestep=100.0)
        assert close(denoiser, plain, timestep=torch.tensor(100, dtype=torch.int32))


@EVERYWHERE
def test_arguments_by_position_are_those_of_the_model(denoisers, name):
    given = arguments(2)
    args = [given[key] for key in ("sample", "timestep", "prompt", "table")]
    want = expected(given)
    assert relative(denoisers[name](*args), want) < 0.03
    assert relative(denoisers[name](*args, None, False, 1.0), want) < 0.03
    assert relative(denoisers[name](*args[:2], **{k: given[k] for k in ("prompt", "table")}), want) < 0.03


BAD = {
    "a tensor where None was captured": (lambda g: {"residual": torch.ones(2, 1, 8, 8)},
        r"'residual' is .* captured with None"),
    "a flipped flag": (lambda g: {"flag": True}, "'flag' is True.* captured with False"),
    "a number for a flag": (lambda g: {"flag": 0}, "'flag' is 0"),
    "another value than the default": (lambda g: {"scale": 2.0}, "'scale' was not captured"),
    "None for a tensor": (lambda g: {"table": None}, "'table' is None"),
    "a missing key": (lambda g: {"prompt": {"tokens": g["prompt"]["tokens"]}}, "'prompt' is .* a dictionary of"),
    "a further key": (lambda g: {"prompt": {**g["prompt"], "more": None}}, "'prompt' is .* a dictionary of"),
    "a list for a dictionary": (lambda g: {"prompt": list(g["prompt"].values())}, "'prompt' is a list"),
    "an unknown name": (lambda g: {"latents": g["sample"]}, "'latents' was not captured"),
    "another dtype": (lambda g: {"sample": g["sample"].double()}, "'sample' is .* float64"),
    "integers": (lambda g: {"sample": g["sample"].long()}, "'sample' is .* int64"),
    "another device": (lambda g: {"sample": g["sample"].to("meta")}, "'sample' is .* on meta"),
    "a timestep elsewhere": (lambda g: {"timestep": g["timestep"].to("meta")}, "'timestep' is .* on meta"),
    "another size": (lambda g: {"sample": g["sample"][..., :4]}, r"'sample' is \[2, 1, 8, 4\]"),
    "another rank": (lambda g: {"sample": g["sample"][0]}, "'sample' is"),
    "an empty batch": (lambda g: {"sample": g["sample"][:0]}, "'sample' has shape"),
    "a prompt of another batch": (lambda g: {"prompt": arguments(3)["prompt"]},
        r"prompt.*batch is 2"),
    "a sparse sample": (lambda g: {"sample": g["sample"].to_sparse()}, "'sample' is"),
    "NaN": (lambda g: {"sample": g["sample"] * torch.nan}, "'sample' holds NaN"),
    "one infinite value": (lambda g: {"sample": torch.where(torch.arange(8) == 3, torch.inf, g["sample"])},
        "'sample' holds"),
    "NaN in a prompt": (lambda g: {"prompt": {**g["prompt"], "pooled": g["prompt"]["pooled"] / 0 * 0}},
        r"pooled.* holds NaN"),
    "a list for a tensor": (lambda g: {"sample": g["sample"].tolist()}, "'sample' is a list"),
    "an array for a tensor": (lambda g: {"sample": g["sample"].numpy()}, "'sample' is a ndarray"),
    "no timestep": (lambda g: {"timestep": None}, "'timestep' is None"),
    "a wrong number of timesteps": (lambda g: {"timestep": TIMESTEPS[:3]}, "'timestep' is"),
    "a timestep that is not a number": (lambda g: {"timestep": torch.tensor(torch.nan)}, "NaN|nan"),
    "a word for a timestep": (lambda g: {"timestep": "100"}, "'timestep' is"),
    "a complex timestep": (lambda g: {"timestep": g["timestep"].to(torch.complex64)}, "'timestep' is .* complex64"),
    "a sparse timestep": (lambda g: {"timestep": g["timestep"].to_sparse()}, "'timestep' is .* sparse"),
    "True for a timestep": (lambda g: {"timestep": True}, "'timestep' is True"),
}  # fmt: skip


@EVERYWHERE
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_sentence(denoisers, name, case):
    change, words = BAD[case]
    given = arguments(2)
    with pytest.raises(tfmq_fx.TfmqError, match=words) as caught:
        denoisers[name](**{**given, **change(given)})
    assert "\n" not in str(caught.value) and isinstance(caught.value, InputError | tfmq_fx.TimestepError)
    assert close(denoisers[name], given)


@EVERYWHERE
def test_missing_and_doubled_arguments_are_one_sentence(denoisers, name):
    given = arguments(2)
    without = {key: value for key, value in given.items() if key != "prompt"}
    with pytest.raises(InputError, match="'prompt' is missing"):
        denoisers[name](**without)
    with pytest.raises(InputError, match="'sample' is given twice"):
        denoisers[name](given["sample"], given["timestep"], **given)
    with pytest.raises(InputError, match="takes 7 arguments"):
        denoisers[name](*range(8))
    optional = {key: value for key, value in given.items() if key not in ("residual", "flag")}
    assert close(denoisers[name], given, **{}) and relative(denoisers[name](**optional), expected(given)) < 0.03


def test_a_value_that_is_not_the_default_must_be_given_again():
    model = many_arguments()
    given = {**arguments(4), "flag": True}
    program = tfmq_fx.quantize(model, None, [given], timesteps=TIMESTEPS, progress=False)
    assert relative(program(**given), model(**given)) < 0.1
    with pytest.raises(InputError, match=r"'flag' is False.* captured with True"):
        program(**{name: value for name, value in given.items() if name != "flag"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fixed_table_is_not_cut_with_the_batch(backend, tmp_path):
    """A table of as many rows as the batch has items, with timestep groups, which may split a batch."""
    config = tfmq_fx.QuantizationConfig(activation_groups=4)
    batches = [arguments(4, seed) for seed in range(3)]
    captured = tfmq_fx.capture(many_arguments(), example_kwargs=batches[0], batched=("sample", "timestep", "prompt"))
    prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, batches, progress=False)
    program = tfmq_fx.convert(prepared)
    denoiser = tfmq_fx.lower(program, backend, path=tmp_path / "groups.pt2" if backend == "aot" else None)
    for size in (2, 4, 5):
        given = {**arguments(size), "timestep": TIMESTEPS[torch.arange(size) * 2]}
        assert relative(denoiser(**given), program(**given)) < 0.05


def test_calibration_binds_as_every_call_does():
    captured = tfmq_fx.capture(many_arguments(), example_kwargs=arguments(4))
    prepared = tfmq_fx.prepare(captured, timesteps=TIMESTEPS)
    with pytest.raises(tfmq_fx.CalibrationError, match=r"batch 1 .*'residual' is .* captured with None"):
        tfmq_fx.calibrate(
            prepared, [arguments(4), {**arguments(4), "residual": torch.ones(4, 1, 8, 8)}], progress=False
        )
    with pytest.raises(tfmq_fx.CalibrationError, match=r"batch 0 .*'flag' is True"):
        tfmq_fx.calibrate(prepared, [{**arguments(4), "flag": True}], progress=False)
    with pytest.raises(tfmq_fx.CalibrationError, match="batch is a float"):
        tfmq_fx.calibrate(prepared, [1.0], progress=False)


@pytest.mark.parametrize("name", [*BACKENDS, "package"])
def test_a_denoiser_is_not_cast_or_moved(denoisers, name):
    denoiser, given = denoisers[name], arguments(2)
    before = denoiser(**given)
    for change in (
        lambda d: d.to(torch.bfloat16),
        lambda d: d.half(),
        lambda d: d.double(),
        lambda d: d.to("meta"),
    ):
        with pytest.warns(UserWarning, match="a lowered denoiser stays in float32 on cpu"):
            assert change(denoiser) is denoiser
        assert torch.equal(denoiser(**given), before)
    assert denoiser.to("cpu") is denoiser.float() is denoiser.eval() is denoiser
    assert denoiser.dtype == torch.float32 and denoiser.device.type == "cpu" and not denoiser.state_dict()


@pytest.mark.parametrize("name", [*BACKENDS, "package"])
def test_a_copy_runs_on_the_same_kernels(denoisers, name):
    denoiser, given = denoisers[name], arguments(2)
    for twin in (copy.deepcopy(denoiser), copy.copy(denoiser)):
        assert torch.equal(twin(**given), denoiser(**given)) and twin.report == denoiser.report
        assert twin is not denoiser and twin._compiled is denoiser._compiled


def test_pickling_is_refused_in_a_sentence(denoisers):
    for value, words in ((denoisers["reference"], "denoiser cannot be pickled"), (many_program(), "tfmq_fx.save")):
        with pytest.raises(tfmq_fx.ArtefactError, match=words):
            pickle.dumps(value)
    twin = copy.deepcopy(many_program())
    assert torch.equal(twin(**arguments(2)), many_program()(**arguments(2)))
    assert twin.graph_module is not many_program().graph_module


def test_a_denoiser_outlives_a_reset_of_the_compiler():
    program = tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program)
    torch._dynamo.reset()
    for size in (1, 3, 7):
        x, t = batch(size)
        assert relative(denoiser(x, t), program(x, t)) < 0.05


def test_a_compiled_or_exported_caller_gets_the_same(denoisers):
    denoiser, (given) = denoisers["reference"], arguments(2)
    compiled = torch.compile(denoiser, backend="eager")
    assert torch.equal(compiled(**given), denoiser(**given))


@EVERYWHERE
def test_two_threads_get_their_own_results(denoisers, name):
    """A lost lock does not show in every run; it did in half of the calls."""
    calls = [arguments(2, seed) for seed in (1, 2)]
    wanted = [denoisers[name](**given).clone() for given in calls]

    def results(index):
        return [relative(denoisers[name](**calls[index]), wanted[index]) for _ in range(15)]

    with ThreadPoolExecutor(2) as pool:
        assert max(map(max, pool.map(results, range(2)))) < 1e-3


@EVERYWHERE
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize, torch.vmap])
def test_inside_a_transform_is_one_sentence(denoisers, name, transform):
    """Compiled code would read what is not there, and gradients be zero."""
    given = arguments(2)
    sample = given.pop("sample")
    with pytest.raises(InputError, match=r"'sample' has no values of its own|'sample' is") as caught:
        transform(lambda value: denoisers[name](sample=value, **given).sum())(sample)
    assert "\n" not in str(caught.value)
