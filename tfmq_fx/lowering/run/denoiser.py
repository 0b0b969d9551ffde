"""The denoiser: a lowered program that is called like the model that came in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from tfmq_fx._torch import pytree
from tfmq_fx.errors import ArtefactError, InputError
from tfmq_fx.frontend.binding import Call, bind_named, named_arguments
from tfmq_fx.frontend.interface import ConstantInput, Interface, TensorInput
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.lowering.run.output_fields import fields_of
from tfmq_fx.passes.support.timestep_row import check_timesteps
from tfmq_fx.passes.support.timestep_values import ValueSearch, as_captured
from tfmq_fx.temporal.program import TemporalProgram
from tfmq_fx.temporal.ways_out import in_graph

__all__ = ["Denoiser"]

#: diffusers' own switch between its output class and a tuple; it shapes no computation.
RETURN_DICT = "return_dict"
#: Calls whose timesteps are remembered: a sampler has some dozens of steps.
MOST_LOOKUPS = 1024


class Denoiser(nn.Module):
    """Called like the original model: same arguments, same return type, any batch size.

    A timestep may be a number, a 0-dim, ``[1]`` or ``[N]`` tensor. A batch over the captured maximum is
    split, and so is one that mixes timestep groups where the kernels take one group a call (ours take any). It has
    ``config``, ``dtype`` and ``device``, so it can stand in a diffusers pipeline: ``pipe.unet = denoiser``.
    Its compiled tensors are not its user's to cast or move; a deep copy shares them.

    Attributes:
        report: What lowering did (:class:`LoweringReport`).
    """

    def __init__(
        self,
        run: Callable[..., Any],
        interface: Interface,
        *,
        timestep: str,
        timesteps: Tensor | None,
        groups: Tensor | None = None,
        unknown: str,
        temporal: TemporalProgram | None = None,
        report: LoweringReport,
        finite: Mapping[str, Tensor] | None = None,
    ) -> None:
        from diffusers.configuration_utils import FrozenDict  # a second to import: for those who make a denoiser

        super().__init__()
        # In a tuple, so that it is no submodule: Module.to would cast its tensors under the compiled code.
        self._compiled = (run,)
        self._interface, self._timestep = interface, timestep
        self._finite = {name: (interface.find(name), values) for name, values in (finite or {}).items()}
        self._timesteps = timesteps
        self._search = None if timesteps is None else ValueSearch(timesteps)
        #: The timesteps that were looked up so far, as the program takes them.
        self._lookups: dict[Any, Tensor] = {}
        self._groups = groups
        self._unknown, self._temporal = unknown, temporal
        self.report = report
        self.config = FrozenDict(interface.config)
        self.eval()

    @property
    def interface(self) -> Interface:
        """What it is called with."""
        return self._interface

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sample and of the result."""
        return self._interface.dtype

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return torch.device("cpu")

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps that it was quantized for, ``[K]``, of those that it serves; None when it has no table."""
        return self._timesteps

    @property
    def extends(self) -> bool:
        """Whether it can compute timesteps outside its table, where it has one."""
        return self._search is None or (self._temporal is not None and self._temporal.has_block)

    @in_plain_surroundings
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the lowered program.

        Args:
            *args: The model's own inputs.
            **kwargs: The model's own inputs by name. ``return_dict=False`` returns a tuple, as in diffusers.

        Raises:
            InputError: The inputs do not fit what was captured.
            TimestepError: The value of another finite input is outside the table, or a timestep is and cannot be, or
            was not to be, computed.
        """
        arguments = named_arguments(self._interface, args, kwargs)
        as_tuple = self._as_tuple(arguments)
        if self._timestep in arguments:
            arguments[self._timestep] = self._as_table_value(arguments[self._timestep])
        call = bind_named(self._interface, arguments, self._timestep)
        for name, (index, allowed) in self._finite.items():
            assert index is not None
            check_timesteps(call.leaves[index], allowed, name)
        pieces = self._pieces(call)
        if len(pieces) < 2:
            output = self._call(call)
        else:
            output = self._join([self._call(call.take(piece)) for piece in pieces], torch.cat(pieces))
        return fields_of(output) if as_tuple else output

    def _as_tuple(self, arguments: dict[str, Any]) -> bool:
        """Whether a tuple is asked for; where the program does not say itself, what is asked is taken out."""
        return_dict = arguments.get(RETURN_DICT, True)
        if not isinstance(return_dict, bool):
            msg = f"return_dict={return_dict!r} must be True or False"
            raise InputError(msg)
        captured = self._interface.find(RETURN_DICT)
        constant = None if captured is None else self._interface.inputs[captured]
        if not isinstance(constant, ConstantInput):
            arguments.pop(RETURN_DICT, None)
        elif constant.value is False:
            arguments.setdefault(RETURN_DICT, False)
        else:
            arguments[RETURN_DICT] = constant.value
        return not return_dict

    def _as_table_value(self, timestep: Any) -> Any:
        """A timestep as the table has it, looked up as it was passed: the cast to the captured dtype may round it."""
        index = self._interface.find(self._timestep)
        expected = None if index is None else self._interface.inputs[index]
        value = timestep
        if isinstance(timestep, (int, float)) and not isinstance(timestep, bool):
            value = torch.tensor(timestep, dtype=torch.float64)
        if self._search is None or not isinstance(expected, TensorInput) or not _is_plain(value):
            return timestep  # binding says what is wrong with it
        # The table's own value: what follows, compiled or not, finds exactly that row. A step asks for the same again.
        key = value.dtype, tuple(value.shape), tuple(value.reshape(-1).tolist())
        resolved = self._lookups.get(key)
        if resolved is None:
            if len(self._lookups) >= MOST_LOOKUPS:
                self._lookups.clear()
            if self._temporal is not None:
                resolved = self._temporal.resolve(value)
            else:
                advice = in_graph(has_block=self.report.temporal_layers > 0)
                rows = self._search.rows(value, self._unknown, captured=expected.dtype, advice=advice)
                resolved = as_captured(self._search.values[rows], expected.dtype, self._timestep)
            self._lookups[key] = resolved
        return resolved.clone()

    def _call(self, call: Call) -> Any:
        args, kwargs = call.arguments()
        return self._compiled[0](*args, **kwargs)

    def _pieces(self, call: Call) -> list[Tensor]:
        """The items of each call of the program that a batch takes; none where it takes one."""
        limit = self._interface.max_batch
        if self._groups is None and (limit is None or (call.batch or 1) <= limit):
            return []
        pieces = self._split_by_group(call)
        return pieces if limit is None else [part for piece in pieces for part in torch.split(piece, limit)]

    def _split_by_group(self, call: Call) -> list[Tensor]:
        """The items of a batch, those of each timestep group together; all in one piece when groups may mix."""
        all_items = torch.arange(call.batch or 1)
        index = self._interface.find(self._timestep)
        if self._groups is None or self._search is None or index is None or call.leaves[index].ndim == 0:
            return [all_items]
        groups = self._groups[self._search.nearest(call.leaves[index])[0]]
        distinct = sorted(set(groups.tolist()))
        if len(distinct) == 1:
            return [all_items]
        if call.batch is None:
            msg = (
                f"a batch of timesteps from {len(distinct)} groups must be split, but this program was captured with a "
                "fixed batch; capture it with dynamic_batch=True, or call it with one timestep"
            )
            raise InputError(msg)
        return [all_items[groups == group] for group in distinct]

    def _join(self, outputs: Sequence[Any], items: Tensor) -> Any:
        """Put the outputs of a split batch together, each item in its place."""
        leaves, spec = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
        order = torch.argsort(items)
        joined = []
        for axis, parts in zip(self._interface.results, zip(*leaves, strict=True), strict=True):
            # What does not grow with the batch is the same in every part.
            joined.append(parts[0] if axis is None else torch.cat(parts, axis).index_select(axis, order))
        return pytree.tree_unflatten(joined, spec[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep dtype and device, whatever ``to``, ``half`` or ``cuda`` ask for: compiled code reads its own tensors."""
        requested = fn(torch.empty(0, dtype=self.dtype))
        if requested.dtype != self.dtype or requested.device.type != "cpu":
            state = f"{str(self.dtype).removeprefix('torch.')} on cpu"
            warnings.warn(
                f"a lowered denoiser stays in {state}: its compiled tensors cannot be cast or moved; lower the program "
                "again for another device, or quantize the model in another dtype",
                stacklevel=3,
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        """A denoiser of its own on the same compiled program, which no call changes."""
        new = copy.copy(self)
        memo[id(self)] = new
        return new

    def __copy__(self) -> Denoiser:
        """As a deep copy."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: compiled code does not travel.

        Raises:
            ArtefactError: Always.
        """
        msg = (
            "a lowered denoiser cannot be pickled: save the program (tfmq_fx.save) or lower it to a package "
            "(backend='aot'), and load that in the other process"
        )
        raise ArtefactError(msg)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor of real numbers in memory of this process."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout is not torch.strided:
        return False
    return value.dtype is not torch.bool and not value.is_complex()
