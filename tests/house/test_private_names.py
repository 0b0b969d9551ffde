"""Private names of torch, torchao and Inductor stand in ``tfmq_fx/_torch`` and nowhere else.

Read off the syntax tree: what is imported, what is reached from an imported name, and private attributes that no
class of this package defines, so that they can only be someone else's.
"""

import ast

import pytest

from tests.house.sources import ROOT, Source, dotted, sources

LIBRARIES = ("torch", "torchao")
#: Attribute reads by a string.
BY_STRING = ("getattr", "hasattr", "setattr", "delattr")
#: Public in the standard library in spite of the underscore.
STANDARD = {"_asdict", "_replace", "_fields"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_part(path: str) -> bool:
    """Whether a dotted path of torch or torchao goes through a private name.

    Operators are not meant, ``torch.ops.aten._softmax.default``: an exported program is made of them.
    """
    parts = path.split(".")
    if parts[:2] == ["torch", "ops"]:
        return False
    return parts[0] in LIBRARIES and any(map(is_private, parts))


def bound_names(tree: ast.Module) -> dict[str, str]:
    """What of torch and torchao the names of a module stand for: ``{"fx": "torch.fx"}``."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Assign):  # aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
            for target, value in pairs(node):
                head, _, rest = dotted(value).partition(".")
                if isinstance(target, ast.Name) and head in bound:
                    bound[target.id] = f"{bound[head]}.{rest}" if rest else bound[head]
    return {name: path for name, path in bound.items() if path.partition(".")[0] in LIBRARIES}


def pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values of an assignment, those of a tuple one by one."""
    target = node.targets[0]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return list(zip(target.elts, node.value.elts, strict=False))
    return [(target, node.value)]


def own_private_names(trees: list[ast.Module]) -> set[str]:
    """Private names that the package defines itself: functions, classes, attributes and fields."""
    own = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if dotted(node) == f"self.{node.attr}" else set()
    return {name for name in own if is_private(name)}


def violations(tree: ast.Module, own: set[str]) -> list[tuple[int, str]]:
    """Line and name of every private name of torch and torchao that a module uses."""
    bound = bound_names(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names if private_part(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(node.lineno, path) for path in paths if private_part(path)}
        elif isinstance(node, ast.Attribute):
            head, _, rest = dotted(node).partition(".")
            path = f"{bound[head]}.{rest}" if head in bound else ""
            if path.startswith("torch.ops."):
                continue
            if is_private(node.attr) and (path or node.attr not in own | STANDARD):
                found.add((node.lineno, path or node.attr))
        elif isinstance(node, ast.Call) and dotted(node.func) in BY_STRING and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                found.add((node.lineno, str(name.value)))
    return sorted(found)


def outside() -> list[Source]:
    return [source for source in sources().values() if source.room != "_torch"]


def test_private_names_stand_in_one_room():
    own = own_private_names([source.tree for source in sources().values()])
    found = [
        f"{source.path.relative_to(ROOT)}:{line}: {name}"
        for source in outside()
        for line, name in violations(source.tree, own)
    ]
    assert not found, "private names of torch and torchao belong in tfmq_fx/_torch:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._inductor.config as config", "torch._inductor.config"),
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        ("from torchao.quantization.pt2e._x import y", "torchao.quantization.pt2e._x.y"),
        ("def f():\n    from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("import torch\nx = torch._C", "torch._C"),
        ("import torch\nx = torch.cpu._is_vnni_supported()", "torch.cpu._is_vnni_supported"),
        ("from torch import fx\nx = fx._pytree", "torch.fx._pytree"),
        ("def f(graph):\n    return graph._codegen", "_codegen"),
        ("def f(call):\n    return call()._schema.name", "_schema"),
        ("def f(graph):\n    return getattr(graph, '_codegen', None)", "_codegen"),
        ("class A:\n    def f(self):\n        return self._buffers", "_buffers"),
    ],
)
def test_every_way_to_a_private_name_is_seen(code, name):
    tree = ast.parse(code)
    assert name in [found for _, found in violations(tree, own_private_names([tree]))]


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nx = torch.ops.aten._softmax.default",
        "from torch import nn\nx = nn.Module.__init__",
        "import torch\nx = torch.__version__",
        "class A:\n    def f(self):\n        self._x = 1\ndef g(a):\n    return a._x",
        "class A:\n    def _f(self):\n        return self._f",
        "from _thread import start_new_thread",
        "import torch\naten, prims = torch.ops.aten, torch.ops.prims\nx = aten._softmax",
    ],
)
def test_what_is_public_or_our_own_is_not(code):
    tree = ast.parse(code)
    assert not violations(tree, own_private_names([tree]))


def test_a_private_name_that_nobody_needs_is_gone():
    """Everything that a module of the room offers is used outside it."""
    offered = {
        name.value
        for source in sources().values()
        if source.room == "_torch"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__" and isinstance(node.value, ast.List)
        for name in node.value.elts
        if isinstance(name, ast.Constant)
    }
    assert offered
    used = set()
    for source in outside():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tfmq_fx._torch"):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    assert not offered - used
