import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx import QuantizationConfig, TFMQQuantizer
from tfmq_fx._torch.pt2e import Q_ANNOTATION_KEY
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.frontend.roles import find_roles, sample_inputs
from tfmq_fx.observers import TimestepObserver
from tfmq_fx.testing import GraphBuilder

decomposed = torch.ops.quantized_decomposed


class ConvLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.middle = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.middle(self.first(x)).mean((2, 3)))


def test_torchaos_own_quantizer_test_accepts_it():
    from torchao.testing.pt2e.utils import PT2EQuantizationTestCase

    case = PT2EQuantizationTestCase()
    q, dq = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
    dq_weight = decomposed.dequantize_per_channel.default
    case._test_quantizer(
        ConvLinear(),
        (torch.randn(2, 3, 8, 8),),
        TFMQQuantizer(QuantizationConfig(keep_float=())),
        expected_node_occurrence={q: 3, dq: 3, dq_weight: 3, decomposed.quantize_per_channel.default: 0},
        expected_node_list=[
            q, dq, torch.ops.aten.conv2d.default,
            q, dq, torch.ops.aten.conv2d.default,
            q, dq, torch.ops.aten.linear.default,
        ],
    )  # fmt: skip
    # The layers that touch input and output stay float by role.
    case._test_quantizer(
        ConvLinear(),
        (torch.randn(2, 3, 8, 8),),
        TFMQQuantizer(),
        expected_node_occurrence={q: 1, dq: 1, dq_weight: 1},
        expected_node_list=[torch.ops.aten.conv2d.default, q, dq, torch.ops.aten.conv2d.default],
    )


def test_the_torchao_workflow_end_to_end():
    model, (x, t) = small_denoiser(), batch()
    exported = torch.export.export(model, (x, t)).module()
    prepared = prepare_pt2e(exported, TFMQQuantizer(timesteps=TIMESTEPS))
    prepared(x, t)
    converted = convert_pt2e(prepared)
    with torch.no_grad():
        assert relative(converted(x, t), model(x, t)) < 0.05
    denoiser = tfmq_fx.lower(converted, backend="reference")
    assert denoiser.report.temporal_layers == 0
    assert relative(denoiser(x, t), converted(x, t)) < 1e-5


def test_it_composes_and_leaves_others_annotations_alone():
    model, (x, t) = small_denoiser(), batch()
    first = TFMQQuantizer(QuantizationConfig(weight_bits=4, keep_float=("input", "output")), timesteps=TIMESTEPS)
    second = TFMQQuantizer(QuantizationConfig(weight_bits=8, keep_float=()), timesteps=TIMESTEPS)
    prepared = prepare_pt2e(torch.export.export(model, (x, t)).module(), ComposableQuantizer([first, second]))
    prepared(x, t)
    weights = {n: b for n, b in convert_pt2e(prepared).named_buffers() if "int" in n}
    assert "enter_weight_int8" in weights and "down_conv1_weight_int4" in weights


def test_integers_and_shapes_are_never_annotated():
    x, t = batch()
    program = tfmq_fx.capture(small_denoiser(), (x, t))
    prepared = tfmq_fx.prepare(program, QuantizationConfig(keep_float=()), timesteps=TIMESTEPS)
    annotated = [n for n in prepared.graph.nodes if Q_ANNOTATION_KEY in n.meta]
    assert annotated
    for node in annotated:
        for source in node.meta[Q_ANNOTATION_KEY].input_qspec_map:
            assert source.meta["val"].is_floating_point()


def test_roles_follow_the_data_not_the_position():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave, self.middle, self.enter = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
            self.context = nn.Linear(5, 2)

        def forward(self, sample, context):
            h = self.enter(sample) + self.context(context).mean(1)[:, :, None, None]
            return self.leave(torch.relu(self.middle(h)))

    program = tfmq_fx.capture(Shuffled(), (torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)))
    roles = {str(n.args[1].target): r for n, r in find_roles(program).items()}
    assert roles == {"enter.weight": {"input"}, "leave.weight": {"output"}}


@pytest.mark.parametrize(("sample", "result", "other"), [
    ((2, 4, 8, 8), (2, 3, 8, 8), (2, 8, 8, 3)),
    ((2, 5, 4), (2, 5, 3), (2, 7, 3)),
    ((2, 3, 8, 4, 4), (2, 3, 4, 4, 4), (2, 7, 8, 4, 4)),
    ((2, 8, 3, 4, 4), (2, 4, 3, 4, 4), (2, 4, 3, 8, 4)),
])  # fmt: skip
def test_the_sample_is_what_is_shaped_like_the_result_but_for_its_channels(sample, result, other):
    """Images, sequences, videos with their frames in front of the channels and behind."""
    builder = GraphBuilder()
    x, y, t = builder.placeholder("x", sample), builder.placeholder("y", other), builder.placeholder("timestep", (2,))
    sums = [builder.call(torch.ops.aten.sum.default, value) for value in (x, y, t)]
    total = builder.call(torch.ops.aten.expand.default, sums[0], list(result))
    graph = builder.build([builder.call(torch.ops.aten.add.Tensor, total, sums[1]), sums[2]]).graph
    assert {node.name for node in sample_inputs(graph, "timestep")} == {"x"}


def test_attention_products_are_quantized_unless_kept_float():
    program = tfmq_fx.capture(small_denoiser(), batch())
    matmul = torch.ops.aten.matmul.default
    quantized = tfmq_fx.prepare(program, timesteps=TIMESTEPS)
    nodes = [n for n in quantized.graph.nodes if n.target is matmul]
    assert len(nodes) == 2 and all(a.op == "call_module" for n in nodes for a in n.args)
    kept = QuantizationConfig(keep_float=("input", "output", "attention"))
    kept_graph = tfmq_fx.prepare(program, kept, timesteps=TIMESTEPS).graph
    assert not [n for n in kept_graph.nodes if n.target is matmul]


def test_each_part_of_a_concatenation_gets_its_own_scale():
    program = tfmq_fx.capture(small_denoiser(), batch())
    for split, convs in ((True, 2), (False, 1)):
        prepared = tfmq_fx.prepare(program, QuantizationConfig(split_concatenations=split), timesteps=TIMESTEPS)
        shortcuts = [
            n for n in prepared.graph.nodes
            if n.target is torch.ops.aten.conv2d.default and "shortcut" in str(n.meta["nn_module_stack"])
        ]  # fmt: skip
        assert len(shortcuts) == convs
        assert len({n.args[0].target for n in shortcuts}) == convs


def test_one_observer_per_temporal_value():
    prepared = tfmq_fx.prepare(tfmq_fx.capture(small_denoiser(), batch()), timesteps=TIMESTEPS)
    observers = [m for m in prepared.modules() if isinstance(m, TimestepObserver)]
    # Inputs of h's two linears, and the one SiLU(h(t)) that all blocks read.
    assert len(observers) == 3 and all(bool(m.seen.all()) for m in observers)


@pytest.mark.parametrize(
    ("temporal", "indexed", "float_linears"), [("fsc", 3, 0), ("shared", 0, 0), ("observed", 0, 0), ("float", 0, 4)]
)  # fmt: skip
def test_the_temporal_modes(temporal, indexed, float_linears):
    program = tfmq_fx.capture(small_denoiser(), batch())
    prepared = tfmq_fx.prepare(program, QuantizationConfig(temporal=temporal), timesteps=TIMESTEPS)
    assert sum(isinstance(m, TimestepObserver) for m in prepared.modules()) == indexed
    kept = PreparedState.of(prepared).kept_float
    assert sum(reason == "temporal='float'" for reason in kept.values()) == float_linears


def test_timesteps_are_asked_for():
    program = tfmq_fx.capture(small_denoiser(), batch())
    with pytest.raises(tfmq_fx.ConfigError, match=r"timesteps=scheduler\.timesteps"):
        tfmq_fx.prepare(program)
    for bad in ([], [float("nan")], ["a"]):
        with pytest.raises(tfmq_fx.ConfigError, match="timesteps"):
            tfmq_fx.prepare(program, timesteps=bad)


def test_overrides_reach_their_layers():
    config = QuantizationConfig(overrides={"down.*": {"weight_bits": 4}, "up.conv1": {"weight_bits": 32}})
    model, data = small_denoiser(), batch()
    program = tfmq_fx.quantize(model, config, [data], timesteps=TIMESTEPS, progress=False)
    names = set(program.graph_module.state_dict())
    assert "down_conv1_weight_int4" in names and "up_conv2_weight_int8" in names and "up.conv1.weight" in names
