"""Whether a model is what a program was quantized from, but for the numbers in its weights."""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

from torch import fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import find_schema
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.interface import ConstantInput, Interface
from tfmq_fx.passes.analysis import TemporalBlock
from tfmq_fx.passes.analysis.layer_names import seen_through_observers
from tfmq_fx.passes.support.predicates import is_weighted, module_path, node_value
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.sites import Operation, numbered_operations

__all__ = ["check_interface", "check_layers", "check_whole", "refuse_architecture"]

#: Operators that a graph may have more or fewer of behind another export: they ask for sizes.
SIZES = ("aten.sym_size.int", "aten.sym_numel.default")


def refuse_architecture(difference: str) -> NoReturn:
    """Raise for a model of another architecture.

    Args:
        difference: A clause that says what differs, and where.

    Raises:
        CaptureError: Always.
    """
    msg = (
        f"the model's architecture is not that of the quantized program: {difference}; ranges are kept for other "
        "weights of the same architecture, captured by the same versions: quantize this model with batches of its own"
    )
    raise CaptureError(msg)


def check_interface(captured: Interface, program: Interface) -> None:
    """Refuse a model that is called with other inputs, or returns other results, than the program's was.

    Raises:
        CaptureError: Names the first input that differs.
    """
    actual, expected = ({entry.name: entry for entry in interface.inputs} for interface in (captured, program))
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            here, there = (
                "none" if entry is None else repr(entry.value) if isinstance(entry, ConstantInput) else str(entry)
                for entry in (actual.get(name), expected.get(name))
            )
            refuse_architecture(f"its input {name!r} is {here} here and {there} there")
    if captured.results != program.results or captured.spec != program.spec:
        refuse_architecture("its inputs or results have another structure")


def check_layers(prepared: fx.GraphModule, program: QuantizedProgram, block: TemporalBlock) -> None:
    """Refuse a model whose layers are others, or have weights of other shapes.

    Args:
        prepared: The model's graph, prepared as the program's was.
        program: The program.
        block: The temporal block of ``prepared``, whose layers the program lacks where it holds a table.

    Raises:
        CaptureError: Names the first layer that differs.
    """
    here = _weight_shapes(prepared)
    there = {operation: shape for operation, (_, shape) in _weight_shapes(program.graph_module).items()}
    for operation, (node, shape) in here.items():
        expected = there.pop(operation, None)
        if expected is None and not (program.config.tabulates and node in block):
            refuse_architecture(f"the program has no layer {operation}")
        if expected is not None and shape != expected:
            refuse_architecture(f"the weight of {operation} is {list(shape)} here and {list(expected)} there")
    if there:
        refuse_architecture(f"the model has no layer {next(iter(there))}")


def _weight_shapes(graph_module: fx.GraphModule) -> dict[Operation, tuple[fx.Node, tuple[int, ...]]]:
    shapes = {}
    for node, operation in numbered_operations(graph_module).items():
        if is_weighted(node):
            # torchao's observers have no value of their own.
            weight = node_value(seen_through_observers(node.all_input_nodes[1]))
            shapes[operation] = (node, tuple(weight.shape))
    return shapes


def check_whole(requantized: QuantizedProgram, program: QuantizedProgram) -> None:
    """Refuse a model whose converted graph has other operators or tensors than the program's.

    What layers and quantizers do not show is seen here: another activation function, other groups of a norm.

    Raises:
        CaptureError: Names a module and an operator that only one of the graphs has, or a tensor that differs.
    """
    here, there = _calls(requantized.graph_module), _calls(program.graph_module)
    for more, fewer, which in ((here, there, "this model"), (there, here, "the program")):
        for module, operator, numbers in more - fewer:
            given = f" with {numbers}" if numbers else ""
            refuse_architecture(f"only {which} computes {operator}{given} in {module or 'the model itself'!r}")
    actual, expected = (
        {name: (list(value.shape), value.dtype) for name, value in each.graph_module.state_dict().items()}
        for each in (requantized, program)
    )
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            shapes = [None if each.get(name) is None else each[name][0] for each in (actual, expected)]
            refuse_architecture(f"tensor {name!r} is {shapes[0]} here and {shapes[1]} there")


def _calls(graph_module: fx.GraphModule) -> Counter[tuple[str, str, str]]:
    """How often each module calls each operator, and with which numbers."""
    calls: Counter[tuple[str, str, str]] = Counter()
    for node in graph_module.graph.nodes:
        target = str(node.target)
        if node.op == "call_function" and target not in SIZES and not target.startswith("quantized_decomposed."):
            calls[module_path(node), target, _numbers(node)] += 1
    return calls


def _numbers(call: fx.Node) -> str:
    """The arguments of a call that are no nodes; those that are the operator's defaults may be left out."""
    schema = find_schema(call.target)
    defaults = [] if schema is None else [entry.default_value for entry in schema.arguments]
    given = [value for n, value in enumerate(call.args) if n >= len(defaults) or not _equal(value, defaults[n])]
    names = {} if schema is None else {entry.name: entry.default_value for entry in schema.arguments}
    given += [value for name, value in call.kwargs.items() if not _equal(value, names.get(name))]
    return ", ".join(str(leaf) for leaf in pytree.tree_leaves(given) if not isinstance(leaf, fx.Node))


def _equal(value: Any, default: Any) -> bool:
    """Whether an argument is its default; a graph has its lists as its own class."""
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return not isinstance(value, fx.Node) and type(value) is type(default) and bool(value == default)
