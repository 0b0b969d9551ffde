"""Read the size expressions of an exported graph: sums and products of a few symbols, nothing that could grow."""

from __future__ import annotations

import ast

from tfmq_fx.errors import ArtefactError

__all__ = ["check_expression"]

#: An input's size is the batch, or a multiple of it: longer expressions have nothing to say.
MOST_LETTERS, MOST_PARTS = 400, 16
LARGEST = 2**31
#: What torch writes for them: ``Mul(Integer(64), Symbol('s0', positive=True, integer=True))``.
SYMBOL_OPTIONS = ("positive", "nonnegative", "integer")


def check_expression(text: str) -> None:
    """Check the size of an axis of an input, which torch hands to sympy, and sympy to Python.

    Raises:
        ArtefactError: It is not one that torch writes for an input.
    """
    if len(text) <= MOST_LETTERS:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = None
        if tree is not None and sum(1 for _ in ast.walk(tree)) <= 8 * MOST_PARTS and _is_size(tree.body):
            return
    msg = f"the artefact's graph holds the size expression {text[:60]!r}, which is not one; do not trust it"
    raise ArtefactError(msg)


def _is_size(node: ast.expr) -> bool:
    """Whether ``node`` is a symbol, a whole number, or a sum or product of such."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if node.func.id == "Integer":
        return not node.keywords and len(node.args) == 1 and _is_number(node.args[0])
    if node.func.id == "Symbol":
        options = all(option.arg in SYMBOL_OPTIONS and _is_true(option.value) for option in node.keywords)
        return options and len(node.args) == 1 and _is_symbol(node.args[0])
    return node.func.id in ("Add", "Mul") and not node.keywords and all(map(_is_size, node.args))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= LARGEST


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_symbol(node: ast.expr) -> bool:
    """Whether ``node`` is the name of a size of an input, such as ``'s53'``."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    name = node.value
    return name[:1] == "s" and name[1:].isdecimal() and name.isascii() and len(name) <= 8
