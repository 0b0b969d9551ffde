"""Calls that must end in a sentence even where asserts are stripped; ``python -O -m tests.refusal_cases`` runs all."""

import torch

from tfmq_fx.data.prediction import predicted
from tfmq_fx.errors import TfmqError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.observers import MinMaxObserver, PerChannelWeightObserver
from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.analysis.reconstruction_units import ReconstructionUnit
from tfmq_fx.passes.support.predicates import constant_weight
from tfmq_fx.passes.units.partition_units import _make_contiguous
from tfmq_fx.reconstruction.rounding import RoundingTrainer, StepSize
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten
WEIGHT = "the weight of layer 'a.b'"


def weight_observer(bits=8, **options):
    return PerChannelWeightObserver(bits, **{"symmetric": True, "search": False, "subject": WEIGHT, **options})


def unseen_weight():
    weight_observer().calculate_qparams()


def weight_that_does_not_fit():
    weight_observer(symmetric=False).folded(torch.tensor([[255]]), torch.tensor([0]))


def step_outside_the_block():
    observer = weight_observer()
    trainer = RoundingTrainer([AdaRoundQuantizer(observer, torch.randn(2, 3))], compiled=False)
    trainer.soft = torch.zeros(6)
    trainer.step(StepSize(0.1, 2.0, 0.0))


def computed_weight():
    builder = GraphBuilder()
    x, w = builder.placeholder("x", (2, 4, 8, 8)), builder.placeholder("w", (4, 4, 3, 3))
    graph_module = builder.build(builder.call(aten.conv2d.default, x, w))
    constant_weight(next(n for n in graph_module.graph.nodes if n.target is aten.conv2d.default), "tfmq::some_pass")


def chain():
    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,))
    first = builder.call(aten.relu.default, x)
    second = builder.call(aten.neg.default, first)
    third = builder.call(aten.add.Tensor, second, builder.call(aten.unsqueeze.default, t, -1))
    return builder.build(third), (first, second, third)


def values_of_a_stand_in():
    graph_module, (*_, last) = chain()
    evaluate_temporal_nodes(graph_module, [last], [last], {"timestep": torch.arange(3.0)})


def units_in_a_circle():
    graph_module, (first, second, third) = chain()
    units = [ReconstructionUnit("ends", "layer", (first, third), ()), ReconstructionUnit("mid", "layer", (second,), ())]
    _make_contiguous(graph_module.graph, units)


def block_of_a_module():
    find_temporal_block(torch.nn.Linear(2, 2))


def prediction_without_a_tensor():
    predicted({"noise": 1}, 3)


def values_that_are_not_finite():
    spec = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    MinMaxObserver(subject="the input of layer 'a.b'", **spec)(torch.tensor([[0.0], [torch.nan]]))


#: Each with words of its sentence.
CASES = {
    unseen_weight: f"{WEIGHT} was never observed",
    weight_that_does_not_fit: f"{WEIGHT} does not fit in int8",
    step_outside_the_block: f"{WEIGHT} has no soft weight",
    computed_weight: "the weight of node 'conv2d_default' is computed",
    values_of_a_stand_in: "node 'add_tensor' reads the values of 'neg_default'",
    units_in_a_circle: "unit 'ends' with node 'relu_default'",
    block_of_a_module: "not in a Linear",
    prediction_without_a_tensor: "returned a dict",
    values_that_are_not_finite: "in entry 1 of the 2",
}


def said(case):
    """The sentence that a case ends in."""
    try:
        case()
    except TfmqError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    for case in CASES:
        print(f"{__debug__}: {said(case)}")
