"""NaN and infinite values are refused where they arise, by the names of the layer, the batch and the timestep."""

import copy
import pickle

import pytest
import torch
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import tfmq_fx
from tests.conditional_cases import BATCHES, CONDITIONS, captured
from tests.models import TIMESTEPS, SmallDenoiser, batch, small_denoiser
from tests.reconstruction_cases import SCALAR_BATCHES, calibrated, rec
from tfmq_fx import NonFiniteError, QuantizationConfig
from tfmq_fx.frontend.batches import bind_batch
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.observers import (
    ConditionalObserver,
    EMAMinMaxObserver,
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    MinMaxObserver,
    MSEObserver,
    PerChannelWeightObserver,
    TimestepObserver,
)
from tfmq_fx.temporal.calibrate import calibrate_conditional_part
from tfmq_fx.temporal.domain import conditioned_domain
from tfmq_fx.temporal.inputs import Conditionings
from tfmq_fx.temporal.refusal import refused_rows

SPEC = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
BAD = (float("nan"), float("inf"), float("-inf"))
ROWS = torch.tensor([0, 1, 1, 0])


def cases():
    for make in (MinMaxObserver, EMAMinMaxObserver, MSEObserver):
        yield make(subject="the input of layer 'a'", **SPEC), ()
    for grouped in (GroupedMinMaxObserver, GroupedEMAObserver, GroupedMSEObserver, TimestepObserver):
        yield grouped(2, 8, "the input of layer 'a'"), (ROWS,)
    yield ConditionalObserver(2, 8, "the input of layer 'a'"), (ROWS,)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_observer_refuses_and_keeps_what_it_knew(value, dtype):
    for observer, rows in cases():
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        observer(x, *rows)
        before = copy.deepcopy(observer.state_dict())
        x[2, 1, 3] = value
        with pytest.raises(NonFiniteError, match="the input of layer 'a' holds NaN or infinite values") as caught:
            observer(x, *rows)
        assert "\n" not in str(caught.value) and caught.value.entries == (2,) and caught.value.length == 4
        assert list(caught.value.rows) == ([1] if isinstance(observer, TimestepObserver) else [])
        assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())
        scale, _ = observer.calculate_qparams()
        assert bool(scale.isfinite().all())


@pytest.mark.parametrize("value", BAD)
def test_a_weight_is_refused(value):
    weight = torch.randn(3, 4)
    weight[1, 2] = value
    with pytest.raises(NonFiniteError, match="the weight of layer 'a'"):
        PerChannelWeightObserver(8, True, False, subject="the weight of layer 'a'")(weight)


def test_the_error_survives_a_process_boundary():
    error = NonFiniteError("x", (1, 2), 4).at(" in calibration batch 3")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.entries == (1, 2) and "batch 3" in str(again)


def prepared(model=None, **config):
    return tfmq_fx.prepare(
        tfmq_fx.capture(model or small_denoiser(), batch()), QuantizationConfig(**config), timesteps=TIMESTEPS
    )


def overflowing(size=4, seed=1, item=2):
    """Finite inputs, one of which overflows float32 in the first convolution."""
    x, t = batch(size, seed)
    x[item] = 3e38
    return x, t


@pytest.mark.parametrize(
    "config",
    [{}, {"activation_range": "minmax"}, {"activation_range": "mse"}, {"activation_groups": 2}, {"temporal": "shared"}],
    ids=str,
)
def test_one_bad_item_names_layer_batch_and_timestep(config):
    bad = overflowing(12)
    with pytest.raises(
        NonFiniteError, match=r"the input of layer '\w+\.\w+'.* in calibration batch 1, at timestep \d"
    ) as e:
        tfmq_fx.calibrate(prepared(**config), [batch(12), bad], progress=False)
    assert str(e.value).split("at timestep ")[1].split(";")[0] == f"{bad[1][2].item()}"


def test_calibration_goes_on_after_a_refused_batch_as_if_it_had_not_been():
    graph, clean = prepared(activation_range="mse"), prepared(activation_range="mse")
    good = [batch(seed=seed) for seed in (1, 2)]
    tfmq_fx.calibrate(clean, good, progress=False)
    tfmq_fx.calibrate(graph, good[:1], progress=False)
    for wrong in (overflowing(), (batch()[0], batch()[1] + 1)):
        with pytest.raises(tfmq_fx.CalibrationError):
            tfmq_fx.calibrate(graph, [wrong], progress=False)
    tfmq_fx.calibrate(graph, good[1:], progress=False)
    for ours, theirs in zip(graph.buffers(), clean.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_stock_workflow_names_the_layer():
    program = tfmq_fx.capture(small_denoiser(), batch())
    graph = prepare_pt2e(program, tfmq_fx.TFMQQuantizer(QuantizationConfig(), timesteps=TIMESTEPS))
    with pytest.raises(NonFiniteError, match=r"the input of layer '[\w.]+' holds NaN or infinite values in entry 2 of"):
        graph(*overflowing())


class Logarithm(SmallDenoiser):
    """Its time path takes the logarithm of the timestep: minus infinity at 0."""

    def forward(self, sample, timestep):
        return self.denoise(sample, self.time(timestep.float().log()))


def test_the_temporal_block_names_layer_and_timestep():
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError, match=r"the input of layer 'time\.one' holds .* at timestep 0;"):
        prepared(Logarithm().eval())


def test_a_broken_weight_is_named():
    graph = prepared()
    with torch.no_grad():
        graph.get_parameter("down.conv2.weight")[1, 1, 1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the weight of layer 'down\.conv2'.*batch 0"):
        tfmq_fx.calibrate(graph, [batch()], progress=False)


def unlike_any_batch(timesteps):
    """Every timestep with a conditioning that is infinite: no batch holds it, but what lies behind may yet overflow."""
    sample, t, tokens, pooled = (value[:1] for value in BATCHES[0])
    call = bind_batch(interface_of(captured()), 0, (sample, t, tokens, pooled), "timestep")
    call.leaves[3] = torch.full_like(pooled, torch.inf)
    bad = Conditionings(CONDITIONS)
    bad.add(captured(), call)
    return conditioned_domain("timestep", timesteps.double(), bad)


def test_the_conditional_part_names_layer_and_timestep_and_keeps_what_it_knew():
    graph = tfmq_fx.prepare(captured(), QuantizationConfig(), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    before = copy.deepcopy(graph.state_dict())
    with pytest.raises(
        NonFiniteError, match=r"the input of layer '[\w.]+' holds .* at timesteps 0, 100, 200, 300 and 6"
    ):
        calibrate_conditional_part(graph, unlike_any_batch(TIMESTEPS))
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


def test_the_conditional_part_names_the_timestep_of_a_schedule_in_any_order():
    """Rows of its observers count in the order of noise, a schedule in that of sampling."""
    graph = tfmq_fx.prepare(captured(), QuantizationConfig(), timesteps=TIMESTEPS.flip(0))
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    (observer,) = [module for module in graph.modules() if isinstance(module, ConditionalObserver)]
    domain = unlike_any_batch(TIMESTEPS.flip(0))
    with pytest.raises(NonFiniteError) as caught, refused_rows(domain, domain.columns()["timestep"]):
        observer(torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 9]))
    assert "at timestep 900;" in str(caught.value)


@pytest.mark.parametrize("scalar", [False, True])
def test_reconstruction_names_unit_batch_and_timestep(scalar):
    good = SCALAR_BATCHES if scalar else [batch(24, seed=1)]
    bad = (torch.full((5, 1, 8, 8), 3e38), TIMESTEPS[3]) if scalar else overflowing(24)
    when = int(bad[1]) if scalar else bad[1][2].item()
    place = f" in calibration batch {len(good)}, at timestep {when};"
    with pytest.raises(NonFiniteError, match=rf"the output of unit '[\w.]+' holds NaN or infinite values{place}"):
        rec(calibrated(scalar=scalar), [*good, bad])


@pytest.mark.parametrize("temporal", ["cache", "float"])
def test_a_table_with_values_that_are_not_finite_is_refused(temporal):
    torch.manual_seed(0)
    x, t = batch()
    batches = [(x, t.clamp_min(100))]
    graph = prepared(Logarithm().eval(), temporal=temporal)
    tfmq_fx.calibrate(graph, batches, progress=False)
    with pytest.raises(tfmq_fx.TfmqError, match=r"the temporal feature of '[\w.]+' holds .* at timestep 0;") as caught:
        tfmq_fx.lower(tfmq_fx.convert(graph), "reference")
    assert "\n" not in str(caught.value)


class InfiniteScale(ObserverBase):
    """Not one of ours."""

    quant_min, quant_max, qscheme = 0, 255, torch.per_tensor_affine

    def forward(self, x):
        return x

    def calculate_qparams(self):
        return torch.tensor([torch.inf]), torch.tensor([0])


def test_a_scale_of_another_quantizer_is_refused_too():
    graph = prepared()
    tfmq_fx.calibrate(graph, [batch()], progress=False)
    foreign = InfiniteScale(torch.uint8)
    (name,) = [str(n.args[0].target) for n in graph.graph.nodes if "conv1" in str(n.meta.get("nn_module_stack"))
               and n.target is torch.ops.aten.conv2d.default and "down" in str(n.meta["nn_module_stack"])]  # fmt: skip
    setattr(graph, name, foreign)
    with pytest.raises(
        tfmq_fx.CalibrationError, match=r"the quantization of 'down\.conv1' \(node .*no positive number"
    ):
        tfmq_fx.convert(graph)
