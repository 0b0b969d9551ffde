"""The examples of the README run, in order, in one namespace, as a reader would run them."""

import re
from pathlib import Path

import pytest

import tfmq_fx

README = Path(__file__).parents[1] / "README.md"
#: Fewer steps and samples, and no C++ compilation: the code is the README's, the sizes are a test's.
SMALLER = (
    ("set_timesteps(50)", "set_timesteps(4)"),
    ("steps=50, samples=32", "steps=4, samples=8"),
    ("batch_size=4, num_inference_steps=50", "batch_size=1, num_inference_steps=4"),
)


def test_the_examples_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    lower = tfmq_fx.lower
    monkeypatch.setattr(tfmq_fx, "lower", lambda program: lower(program, backend="reference"))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        for full, small in SMALLER:
            block = block.replace(full, small)
        exec(compile(block, str(README), "exec"), namespace)
    assert len(namespace["images"]) == 1
    assert namespace["result"].modified
    assert namespace["denoiser"].report.temporal_layers == 0


@pytest.mark.parametrize("name", re.findall(r"\| `(\w+)\(", README.read_text(encoding="utf-8")))
def test_every_name_in_the_interface_table_exists(name):
    assert callable(getattr(tfmq_fx, name))
