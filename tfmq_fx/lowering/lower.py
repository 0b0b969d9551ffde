"""``lower``: from the quantized program to a denoiser, through one of the backends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NoReturn

from torch import fx

from tfmq_fx.artefact.paths import path_of
from tfmq_fx.config.choices import UnknownTimestep
from tfmq_fx.errors import ConfigError, LoweringError
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.lowering.backends.registry import find_backend, find_package_backend
from tfmq_fx.lowering.options import LoweringOptions
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.passes.analysis import row_lookups
from tfmq_fx.quantization.convert import program_from_graph
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.unknown_timesteps import check_unknown_timestep, with_unknown_timestep

__all__ = ["load_denoiser", "lower"]


@pipeline_stage
def lower(
    program: QuantizedProgram | fx.GraphModule,
    backend: str = "inductor",
    *,
    tabulate: bool = True,
    reuse: bool = True,
    path: str | Path | None = None,
    precision: str | None = None,
    unknown_timestep: UnknownTimestep | None = None,
) -> Denoiser:
    """Lower a quantized program to kernels and check the result against the reference.

    A program with ``activation_groups`` has activation ranges by timestep. Our own integer kernels take the range of
    each item, so one call takes any mix of timesteps; layers that these kernels do not cover (channels in no multiple
    of 16) are computed in float then, and the report names them. For OpenVINO and ONNX Runtime, items are scaled
    outside the layers, so one call takes any mix too. An integer kernel of oneDNN takes one activation scale a call:
    where ours do not run, such a program is compiled for batches of one timestep group, as sampling has them, and its
    denoiser splits a batch that mixes groups.
    Layers that depend on the timestep and the conditioning alone, which have parameters per timestep, are computed
    timestep by timestep where ``reuse`` cuts them out; compiled with the rest, they are as other layers on kernels that
    take any mix, and make the denoiser split batches by timestep on oneDNN's.

    Args:
        program: The result of :func:`tfmq_fx.convert` or :func:`tfmq_fx.load`, or what ``convert_pt2e``
            returned for a graph prepared with :class:`tfmq_fx.TFMQQuantizer`. It is not changed.
        backend: ``"inductor"``: ``torch.compile`` with frozen weights; ``"aot"``: an AOTInductor package
            at ``path``, loadable without the model's source; ``"openvino"`` and ``"onnxruntime"``: those engines,
            when they are installed (``pip install "tfmq-fx[openvino]"``), compiling each batch size when it first
            comes; ``"auto"``: the fastest of Inductor and those, measured here; ``"reference"``: eager
            quantize/dequantize; or what another package registered (:mod:`tfmq_fx.lowering.backends.registry`).
        tabulate: Whether the temporal block becomes a program of its own, which computes each timestep once and keeps
            it, so that nothing that is compiled depends on a schedule. False keeps it in the graph.
        reuse: Whether what the sample does not reach is kept from call to call: layers that depend on a prompt
            alone run once a prompt, those that depend on the timestep too once a timestep and prompt. A backend that
            compiles no stages (of ours all but ``"inductor"`` and ``"aot"``) runs everything at every call, and so do
            programs with timestep groups where our own kernels do not run.
        path: Where the package goes, for a backend that writes one (``"aot"``: ``.pt2``).
        precision: What passes between integer kernels: ``"bf16"`` or ``"f32"``. Inductor's backends take the first by
            default where our own kernels run (x86 with AVX-512 VNNI), OpenVINO the second.
        unknown_timestep: What a timestep outside the table does: ``"extend"`` computes it as :func:`add_timesteps`
            does and keeps the result, ``"error"`` names it, ``"nearest"`` takes the closest one of the table. By
            default as the program was quantized. A program whose features were stored (``temporal="cache"`` and
            ``"auto"``), or one that is lowered with ``tabulate=False``, has nothing to extend: by default it names such
            a timestep, and ``"extend"`` is refused.

    Returns:
        A denoiser that is called like the original model; ``denoiser.report`` says what runs where.

    Raises:
        ConfigError: ``unknown_timestep`` is not supported, or the program cannot extend.
        LoweringError: The backend is unknown or not installed, an argument is not for it, it lacks an operator of the
            program, or the lowered program parts from its reference.
    """
    chosen = find_backend(backend)
    if not isinstance(program, (QuantizedProgram, fx.GraphModule)):
        msg = f"lower needs a quantized program, it was given {describe(program)}"
        raise LoweringError(msg)
    package = None if path is None else path_of(path, "a package")
    options = chosen.check(LoweringOptions(tabulate, reuse, package, precision))
    if isinstance(program, fx.GraphModule):
        program = program_from_graph(copy.deepcopy(program))
    if unknown_timestep == "extend" and row_lookups(program.graph_module):
        if program.config.tabulates:
            _refuse_to_extend("the program has stored rows and no temporal block to compute others")
        if not tabulate:
            _refuse_to_extend("tabulate=False compiles the table with the rest, so nothing can be added to it")
    return chosen.lower(with_unknown_timestep(program, unknown_timestep), options)


@pipeline_stage
def load_denoiser(path: str | Path, *, unknown_timestep: UnknownTimestep | None = None) -> Denoiser:
    """Load a package that ``lower(..., backend="aot", path=path)`` wrote; nothing is compiled.

    A package is compiled code: load it only from whom you would run a program of.

    Args:
        path: The package.
        unknown_timestep: As for :func:`lower`; by default as it was lowered.

    Raises:
        ArtefactError: The file is missing, damaged, or not a package of ours.
        ConfigError: ``unknown_timestep`` is not supported, or the package cannot extend.
    """
    check_unknown_timestep(unknown_timestep)
    package = path_of(path, "a package")
    denoiser = find_package_backend(package).load(package, unknown_timestep)
    if unknown_timestep == "extend" and not denoiser.extends:
        _refuse_to_extend(f"{package} has the rows of its table and no temporal block to compute others")
    return denoiser


def _refuse_to_extend(reason: str) -> NoReturn:
    msg = f"unknown_timestep='extend' cannot be had: {reason}; leave it out, or choose 'error' or 'nearest'"
    raise ConfigError(msg)
