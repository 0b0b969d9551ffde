"""What later stages need to know of a graph survives tools that rebuild it."""

import copy

import pytest
import torch
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser, tiny_unet
from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.quantization.convert import program_from_graph


def rebuilt(graph_module):
    """The same nodes in a graph and a module of their own, as torch's passes and other tools make them."""
    graph = fx.Graph()
    copies = {}
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph_module, graph)


def calibrated(model, inputs):
    prepared = tfmq_fx.prepare(tfmq_fx.capture(model, inputs), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [inputs], progress=False)
    return prepared


@torch.no_grad()
def test_torchs_cse_pass_after_capture():
    model, inputs = tiny_unet().eval(), batch()
    merged = CSEPass()(tfmq_fx.capture(model, inputs))
    assert merged.modified and isinstance(merged.graph_module(*inputs), tuple)
    prepared = tfmq_fx.prepare(merged.graph_module, timesteps=TIMESTEPS)
    assert isinstance(merged.graph_module(*inputs), tuple), "what was given is not changed"
    tfmq_fx.calibrate(prepared, [inputs], progress=False)
    denoiser = tfmq_fx.lower(tfmq_fx.convert(prepared), "reference")
    assert relative(denoiser(*inputs).sample, model(*inputs).sample) < 0.04


def test_a_prepared_graph_that_was_rebuilt_is_refused_in_a_sentence():
    """``convert_pt2e`` of torchao 0.18 asserts that the module's own metadata is there."""
    prepared = rebuilt(calibrated(small_denoiser(), batch()))
    with pytest.raises(tfmq_fx.ConfigError, match="rebuilt this prepared graph"):
        tfmq_fx.convert(prepared)


def test_a_converted_graph_that_was_rebuilt():
    model, inputs = small_denoiser(), batch()
    prepared = calibrated(model, inputs)
    wanted = tfmq_fx.convert(prepared)
    converted = rebuilt(convert_pt2e(copy.deepcopy(prepared)))
    assert not converted.meta
    program = program_from_graph(converted)
    torch.testing.assert_close(program(*inputs), wanted(*inputs), rtol=0, atol=0)
    assert program.kept_float == wanted.kept_float and program.interface == wanted.interface
    assert str(calling_convention(program.graph_module.graph)) == str(calling_convention(wanted.graph_module.graph))


def test_a_graph_without_any_convention_is_called_with_bare_tensors():
    model, inputs = small_denoiser(), batch()
    exported = rebuilt(torch.export.export(model, inputs).module(check_guards=False))
    prepared = prepare_pt2e(exported, tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS))
    prepared(*inputs)
    denoiser = tfmq_fx.lower(convert_pt2e(prepared), "reference")
    (result,) = denoiser(*inputs)
    assert relative(result, model(*inputs)) < 0.04


def test_observers_that_another_tool_left_in_the_graph_are_converted():
    """nncf places quantizers for what is annotated; the observers of the temporal block are not annotations."""
    inputs = batch()
    prepared = calibrated(small_denoiser(), inputs)
    wanted = tfmq_fx.convert(prepared)
    left = {n.target: prepared.get_submodule(n.target) for n in prepared.graph.nodes if n.op == "call_module"}
    temporal = [name for name, m in left.items() if isinstance(m, tfmq_fx.observers.TimestepObserver)]
    assert temporal
    hidden = {name: left[name].convert for name in temporal}
    partly = copy.deepcopy(prepared)
    for name in hidden:
        partly.get_submodule(name).convert = lambda model, node: None
    converted = convert_pt2e(partly)
    for name in hidden:
        del converted.get_submodule(name).convert
    assert sum(n.op == "call_module" for n in converted.graph.nodes) == len(temporal)
    torch.testing.assert_close(program_from_graph(rebuilt(converted))(*inputs), wanted(*inputs), rtol=0, atol=0)


def test_weights_are_integers_whatever_fold_quantize_says():
    inputs = batch()
    prepared = calibrated(small_denoiser(), inputs)
    program = program_from_graph(convert_pt2e(copy.deepcopy(prepared), fold_quantize=False))
    torch.testing.assert_close(program(*inputs), tfmq_fx.convert(prepared)(*inputs), rtol=0, atol=0)
    assert "fold_quantize" in (tfmq_fx.TFMQQuantizer.__doc__ or "")
