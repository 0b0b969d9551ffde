"""Cutting a generated model into stages changes nothing, whatever its time path looks like."""

import torch
from hypothesis import given

from tests.properties.test_timestep_algebra import assert_close, run
from tfmq_fx.lowering.stages import split_stages
from tfmq_fx.passes.analysis import data_dependence, find_conditional_part
from tfmq_fx.testing import temporal_graphs


@given(temporal_graphs())
def test_the_stages_together_are_the_model(model):
    graph_module, name = model.graph_module, model.path.timestep_name
    before = str(graph_module.graph)
    part = find_conditional_part(graph_module, {"sample"}, name)
    dependence = data_dependence(graph_module)
    assert not any("sample" in dependence[node] for node in (*part.per_prompt, *part.per_timestep))
    assert all((name in dependence[node]) is (node in part.per_timestep)
               for node in (*part.per_prompt, *part.per_timestep))  # fmt: skip
    staged = split_stages(graph_module, part)
    assert str(graph_module.graph) == before
    if staged is None:
        return
    stages = staged.layout.stages
    # Every temporal layer is in front of the last stage, and the sample is read by the last alone.
    assert [("sample" in stage.inputs) for stage in stages] == [False] * (len(stages) - 1) + [True]
    inputs = model.example_inputs()
    values = dict(zip((n.name for n in graph_module.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with torch.no_grad():
        for stage, module in zip(stages, staged.graph_modules, strict=True):
            outputs = module(*(values[value] for value in stage.inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            values.update(zip(stage.outputs, outputs, strict=True))
    assert_close(
        run(graph_module, inputs), [values[node.name] for node in graph_module.graph.output_node().all_input_nodes]
    )
