"""An observer of one's own: registered once, it is known to configurations, the quantizer and the command line."""

import dataclasses
import re

import pytest
import torch

import tfmq_fx
from tests.cli.test_cli import tfmq
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import CalibrationError, ConfigError, QuantizationConfig, ReconstructionConfig
from tfmq_fx.observers import (
    GroupedMinMaxObserver,
    GroupedObserver,
    MinMaxObserver,
    PerTensorObserver,
    activation_observer,
    activation_observer_names,
    register_activation_observer,
    unregister_activation_observer,
)


class LastRange(PerTensorObserver):
    """The range of the batch that was seen last."""

    def __init__(self, **spec):
        super().__init__(**spec)
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))

    def forward(self, x):
        low, high = self.range_of(x.detach())
        self.low, self.high = low.reshape(1), high.reshape(1)
        return x

    def observed_range(self):
        return self.low, self.high


class GroupedLastRange(GroupedObserver):
    """The same, group by group."""

    def observe(self, values, groups, present, low, high):
        self.low = torch.where(present, low, self.low)
        self.high = torch.where(present, high, self.high)


@pytest.fixture
def registered():
    yield register_activation_observer("last", LastRange, GroupedLastRange)
    unregister_activation_observer("last")


def observers_of(graph_module, kind):
    return [module for module in graph_module.modules() if type(module) is kind]


@pytest.mark.parametrize(("groups", "kind"), [(1, LastRange), (4, GroupedLastRange)])
def test_it_quantizes_with_and_without_timestep_groups(registered, groups, kind, tmp_path):
    config = QuantizationConfig(activation_range="last", activation_groups=groups)
    model, (x, t) = small_denoiser(), batch(8)
    captured = tfmq_fx.capture(model, (x, t))
    prepared = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS)
    assert observers_of(prepared, kind) and not observers_of(prepared, MinMaxObserver)
    batches = [(100 * x, t), (x, t)]
    program = tfmq_fx.quantize(model, config, batches, timesteps=TIMESTEPS, progress=False)
    with torch.no_grad():
        assert 0 < relative(program(x, t), model(x, t)) < 0.05  # of the last batch alone; of both, the error is larger
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "artefact"))
    assert loaded.config == config and torch.equal(loaded(x, t), program(x, t))


def test_it_is_reconstructed(registered):
    learned = ReconstructionConfig(iterations=2, temporal_iterations=2, batch_size=4)
    config = QuantizationConfig(activation_range="last", activation_groups=4, reconstruction=learned)
    program = tfmq_fx.quantize(small_denoiser(), config, [batch(8)], timesteps=TIMESTEPS, progress=False)
    assert torch.isfinite(program(*batch())).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_a_program_is_loaded_where_its_observer_is_not_registered(groups, tmp_path):
    register_activation_observer("last", LastRange, GroupedLastRange)
    try:
        config = QuantizationConfig(activation_range="last", activation_groups=groups)
        program = tfmq_fx.quantize(small_denoiser(), config, [batch(8)], timesteps=TIMESTEPS, progress=False)
        tfmq_fx.save(program, tmp_path / "artefact")
    finally:
        unregister_activation_observer("last")
    loaded, (x, t) = tfmq_fx.load(tmp_path / "artefact"), batch(8)
    assert loaded.config == config and hash(loaded.config) == hash(config)
    assert torch.equal(loaded(x, t), program(x, t))
    # Nor does anything that is done with a program that has its ranges need it.
    again = tfmq_fx.load(tfmq_fx.save(loaded, tmp_path / "again"))
    nearest = tfmq_fx.lower(again, "reference", unknown_timestep="nearest")
    assert relative(nearest(x[:2], t[:2]), program(x[:2], t[:2])) < 1e-3
    assert tfmq_fx.add_timesteps(loaded, [3]).config == config
    # Preparing does, and so does a configuration of one's own.
    captured = tfmq_fx.capture(small_denoiser(), (x, t))
    for use in (
        lambda: tfmq_fx.prepare(captured, loaded.config, timesteps=TIMESTEPS),
        lambda: tfmq_fx.TFMQQuantizer(loaded.config, timesteps=TIMESTEPS),
        lambda: QuantizationConfig.from_dict(loaded.config.to_dict()),
        lambda: dataclasses.replace(loaded.config, activation_range="last"),
    ):
        with pytest.raises(ConfigError, match=r"activation_range='last' is not supported: .* first$") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_the_command_line_lists_and_takes_it(registered, tmp_path):
    shown = tfmq("quantize", "--help").stdout
    assert re.search(r"--activation-range\s+<ema\|minmax\|mse\|last>", shown)
    refused = tfmq("quantize", "--out", "x", "--activation-range", "first")
    assert refused.exit_code == 2 and "'last'" in refused.output
    # It is taken: what is refused next is the model.
    result = tfmq("quantize", str(tmp_path / "no-such-model"), "--out", "x", "--activation-range", "last")
    assert result.exit_code == 1 and "activation" not in result.stderr


def test_without_a_grouped_form_groups_are_refused_in_a_sentence():
    register_activation_observer("plain", LastRange)
    try:
        QuantizationConfig(activation_range="plain")
        with pytest.raises(ConfigError, match=r"'plain' was registered without a grouped observer.*groups=1"):
            QuantizationConfig(activation_range="plain", activation_groups=2)
    finally:
        unregister_activation_observer("plain")
    with pytest.raises(ConfigError, match="register_activation_observer first"):
        QuantizationConfig(activation_range="plain")


def test_a_name_is_taken_once(registered):
    with pytest.raises(ConfigError, match="registered already"):
        register_activation_observer("last", LastRange)
    assert register_activation_observer("last", LastRange, override=True).grouped is None
    assert activation_observer_names() == ("ema", "minmax", "mse", "last")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("", LastRange), "not empty"), ((3, LastRange), "must be a string"), (("x", object), "PerTensorObserver"),
     (("x", LastRange, LastRange), "GroupedObserver"), (("x", GroupedMinMaxObserver), "per_tensor=")],
)  # fmt: skip
def test_what_cannot_be_registered_is_refused_and_leaves_no_trace(arguments, words):
    with pytest.raises(ConfigError, match=words):
        register_activation_observer(*arguments)
    assert activation_observer_names() == ("ema", "minmax", "mse")


def test_an_unknown_name_is_refused():
    for call in (activation_observer, unregister_activation_observer):
        with pytest.raises(ConfigError, match="'nope' is not supported: use one of 'ema', 'minmax', 'mse'"):
            call("nope")


def test_one_of_ours_cannot_be_taken_back_but_what_took_its_place_can():
    with pytest.raises(ConfigError, match="'ema' belongs to tfmq_fx"):
        unregister_activation_observer("ema")
    ours = activation_observer("ema")
    register_activation_observer("ema", LastRange, override=True)
    assert activation_observer("ema").per_tensor is LastRange
    unregister_activation_observer("ema")
    assert activation_observer("ema") is ours and QuantizationConfig().activation_range == "ema"


class NoForward(PerTensorObserver):
    observed_range = LastRange.observed_range


class NoRange(PerTensorObserver):
    forward = LastRange.forward


class NoArguments(LastRange):
    def __init__(self):
        pass


class NoObserve(GroupedObserver):
    pass


class NoGroupArguments(GroupedLastRange):
    def __init__(self, **spec):
        pass


@pytest.mark.parametrize(
    ("classes", "words"),
    [((NoForward,), "NoForward has no forward of its own"), ((NoRange,), "has no observed_range"),
     ((NoArguments,), r"made as NoArguments\(dtype=…, .*subject=…\)"), ((LastRange, NoObserve), "has no observe"),
     ((LastRange, NoGroupArguments), r"NoGroupArguments\(groups, bits, subject\)")],
)  # fmt: skip
def test_a_class_that_could_not_be_used_is_refused_at_once(classes, words):
    with pytest.raises(ConfigError, match=words):
        register_activation_observer("unusable", *classes)
    assert "unusable" not in activation_observer_names()


def ends_of(low, high):
    return lambda self: (low, high)


FAULTY = {
    "nan": ({"observed_range": ends_of(torch.tensor([torch.nan]), torch.ones(1))}, r"\[nan, 1\]; return finite ends"),
    "inf": ({"observed_range": ends_of(torch.zeros(1), torch.tensor([torch.inf]))}, r"\[0, inf\]"),
    "beyond float32": ({"observed_range": ends_of(torch.zeros(1), torch.tensor([1e300], dtype=torch.float64))}, "inf"),
    "reversed": ({"observed_range": ends_of(torch.ones(1), -torch.ones(1))}, r"\[1, -1\].*the lower one first"),
    "numbers": ({"observed_range": ends_of(-1.0, 1.0)}, r"\(a float, a float\).*shape \[1\]"),
    "shape": ({"observed_range": ends_of(torch.zeros(3), torch.ones(3))}, r"a float32 tensor of shape \[3\]"),
    "integers": ({"observed_range": ends_of(torch.tensor([0]), torch.tensor([1]))}, "int64 tensor"),
    "one tensor": ({"observed_range": lambda self: torch.zeros(1, 2)}, r"tensor of shape \[1, 2\]"),
    "nothing": ({"observed_range": lambda self: None}, "a NoneType"),
    "forward none": ({"forward": lambda self, x: None}, "its forward returns a NoneType"),
    "forward zeros": ({"forward": lambda self, x: x * 0}, "its forward returns another tensor"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_an_observer_that_breaks_its_contract_is_named_with_the_layer(fault):
    methods, words = FAULTY[fault]
    register_activation_observer("faulty", type("Faulty", (LastRange,), methods))
    try:
        config = QuantizationConfig(activation_range="faulty", temporal="float")
        with pytest.raises(CalibrationError, match=rf"observer Faulty of the input of layer '.+': .*{words}"):
            tfmq_fx.quantize(small_denoiser(), config, [batch(8)], timesteps=TIMESTEPS, progress=False)
    finally:
        unregister_activation_observer("faulty")


GROUPED_FAULTY = {
    "nan": ({"observed_ranges": lambda self: (self.low * torch.nan, self.high)}, r"\[nan, "),
    "reversed": ({"observed_ranges": lambda self: (self.high, self.low)}, "the lower one first"),
    "shape": ({"observed_ranges": lambda self: (self.low[:1], self.high[:1])}, r"shape \[1\].*of shape \[4\]"),
    "forward": ({"forward": lambda self, x, groups: x + 1}, "its forward returns another tensor"),
}


@pytest.mark.parametrize("fault", GROUPED_FAULTY)
def test_a_grouped_observer_that_breaks_its_contract_is_named_with_the_layer(fault):
    methods, words = GROUPED_FAULTY[fault]
    register_activation_observer("faulty", LastRange, type("Faulty", (GroupedLastRange,), methods))
    try:
        config = QuantizationConfig(activation_range="faulty", temporal="float", activation_groups=4)
        with pytest.raises(CalibrationError, match=rf"observer Faulty of the input of layer '.+': .*{words}"):
            tfmq_fx.quantize(small_denoiser(), config, [batch(8)], timesteps=TIMESTEPS, progress=False)
    finally:
        unregister_activation_observer("faulty")


def test_a_range_without_axes_is_a_range():
    observer = type("Flat", (LastRange,), {"observed_range": ends_of(torch.tensor(-1.0), torch.tensor(1.0))})(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
    )
    scale, zero_point = observer.calculate_qparams()
    assert scale.tolist() == pytest.approx([2 / 255]) and zero_point.shape == (1,)
