"""A quantized program that stands in a model of diffusers, and the code that runs it, made when it is first called."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from tfmq_fx.errors import UnsupportedError
from tfmq_fx.frontend.binding import named_arguments
from tfmq_fx.frontend.interface import ConstantInput, Interface
from tfmq_fx.lowering.lower import lower
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["ServedProgram"]

#: diffusers' own switch between its output class and a tuple.
RETURN_DICT = "return_dict"

log = logging.getLogger(__name__)


class ServedProgram:
    """What a model of diffusers computes with. Copies of the model share it; no call changes it.

    Args:
        program: The quantized program; None where there is a denoiser alone, which cannot be saved.
        denoiser: The lowered program; None lowers ``program`` when it is first called.
    """

    def __init__(self, program: QuantizedProgram | None, denoiser: Denoiser | None = None) -> None:
        self._program, self._denoiser = program, denoiser
        self._lock = threading.Lock()

    @property
    def interface(self) -> Interface:
        """What it is called with."""
        if self._denoiser is not None:
            return self._denoiser.interface
        return self.program.interface

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sample and of the result."""
        return self.interface.dtype

    @property
    def program(self) -> QuantizedProgram:
        """The quantized program.

        Raises:
            UnsupportedError: There is a denoiser alone.
        """
        if self._program is None:
            msg = (
                "the model was made from a lowered denoiser, which does not hold its quantized program; make it with "
                "to_diffusers(program, lower=denoiser) to save it or look at its weights"
            )
            raise UnsupportedError(msg)
        return self._program

    @property
    def denoiser(self) -> Denoiser:
        """The lowered program; lowered with Inductor now, where it was not yet."""
        with self._lock:
            if self._denoiser is None:
                log.info("lowering %s with Inductor, at its first call", self.interface.model_class or "the program")
                self._denoiser = lower(self.program)
            return self._denoiser

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], as_output: type | None, default: bool) -> Any:
        """Call the program as the model is called.

        Args:
            args: The model's own inputs.
            kwargs: The model's own inputs by name.
            as_output: The output class of the model, for a program that was captured with ``return_dict=False``.
            default: What the model takes for ``return_dict`` where it is not given.

        Returns:
            The model's output class, or a tuple with ``return_dict=False``.

        Raises:
            InputError: The inputs do not fit what was captured.
            TimestepError: A timestep is outside the table and cannot be computed.
        """
        captured = set(self.interface.names)
        arguments = {
            name: value
            for name, value in named_arguments(self.interface, args, kwargs).items()
            # Pipelines pass an empty dictionary of attention's options where there are none.
            if name in captured or not isinstance(value, Mapping) or value
        }
        asked = arguments.get(RETURN_DICT, default)
        if asked is not True or as_output is None or not self._gives_tuples():
            return self.denoiser(**{**arguments, RETURN_DICT: asked})
        return as_output(*self.denoiser(**{**arguments, RETURN_DICT: False}))

    def _gives_tuples(self) -> bool:
        """Whether ``return_dict=False`` is part of the program."""
        index = self.interface.find(RETURN_DICT)
        leaf = None if index is None else self.interface.inputs[index]
        return isinstance(leaf, ConstantInput) and leaf.value is False

    def memory_footprint(self) -> int:
        """Bytes of the weights, tables and parameters of the program."""
        tensors = (*self.program.graph_module.parameters(), *self.program.graph_module.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedProgram:
        """Itself."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            UnsupportedError: Always.
        """
        msg = "a quantized model cannot be pickled: write it with save_pretrained, and load that in the other process"
        raise UnsupportedError(msg)
