"""What the operators refuse: a wrong call is one sentence, traced as well as run, and no read past a tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tfmq_fx import LoweringError
from tfmq_fx.kernels import OPERATORS, pack_weight

BYTE = torch.uint8


def conv(x=(2, 5, 5, 16), k=16, kernel=(3, 3), dtype=BYTE, residual=None, **other):
    weight = pack_weight(torch.ones(k, 16, *kernel, dtype=torch.int8))
    arguments = {
        "x": torch.zeros(x, dtype=dtype),
        "weight": weight,
        "scale": torch.ones(k),
        "bias": torch.ones(k),
        "residual": residual,
        "kernel": list(kernel),
        "stride": [1, 1],
        "dtype": torch.float32,
    }
    return OPERATORS.integer_conv, {**arguments, **other}


def norm(x=((2, 4, 4, 16),), shift=None, channels=16, groups=4, dtypes=(torch.float32,) * 2, **other):
    arguments = {
        "x": [torch.zeros(size, dtype=dtype) for size, dtype in zip(x, dtypes, strict=False)],
        "shift": None if shift is None else torch.zeros(shift),
        "weight": torch.ones(channels),
        "bias": torch.ones(channels),
        "groups": groups,
        "eps": 1e-5,
        "silu": False,
    }
    return OPERATORS.group_norm, {**arguments, **other}


def quantized_norm(scale=0.1, zero_point=3, padding=(1, 1, 1, 1), **other):
    arguments = {**norm(**other)[1], "scale": scale, "zero_point": zero_point, "padding": list(padding)}
    return OPERATORS.quantized_group_norm, arguments


def image(x=(2, 4, 4, 16), dtype=torch.float32, enlarge=1, scale=0.1, zero_point=3, padding=(0, 1, 0, 1)):
    arguments = {"x": torch.zeros(x, dtype=dtype), "enlarge": enlarge, "scale": scale}
    return OPERATORS.quantized_image, {**arguments, "zero_point": zero_point, "padding": list(padding)}


def attention(query=(2, 4, 5, 8), key=(2, 4, 7, 8), value=(2, 4, 7, 8), dtypes=(torch.float32,) * 3, **other):
    operands = [torch.zeros(size, dtype=dtype) for size, dtype in zip((query, key, value), dtypes, strict=True)]
    arguments = {**dict(zip(("query", "key", "value"), operands, strict=True)), "factor": 1.0}
    return OPERATORS.integer_attention, {**arguments, "scales": [0.1] * 4, "zero_points": [3] * 3, **other}


WRONG = {
    "a float image": (conv(dtype=torch.float32), "an image is torch.float32"),
    "a flat image": (conv(x=(10, 16)), "2 axes"),
    "other channels": (conv(x=(2, 5, 5, 32)), "not one packed for 32 channels"),
    "a plain weight": (conv(weight=torch.ones(16, 16, 3, 3, dtype=torch.int8)), "not one packed"),
    "another kernel": (conv(kernel=(3, 3), stride=[1, 0]), r"the stride is \[1, 0\]"),
    "too small an image": (conv(x=(2, 5, 2, 16)), "does not fit"),
    "a short bias": (conv(bias=torch.ones(8)), "bias is"),
    "a double scale": (conv(scale=torch.ones(16).double()), "scale is torch.float64"),
    "half a result": (conv(residual=torch.zeros(2, 3, 3, 16).half()), "the residual is"),
    "a broadcast residual": (conv(residual=torch.zeros(1, 3, 3, 16)), "the residual is"),
    "too many taps": (conv(x=(2, 9, 9, 16), kernel=(9, 9)), "81 taps"),
    "three images": (norm(x=((2, 4, 4, 16),) * 3, dtypes=(torch.float32,) * 3, channels=48), "3 images"),
    "odd channels": (norm(x=((2, 4, 4, 24),), channels=24), "24 channels"),
    "images of two sizes": (norm(x=((2, 4, 4, 16), (2, 4, 5, 16)), channels=32), "differ"),
    "images of two dtypes": (
        norm(x=((2, 4, 4, 16),) * 2, channels=32, dtypes=(torch.float32, torch.bfloat16)),
        "differ",
    ),
    "odd groups": (norm(groups=3), "do not make 3 groups"),
    "a short weight": (norm(x=((2, 4, 4, 32),), channels=16), "weight is"),
    "no pixels": (norm(x=((2, 0, 4, 16),)), "no pixels"),
    "a shift of other images": (norm(shift=(3, 16)), "the shift is"),
    "a shift of fewer channels": (norm(shift=(2, 8)), "the shift is"),
    "a zero point beyond a byte": (quantized_norm(zero_point=256), "256 is no byte"),
    "a scale of zero": (quantized_norm(scale=0.0), "a scale is 0.0"),
    "a negative border": (quantized_norm(padding=(0, -1, 0, 0)), "the padding is"),
    "no enlargement": (image(enlarge=0), "enlarged 0 times"),
    "half an image": (image(dtype=torch.float16), "torch.float16"),
    "an infinite scale": (image(scale=float("inf")), "a scale is inf"),
    "an image without height": (image(x=(2, 0, 4, 16)), "no pixels"),
    "three axes": (attention(query=(4, 5, 8)), "depth"),
    "heads that do not divide": (attention(key=(2, 3, 7, 8), value=(2, 3, 7, 8)), "heads"),
    "more heads of keys": (attention(key=(2, 8, 7, 8), value=(2, 8, 7, 8)), "heads"),
    "heads of keys and values": (attention(key=(2, 2, 7, 8)), "heads"),
    "another batch": (attention(key=(3, 4, 7, 8)), "batch"),
    "fewer values": (attention(value=(2, 4, 6, 8)), "numbers of keys"),
    "no keys": (attention(key=(2, 4, 0, 8), value=(2, 4, 0, 8)), "numbers of keys"),
    "a deeper value": (attention(value=(2, 4, 7, 16)), "last axis"),
    "an odd depth": (attention((2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 6)), "no multiple of 4"),
    "two dtypes": (attention(dtypes=(torch.float32, torch.bfloat16, torch.float32)), "its inputs are"),
    "three scales": (attention(scales=[0.1] * 3), "four scales"),
    "a negative zero point": (attention(zero_points=[0, -1, 0]), "-1 is no byte"),
    "a sum that wraps": (attention((1, 1, 1, 33028), (1, 1, 1, 33028), (1, 1, 1, 33028)), "33028 products"),
    "a softmax that wraps": (
        attention((1, 1, 1, 4), (1, 1, 40000, 4), (1, 1, 40000, 4), scales=[0.1, 0.1, 2e-7, 0.1]),
        "40000 products",
    ),
    "numerators that wrap": (
        attention((1, 1, 1, 4), (1, 1, 40000, 4), (1, 1, 40000, 4), scales=[0.1, 0.1, 0.1, 0.1], deferred=True),
        "40000 products",
    ),
}


def on_fakes(arguments):
    with FakeTensorMode() as mode:

        def fake(value):
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        return {key: [fake(v) for v in x] if isinstance(x, list) else fake(x) for key, x in arguments.items()}, mode


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_one_sentence(case):
    (operator, arguments), words = WRONG[case]
    with pytest.raises(LoweringError, match=words) as raised:
        operator(**arguments)
    assert "\n" not in str(raised.value) and f"tfmq::{operator._qualified_op_name.split('::')[1]}" in str(raised.value)
    fakes, mode = on_fakes(arguments)
    with mode, pytest.raises(LoweringError, match=words):
        operator(**fakes)


@pytest.mark.parametrize("make", [conv, norm, quantized_norm, image, attention])
def test_a_right_call_has_the_size_that_was_traced(make):
    operator, arguments = make()
    fakes, mode = on_fakes(arguments)
    with mode:
        traced = operator(**fakes)
    result = operator(**arguments)
    assert (traced.shape, traced.dtype) == (result.shape, result.dtype)


SHARED = {
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "groups of heads": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "one image of keys": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "one query": ((1, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "one head of values": ((2, 4, 5, 8), (2, 4, 7, 8), (1, 1, 7, 8)),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_heads_and_images_mean_repeated_ones(case):
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(size, generator=generator) for size in SHARED[case]]
    batch, heads = (max(x.shape[axis] for x in operands) for axis in (0, 1))
    repeated = [x.repeat_interleave(heads // x.shape[1], 1).expand(batch, -1, -1, -1) for x in operands]
    quantization = (0.3, [0.01, 0.02, 0.004, 0.02], [128, 120, 125])
    result = OPERATORS.integer_attention(*operands, *quantization)
    assert torch.equal(result, OPERATORS.integer_attention(*repeated, *quantization))
    fakes, mode = on_fakes(dict(zip(("query", "key", "value"), operands, strict=True)))
    with mode:
        assert OPERATORS.integer_attention(*fakes.values(), *quantization).shape == result.shape
