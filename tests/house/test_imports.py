"""What importing costs, and what it leaves alone: which modules come in, never how long that takes."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.house.sources import ROOT, sources

#: What takes long to import, and what is optional.
HEAVY = ("torch", "torchao", "diffusers", "numpy", "matplotlib", "PIL", "safetensors", "hypothesis", "openvino", "onnx")


def run(code, *, cwd=ROOT, arguments=()):
    """The JSON that ``code`` prints last, from a fresh process in ``cwd``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_none_of_what_it_works_with():
    loaded = run("import sys, json, tfmq_fx; print(json.dumps(sorted(sys.modules)))")
    assert "tfmq_fx.errors" in loaded
    assert not {*HEAVY, "rich", "typer"} & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compare", "-h"]], ids=" ".join)
def test_help_and_version_import_none_of_it_either(arguments):
    code = (
        "import sys, json\nfrom tfmq_fx.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(json.dumps(sorted(sys.modules)))"
    )
    loaded = run(code, arguments=arguments)
    assert "typer" in loaded
    assert not set(HEAVY) & set(loaded)


def test_public_names_need_no_diffusers_and_no_compiler():
    """Until a model is loaded, something is compiled or a picture is drawn."""
    code = (
        "import sys, json, tfmq_fx\n"
        "for name in tfmq_fx.__all__:\n    getattr(tfmq_fx, name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = run(code)
    assert "tfmq_fx.passes.base" in loaded
    assert not {"diffusers", "torch._inductor.compile_fx", "matplotlib", "hypothesis", "openvino", "onnx"} & set(loaded)


def test_importing_changes_nothing_global():
    """torch and torchao change what they like; we come after them here."""
    code = (
        "import json, logging, signal, sys, warnings, torch, torchao.quantization.pt2e.quantize_pt2e, tfmq_fx\n"
        "def state():\n"
        "    root = logging.getLogger()\n"
        "    return repr([root.manager.disable, root.level, root.handlers, logging.getLogger('tfmq_fx').handlers,\n"
        "                 warnings.filters, warnings.showwarning, signal.getsignal(signal.SIGINT), sys.excepthook,\n"
        "                 torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "                 torch.initial_seed(), torch.are_deterministic_algorithms_enabled()])\n"
        "before = state()\n"
        "for name in tfmq_fx.__all__:\n    getattr(tfmq_fx, name)\n"
        "print(json.dumps([before, state()]))"
    )
    before, after = run(code)
    assert before == after


@pytest.mark.parametrize("package", [name for name, source in sources().items() if source.is_package])
def test_no_name_of_a_package_hides_a_module_in_it(package):
    """``import a.b`` and ``from a import b`` then mean the same; the names of modules are not those of functions."""
    inside = {name.rpartition(".")[2] for name in sources() if name.rpartition(".")[0] == package}
    hidden = set()
    for node in ast.walk(sources()[package].tree):
        if isinstance(node, ast.ImportFrom):
            module = f"{package}{'.' if node.module else ''}{node.module or ''}" if node.level else node.module
            hidden |= {a.asname or a.name for a in node.names if module != package} & inside
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            hidden |= {node.name} & inside
    assert not hidden


def test_another_checkout_with_this_environment_is_not_mixed_with_this_one(tmp_path):
    """Everything of ``tfmq_fx`` comes from the folder where Python runs, its passes too, which lie elsewhere."""
    clone = tmp_path / "clone"
    for folder in ("tfmq_fx", "passes"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", "models"))
    code = (
        "import sys, json, tfmq_fx\n"
        "tfmq_fx.passes, tfmq_fx.testing, tfmq_fx.capture, tfmq_fx.lower\n"
        "print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'tfmq_fx'}))"
    )
    files = run(code, cwd=clone)
    assert {"tfmq_fx", "tfmq_fx.passes", "tfmq_fx.passes.base", "tfmq_fx.lowering.lower"} <= set(files)
    assert not {name: file for name, file in files.items() if not file.startswith(str(clone.resolve()))}
