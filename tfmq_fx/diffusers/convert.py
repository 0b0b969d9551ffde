"""``to_diffusers``: a quantized program as a model that diffusers takes for the original."""

from __future__ import annotations

from typing import Any

from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.lowering.lower import lower as lower_program
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["to_diffusers"]


def to_diffusers(
    program: QuantizedProgram | Denoiser,
    lower: str | Denoiser | None = None,
    *,
    precision: str | None = None,
    model_class: type | None = None,
) -> Any:
    """A quantized program as a model of its original class, to stand in a pipeline in its place.

    As in ``pipe.unet = to_diffusers(quantized)``. It has the class, configuration and attributes of the model that was
    quantized and holds no float weights. Pipelines sample with it and save it (``pipe.save_pretrained(folder)``), and
    ``from_pretrained`` loads it in any process that has imported ``tfmq_fx``. What needs float weights or single layers
    (LoRA, attention processors, FreeU, other dtypes and devices) raises an :class:`tfmq_fx.UnsupportedError` that says
    what to do. ``model.served.denoiser.report`` says what runs where, and ``model.served.program`` is the program.

    Args:
        program: The result of :func:`tfmq_fx.quantize`, :func:`tfmq_fx.convert` or :func:`tfmq_fx.load`. Of a lowered
            denoiser a model is made too; it samples, and cannot be saved.
        lower: What runs it: the name of a backend that it is lowered with now, as :func:`tfmq_fx.lower` does, or the
            denoiser that was made of it. None lowers it with Inductor when it is first called.
        precision: As for :func:`tfmq_fx.lower`, where ``lower`` names a backend.
        model_class: The class, where it is none of diffusers' own: a subclass of ``ModelMixin`` and ``ConfigMixin``.

    Returns:
        An instance of that class, on the CPU, in the dtype that was quantized.

    Raises:
        LoweringError: ``program`` or ``lower`` is something else, or lowering fails.
        UnsupportedError: The program is of no model class of diffusers, or accelerate is not installed.
    """
    from tfmq_fx.diffusers.configuration import TFMQConfig
    from tfmq_fx.diffusers.model import serve_
    from tfmq_fx.diffusers.served import ServedProgram
    from tfmq_fx.diffusers.skeleton import empty_model, find_model_class

    if isinstance(program, Denoiser):
        if lower is not None:
            msg = f"the denoiser is lowered already; leave lower={describe(lower)} out, or pass the quantized program"
            raise LoweringError(msg)
        served = ServedProgram(None, program)
    elif isinstance(program, QuantizedProgram):
        served = ServedProgram(program, lower if isinstance(lower, Denoiser) else None)
    else:
        msg = f"to_diffusers needs a quantized program or a denoiser, it was given {describe(program)}"
        raise LoweringError(msg)
    interface = served.interface
    model: Any = empty_model(model_class or find_model_class(interface), interface)
    if isinstance(lower, str):
        served = ServedProgram(served.program, lower_program(served.program, lower, precision=precision))
    serve_(model, served)
    if isinstance(program, QuantizedProgram):
        model.register_to_config(quantization_config=TFMQConfig(**program.config.to_dict()))
    return model
