"""nncf's ``quantize_pt2e`` with our quantizer, in an environment of its own (``make bench-peers``)."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TFMQ_NNCF_PYTHON", ROOT / ".peers/nncf/bin/python"))

#: nncf replaces the metadata of nodes and drops the module's; it keeps modules that the graph calls.
CLIENT = """
import json, sys
sys.path.append(sys.argv[1])
import nncf
import torch
from nncf.experimental.torch.fx import quantize_pt2e
import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser

model, inputs = small_denoiser(), batch()
quantizer = tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS)
with torch.no_grad():
    captured = tfmq_fx.capture(model, inputs)
    result = quantize_pt2e(captured, quantizer, nncf.Dataset([inputs] * 4, lambda x: x), fast_bias_correction=None)
    left = sum(node.op == "call_module" for node in result.graph.nodes)
    denoiser = tfmq_fx.lower(result, "reference")
    error = relative(denoiser(*inputs), model(*inputs))
report = denoiser.report
print(json.dumps({"left": left, "meta": len(result.meta), "error": error, "rows": report.table_rows}))
"""


def test_the_temporal_block_is_quantized_too():
    if not PYTHON.exists():
        pytest.skip("nncf has no environment here: make bench-peers, or name its python in TFMQ_NNCF_PYTHON")
    command = [str(PYTHON), "-c", CLIENT, sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # What nncf does: it leaves our observers in the graph and drops what the module knew.
    assert found["left"] > 0 and found["meta"] == 0
    assert 0 < found["error"] < 0.04 and found["rows"] == 10
