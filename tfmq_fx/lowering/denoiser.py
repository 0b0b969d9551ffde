"""The denoiser: a lowered program that is called like the model that came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.lowering.report import LoweringReport
from tfmq_fx.passes.timestep_row import check_timesteps

__all__ = ["Denoiser", "Signature"]


class Signature:
    """What a captured program accepts: names, structure, shapes and dtypes of its inputs.

    Args:
        names: Argument names in the captured order.
        inputs: Per flattened input, ``(shape, dtype)`` with None for the batch axis, or None when the
            input is no tensor.
        spec: The input structure ``((args), {kwargs})``.
        timestep: Name of the timestep argument.
        max_batch: Largest batch of one call; None when there is no limit.
    """

    def __init__(self, names: list[str], inputs: list[tuple[list[int | None], torch.dtype] | None], spec: Any,
                 timestep: str, max_batch: int | None) -> None:  # fmt: skip
        self.names, self.inputs, self.spec = names, inputs, spec
        self.timestep, self.max_batch = timestep, max_batch

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "names": self.names,
            "inputs": [None if i is None else [i[0], str(i[1]).removeprefix("torch.")] for i in self.inputs],
            "spec": pytree.treespec_dumps(self.spec),
            "timestep": self.timestep,
            "max_batch": self.max_batch,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Signature:
        """The inverse of :meth:`to_dict`."""
        inputs = [None if i is None else (i[0], getattr(torch, i[1])) for i in values["inputs"]]
        return cls(
            values["names"], inputs, pytree.treespec_loads(values["spec"]), values["timestep"], values["max_batch"]
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind a call to the captured argument names; arguments given as None may be left out.

        Raises:
            LoweringError: An argument is missing, or one was not captured.
        """
        if len(args) > len(self.names):
            msg = f"the denoiser takes {len(self.names)} arguments ({', '.join(self.names)}), not {len(args)}"
            raise LoweringError(msg)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        extra = [name for name, value in given.items() if name not in self.names and value is not None]
        missing = [name for name in self.names if name not in given]
        if extra or missing:
            what = f"argument {extra[0]!r} was not captured" if extra else f"argument {missing[0]!r} is missing"
            msg = (
                f"{what}; this program was captured with ({', '.join(self.names)}): capture it again with what you pass"
            )
            raise LoweringError(msg)
        return {name: given[name] for name in self.names}

    def structured(self, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn bound arguments into ``(args, kwargs)`` of the captured structure."""
        positional = self.spec.children()[0].num_children
        values = list(bound.items())
        return tuple(v for _, v in values[:positional]), dict(values[positional:])

    def flat(self, bound: dict[str, Any]) -> list[Any]:
        """The flattened inputs of a call.

        Raises:
            LoweringError: The structure is not the captured one.
        """
        leaves, spec = pytree.tree_flatten(self.structured(bound))
        if len(leaves) != len(self.inputs):
            msg = f"the inputs have {len(leaves)} leaves, the captured ones {len(self.inputs)}: structure {spec}"
            raise LoweringError(msg)
        return leaves


class Denoiser(nn.Module):
    """Called like the original model: same arguments, same return type, any batch size.

    A timestep may be a number, a 0-dim, ``[1]`` or ``[N]`` tensor. A batch over the captured maximum is
    split, and so is one that mixes timestep groups when the kernels take one group a call. It has ``config``,
    ``dtype`` and ``device``, so it can stand in a diffusers pipeline:
    ``pipe.unet = denoiser``.

    Attributes:
        report: What lowering did (:class:`LoweringReport`).
    """

    def __init__(
        self,
        run: Callable[..., Any],
        signature: Signature,
        *,
        timesteps: Tensor | None,
        groups: Tensor | None = None,
        unknown: str,
        report: LoweringReport,
        config: dict[str, Any],
        finite: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._run = run
        self._finite = dict(finite or {})
        self._signature = signature
        self._timesteps = timesteps
        self._groups = groups
        self._unknown = unknown
        self.report = report
        self.config = FrozenDict(config)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sample, and of everything that is computed in floating point."""
        return next(dtype for shape, dtype in filter(None, self._signature.inputs) if dtype.is_floating_point)

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return torch.device("cpu")

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps that it serves, ``[K]``; None when it has no table."""
        return self._timesteps

    @in_plain_surroundings
    @torch.no_grad()
    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the lowered program.

        Args:
            *args: The model's own inputs.
            return_dict: As in diffusers: False returns a tuple.
            **kwargs: The model's own inputs by name.

        Raises:
            LoweringError: The inputs do not fit what was captured.
            TimestepError: A timestep, or the value of another finite input, is outside the table.
        """
        bound = self._signature.bind(args, kwargs)
        batch = self._batch(bound)
        if self._signature.timestep in bound:
            bound[self._signature.timestep] = self._timestep(bound[self._signature.timestep], batch)
        self._check(bound, batch)
        for name, allowed in self._finite.items():
            check_timesteps(bound[name].double(), allowed, name)
        limit = self._signature.max_batch
        items = self._one_group_each(bound, batch)
        if limit:
            items = [part for piece in items for part in torch.split(piece, limit)]
        if batch is None or len(items) == 1:
            output = self._call(bound)
        else:
            output = _join([self._call(_take(bound, batch, piece)) for piece in items], torch.cat(items))
        return output if return_dict else tuple(pytree.tree_leaves(output))

    def _batch(self, bound: dict[str, Any]) -> int | None:
        """The batch size: axis 0 of the first input with a batch axis that is not the timestep."""
        timestep = bound.get(self._signature.timestep)
        for leaf, expected in zip(self._signature.flat(bound), self._signature.inputs, strict=True):
            if leaf is not timestep and isinstance(leaf, Tensor) and expected and None in expected[0][:1]:
                return int(leaf.shape[0])
        return None

    def _expected_timestep(self) -> tuple[list[int | None], torch.dtype]:
        flat = pytree.tree_leaves(self._signature.structured({n: n for n in self._signature.names}))
        found = self._signature.inputs[flat.index(self._signature.timestep)]
        assert found is not None
        return found

    def _timestep(self, timestep: Any, batch: int | None) -> Any:
        """Bring a timestep into the captured shape and dtype, and check it against the table."""
        if timestep is None:
            return None
        shape, dtype = self._expected_timestep()
        value = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        if self._timesteps is not None and self._unknown == "error":
            check_timesteps(value.double(), self._timesteps)
        if not dtype.is_floating_point and value.is_floating_point() and not torch.equal(value, value.round()):
            msg = f"timestep {value.flatten()[0].item():g} is fractional, but the program was captured with {dtype}"
            raise LoweringError(msg)
        value = value.to(dtype)
        if not shape:
            if value.numel() > 1 and not bool((value == value.flatten()[0]).all()):
                msg = "this program was captured with a 0-dim timestep and cannot mix timesteps; capture it with [N]"
                raise LoweringError(msg)
            return value.flatten()[0].clone()
        size = shape[0] if shape[0] is not None else (batch if batch is not None else value.numel())
        return value.reshape(-1).expand(size).contiguous()

    def _check(self, bound: dict[str, Any], batch: int | None) -> None:
        """Compiled code has no guards, so every shape and dtype is checked here."""
        for leaf, expected in zip(self._signature.flat(bound), self._signature.inputs, strict=True):
            if expected is None:
                continue
            shape = [batch if size is None else size for size in expected[0]]
            if not isinstance(leaf, Tensor) or list(leaf.shape) != shape or leaf.dtype != expected[1]:
                found = f"{list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                wanted = f"[{', '.join('batch' if size is None else str(size) for size in expected[0])}] {expected[1]}"
                msg = (
                    f"an input is {found}, but this program was captured with {wanted}; capture it again for this shape"
                )
                raise LoweringError(msg)

    def _call(self, bound: dict[str, Any]) -> Any:
        positional, named = self._signature.structured(bound)
        return self._run(*positional, **named)

    def _one_group_each(self, bound: dict[str, Any], batch: int | None) -> list[Tensor]:
        """The items of a batch, those of each timestep group together; all in one piece when groups may mix."""
        everything = torch.arange(batch or 1)
        timestep = bound[self._signature.timestep] if self._groups is not None else None
        if self._groups is None or self._timesteps is None or timestep is None or timestep.ndim == 0:
            return [everything]
        rows = (timestep.double()[:, None] - self._timesteps).abs().argmin(dim=1)
        groups = self._groups[rows]
        found = sorted(set(groups.tolist()))
        if len(found) == 1:
            return [everything]
        if batch is None:
            msg = (
                f"a batch of timesteps from {len(found)} groups must be split, but this program was captured with a "
                "fixed batch; capture it with dynamic_batch=True, or call it with one timestep"
            )
            raise LoweringError(msg)
        return [everything[groups == group] for group in found]


def _take(bound: dict[str, Any], batch: int, items: Tensor) -> dict[str, Any]:
    """The arguments for some items of the batch."""

    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[items] if whole else leaf

    taken: dict[str, Any] = pytree.tree_map(cut, bound)
    return taken


def _join(outputs: list[Any], items: Tensor) -> Any:
    """Put the outputs of a split batch together, each item in its place."""
    leaves, spec = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
    places = torch.argsort(items)
    return pytree.tree_unflatten([torch.cat(parts)[places] for parts in zip(*leaves, strict=True)], spec[0])
