"""torch's own ONNX exporter takes a converted program once its lookup of timesteps is written out in ATen."""

import copy

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tfmq_fx.passes import InlineTimestepRows

pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def test_a_program_with_its_lookup_inlined_is_exported(tmp_path):
    program = tfmq_fx.quantize(small_denoiser(), None, [batch()], timesteps=TIMESTEPS, progress=False)
    graph_module = copy.deepcopy(program.graph_module)
    InlineTimestepRows()(graph_module)
    x, t = batch(2)
    torch.onnx.export(graph_module, (x, t), dynamo=True).save(tmp_path / "program.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "program.onnx")
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, dict(zip(names, (x.numpy(), t.numpy()), strict=True)))
    assert relative(torch.from_numpy(result), program(x, t)) < 1e-3
