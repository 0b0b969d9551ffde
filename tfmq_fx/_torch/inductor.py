"""Private names of Inductor: seconds to import, so imported to compile only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
import torch._inductor
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.codegen.common import KernelArgs
from torch._inductor.compile_fx import compile_fx
from torch._inductor.lowering import register_lowering
from torch._inductor.package.package import package_aoti
from torch._inductor.utils import Placeholder
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = [
    "CppKernelCall",
    "compile_flat_graph",
    "compile_to_files",
    "contiguous",
    "contiguous_rows",
    "freeze_weights",
    "package_aoti",
    "register_inductor_lowering",
]

#: What the generated signatures name: pointers only, so the types need not be complete, and compiling stays quick.
DECLARATIONS = "#include <cstdint>\nnamespace c10 { struct BFloat16; }\nnamespace at { using c10::BFloat16; }"
PROFILER = "#include <torch/csrc/inductor/aoti_runtime/utils.h>"
#: C++ of a call from the names of its inputs, of its output, and of a number.
Body = Callable[[Sequence[str], str, Callable[[Any], str]], str]


@contextlib.contextmanager
def freeze_weights(prepare: Callable[[fx.Graph], None], read: Callable[[fx.Graph], None]) -> Iterator[None]:
    """Let Inductor freeze weights.

    Args:
        prepare: Called with each graph that has its weights frozen, before Inductor finds kernels for it.
        read: Called with each graph that Inductor has finished with.
    """
    with inductor_config.patch(freezing=True, post_grad_custom_pre_pass=prepare, post_grad_custom_post_pass=read):
        yield


def compile_to_files(module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """Compile an exported program's module ahead of time; :func:`package_aoti` puts the files into a package."""
    files = torch._inductor.aot_compile(module, *inputs, options=dict(options))
    assert isinstance(files, list)  # with the option aot_inductor.package, which every caller gives
    return files


def compile_flat_graph(
    graph_module: fx.GraphModule, examples: Sequence[Any], mode: FakeTensorMode
) -> Callable[..., Any]:
    """Compile a graph that takes tensors and returns a tuple of them, without Dynamo.

    Args:
        graph_module: The graph; it is changed.
        examples: The fake tensors of its inputs; symbolic sizes in them stay symbolic.
        mode: Their fake mode.

    Returns:
        The compiled code: nothing global refers to it, so nothing global can take it away.
    """
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        compiled: Any = compile_fx(graph_module, list(examples))
    return cast("Callable[..., Any]", compiled)


def register_inductor_lowering(operator: Any, lowering: Callable[..., Any]) -> None:
    """Let Inductor compile ``operator`` by ``lowering``, a function of its arguments as intermediate values."""
    register_lowering(operator, type_promotion_kind=None)(lowering)


def contiguous(value: Any) -> Any:
    """``value`` in memory and contiguous: itself where it is so already, else a copy."""
    return ir.ExternKernel.require_contiguous_strides(ir.ExternKernel.realize_input(value))


def contiguous_rows(value: Any) -> Any:
    """``value`` in memory with a contiguous last axis: itself or a view where it is so already, else a copy."""
    real = ir.ExternKernel.realize_input(value)
    return real if real.maybe_get_stride() and real.get_stride()[-1] == 1 else contiguous(real)


class _Arguments(KernelArgs):
    """The arguments of a kernel, its numbers included: so calls that differ in numbers alone share one function."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.numbers: list[tuple[str, str]] = []

    def number(self, value: Any) -> str:
        """Pass ``value``, an integer, a size or a float; return its name in the function."""
        if isinstance(value, float):
            self.numbers.append(("float", repr(value)))
        else:
            size = V.graph.sizevars.simplify(sympy.sympify(value))
            self.numbers.append(("int64_t", self.wrapper.codegen_sizevar(size)))
        return f"number{len(self.numbers) - 1}"

    def cpp_argdefs(self, *args: Any, **kwargs: Any) -> tuple[list[str], list[str], list[str]]:
        """Definitions, values and types: the tensors first, the numbers behind them."""
        definitions, values, types = super().cpp_argdefs(*args, **kwargs)
        kinds = [f"const {kind}" for kind, _ in self.numbers]
        names = [f"{kind} number{i}" for i, kind in enumerate(kinds)]
        return definitions + names, values + [value for _, value in self.numbers], types + kinds


class CppKernelCall(ir.ExternKernelOut):
    """A call of a C++ function that writes one new contiguous tensor; the scheduler fuses nothing into it."""

    def __init__(self, header: str, layout: Any, inputs: Sequence[Any], body: Body) -> None:
        super().__init__(layout=layout, inputs=inputs)
        self.header, self.body = header, body

    @classmethod
    def create(cls, header: str, size: Sequence[Any], dtype: torch.dtype, inputs: Sequence[Any], body: Body) -> Any:
        """The result of the call, as a lowering returns it."""
        layout = ir.FixedLayout(torch.device("cpu"), dtype, [sympy.sympify(n) for n in size])
        return ir.TensorBox.create(cls(header, layout, inputs, body))

    def codegen(self, wrapper: Any) -> None:
        """Define the function and write its call."""
        arguments = _Arguments(wrapper)
        names = []
        operands: Any = self.inputs
        for value in operands:
            name, offset = arguments.input(value.get_name()), value.get_layout().offset
            names.append(name if offset == 0 else f"{name} + {arguments.number(offset)}")
        statement = self.body(names, arguments.output(self.get_name()), arguments.number)
        definitions, values, types = arguments.cpp_argdefs()
        includes = [DECLARATIONS, self.header]
        if inductor_config.cpp.enable_kernel_profile:
            includes.append(PROFILER)
            label = statement.partition("(")[0]
            statement = f'torch::aot_inductor::RAIIAtenRecordFunctionHandle record("{label}", nullptr); {statement}'
        signature = f'extern "C" void {Placeholder.KERNEL_NAME}({", ".join(definitions)})'
        source = "\n".join((*includes, signature, f"{{ {statement} }}"))
        scheduling: Any = V.graph.scheduler.get_backend(torch.device("cpu"))
        name = scheduling.define_kernel(source, [], arguments)
        wrapper.generate_kernel_call(name, values, triton=False, arg_types=types)
