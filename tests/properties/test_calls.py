"""Random calls of the public interface: the program's own result, or one sentence.

In the nightly profile 1,000 examples make over 30,000 calls.
"""

import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import tfmq_fx
from tests.call_cases import BACKENDS, arguments, many_program
from tests.models import TIMESTEPS, relative, tiny_unet
from tfmq_fx import QuantizationConfig, TfmqError
from tfmq_fx.testing import temporal_graphs

#: Calls of each kind and example.
CALLS = 3
#: An ahead-of-time package is called in tests/frontend: compiling it for one more test would cost a minute.
COMPILED = [name for name in BACKENDS if name != "aot"]


@functools.cache
def lowered(name: str) -> Any:
    return many_program() if name == "program" else tfmq_fx.lower(many_program(), name)


@functools.cache
def unet(name: str) -> Any:
    """The same for a diffusers model, with its many optional arguments."""
    if name == "program":
        batch = {"sample": torch.randn(4, 1, 8, 8), "timestep": TIMESTEPS[:4]}
        return tfmq_fx.quantize(tiny_unet(), None, [batch], timesteps=TIMESTEPS, progress=False)
    return tfmq_fx.lower(unet("program"), name)


# -- valid calls -----------------------------------------------------------------------------------------------------


def in_another_layout(value: Tensor, draw: random.Random) -> Tensor:
    """The same values in other memory."""
    kind = draw.choice(("plain", "strided", "turned", "sliced", "expanded", "last", "grad", "offset"))
    if kind == "strided" and value.ndim:
        wide = value.new_zeros((*value.shape[:-1], 3 * value.shape[-1]))
        wide[..., 1::3] = value
        return wide[..., 1::3]
    if kind == "turned" and value.ndim > 1:
        first, second = draw.sample(range(value.ndim), 2)
        return value.transpose(first, second).contiguous().transpose(first, second)
    if kind == "sliced" and value.ndim:
        axis = draw.randrange(value.ndim)
        size = value.shape[axis]
        return torch.cat([torch.zeros_like(value), value], axis).narrow(axis, size, size)
    if kind == "expanded" and value.ndim and value.shape[0] == 1:
        return value[0].expand(1, *value.shape[1:])
    if kind == "last" and value.ndim == 4:
        return value.to(memory_format=torch.channels_last)
    if kind == "grad" and value.is_floating_point():
        return value.clone().requires_grad_()
    if kind == "offset":
        flat = torch.cat([value.new_zeros(3), value.flatten()])
        return flat[3:].view(value.shape)
    return value


def as_somebody_writes_it(timestep: Tensor, draw: random.Random) -> Any:
    """Timesteps in any form that means the same."""
    same = bool((timestep == timestep[0]).all())
    forms: list[Callable[[], Any]] = [lambda: timestep, timestep.int, timestep.double, timestep.float]
    if same:
        one = timestep[0]
        forms += [one.item, lambda: one, lambda: one[None], lambda: float(one), lambda: one.expand(len(timestep))]
    return draw.choice(forms)()


def drawn(size: int, draw: random.Random) -> dict[str, Any]:
    given = arguments(size, draw.randrange(100))
    if draw.random() < 0.4:
        given["timestep"] = given["timestep"][:1].expand(size).clone()
    return given


def rewritten(given: Mapping[str, Any], draw: random.Random) -> tuple[list[Any], dict[str, Any]]:
    """A call that means the same: layouts, forms of the timestep, positions, what may be left out."""
    other = pytree.tree_map_only(Tensor, lambda value: in_another_layout(value, draw), dict(given))
    other["timestep"] = as_somebody_writes_it(given["timestep"], draw)
    for name in ("residual", "flag"):
        if name in other and draw.random() < 0.5:
            del other[name]
    if "flag" in given and draw.random() < 0.3:
        other["scale"] = draw.choice((1.0, 1))
    count = draw.randrange(4)
    names = [name for name in given if name in other][:count]
    return [other.pop(name) for name in names], other


@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", ["program", *COMPILED])
def test_a_valid_call_gives_the_program_s_result(name, draw):
    for _ in range(CALLS):
        given = drawn(draw.choice((1, 2, 3, 5)), draw)
        before = pytree.tree_map_only(Tensor, Tensor.clone, given)
        args, kwargs = rewritten(given, draw)
        result = lowered(name)(*args, **kwargs)
        assert relative(result, many_program()(**given)) < 0.05
        assert result.is_contiguous() and result.dtype == torch.float32 and not result.requires_grad
        assert pytree.tree_all(lambda pair: pair, pytree.tree_map(_equal, before, given))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", ["program", "reference"])
def test_a_valid_call_of_a_diffusers_model(name, draw):
    for _ in range(CALLS):
        size = draw.choice((1, 2, 5))
        numbers = torch.Generator().manual_seed(draw.randrange(100))
        sample = torch.randn(size, 1, 8, 8, generator=numbers)
        timestep = TIMESTEPS[torch.randint(len(TIMESTEPS), (size,), generator=numbers)]
        given = {"sample": sample, "timestep": timestep}
        args, kwargs = rewritten(given, draw)
        if draw.random() < 0.5:
            kwargs["class_labels"] = None
        as_tuple = name == "reference" and draw.random() < 0.5
        result = unet(name)(*args, **kwargs, **({"return_dict": False} if as_tuple else {}))
        found = result[0] if as_tuple else result.sample
        assert relative(found, unet("program")(**given).sample) < 0.01


# -- invalid calls ----------------------------------------------------------------------------------------------------


def broken_tensor(value: Tensor, draw: random.Random, *, timestep: bool) -> Any:
    """What no program takes in the place of a tensor of this shape."""
    wrong = [
        None, "x", [1.0], {}, b"x", object(), complex(1, 2), value.numpy(), np.float32(1.0), torch.nn.Identity(),
        value.to("meta"), value.to_sparse() if value.ndim else None, value.to(torch.complex64),
        torch.zeros(2, 3, 4, 5, 6, 7), value[:0] if value.ndim else None,
    ]  # fmt: skip
    if timestep:
        wrong += [True, torch.nan, torch.inf, torch.tensor([100] * 7), torch.tensor([100.0, torch.nan])]
        return draw.choice(wrong)
    wrong += [3, 2.5, value.bool(), value.half(), value.bfloat16(), value.double(), value.int(), value[..., :-1]]
    wrong += [value[None], torch.cat([value, value], -1), value.sum(), torch.full_like(value, torch.nan)]
    place = torch.zeros(value.numel(), dtype=torch.bool)
    place[draw.randrange(value.numel())] = True
    bad = draw.choice((torch.nan, torch.inf, -torch.inf))
    wrong.append(torch.where(place.reshape(value.shape), bad, value))
    return draw.choice(wrong)


def broken(given: dict[str, Any], draw: random.Random) -> tuple[list[Any], dict[str, Any]]:
    """A call that no program can take."""
    other = dict(given)
    kind = draw.choice(("tensor", "nested", "constant", "missing", "unknown", "twice", "many", "batch", "structure"))
    if kind == "nested":
        name = draw.choice(tuple(other["prompt"]))
        value = broken_tensor(other["prompt"][name], draw, timestep=False)
        other["prompt"] = {**other["prompt"], name: value}
    elif kind == "constant":
        name, values = draw.choice((
            ("residual", (0, 1.0, "x", True, torch.zeros(1), [None])),
            ("flag", (True, 0, 1, None, "False", torch.tensor(True))),
            ("scale", (2.0, None, True, "1.0", torch.zeros(1))),
        ))  # fmt: skip
        other[name] = draw.choice(values)
    elif kind == "missing":
        del other[draw.choice(("sample", "timestep", "prompt", "table"))]
    elif kind == "unknown":
        other[draw.choice(("encoder_attention_mask", "x", ""))] = draw.choice((1, "x", torch.zeros(2)))
    elif kind == "twice":
        return [other["sample"]], other
    elif kind == "many":
        return [torch.zeros(1)] * draw.randrange(8, 12), {}
    elif kind == "batch":
        size = len(other["sample"])
        name = draw.choice(("sample", "prompt"))
        other[name] = arguments(size + draw.randrange(1, 4))[name]
    elif kind == "structure":
        prompt = other["prompt"]
        other["prompt"] = draw.choice((
            None, tuple(prompt.values()), {**prompt, "more": None}, {"tokens": prompt["tokens"]}, prompt["pooled"],
            {**prompt, 3: 1}, [prompt],
        ))  # fmt: skip
    else:
        name = draw.choice(("sample", "timestep", "table"))
        other[name] = broken_tensor(other[name], draw, timestep=name == "timestep")
    return [], other


@given(st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", ["program", *COMPILED])
def test_an_invalid_call_is_one_sentence(name, draw):
    for _ in range(CALLS):
        args, kwargs = broken(drawn(draw.choice((2, 3)), draw), draw)
        with pytest.raises(TfmqError) as caught:
            lowered(name)(*args, **kwargs)
        assert str(caught.value) and "\n" not in str(caught.value)


# -- generated models -------------------------------------------------------------------------------------------------


@given(temporal_graphs(), st.randoms(use_true_random=False))
def test_calls_of_generated_models(model, draw):
    captured, name = model.graph_module, model.path.timestep_name
    config = QuantizationConfig(temporal="float")
    try:
        prepared = tfmq_fx.prepare(captured, config, timestep=name)
        batches = [model.example_inputs()]
        tfmq_fx.calibrate(prepared, batches, progress=False)
        program = tfmq_fx.convert(prepared)
    except TfmqError:
        return
    names = list(program.interface.names)
    for index in range(2 * CALLS):
        inputs = dict(zip(names, model.example_inputs(), strict=True))
        want = program(**inputs)
        other = pytree.tree_map_only(Tensor, lambda value: in_another_layout(value, draw), inputs)
        assert pytree.tree_all(lambda ok: ok, pytree.tree_map(_close, program(**other), want))
        if index % 2:
            victim = draw.choice([key for key in names if key != name])
            bad = draw.choice((None, "x", inputs[victim].to("meta"), inputs[victim].to(torch.complex64)))
            with pytest.raises(TfmqError) as caught:
                program(**{**inputs, victim: bad})
            assert "\n" not in str(caught.value)


def _close(one: Any, other: Any) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5)) if isinstance(one, Tensor) else one == other
