"""What the overloads ``.rows`` refuse: a table or rows that do not fit, traced as well as run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.kernels import test_arguments as plain
from tests.kernels.test_arguments import on_fakes
from tfmq_fx import LoweringError
from tfmq_fx.kernels import OPERATORS

OPERATOR_NAMES = ("integer_conv", "quantized_group_norm", "quantized_image", "integer_attention")


def table(columns=()):
    return {
        "scales": torch.full((3, *columns), 0.1),
        "zero_points": torch.full((3, *columns), 3),
        "rows": torch.tensor([2, 0]),
    }


def conv(sums=None, **other):
    arguments = plain.conv()[1]
    arguments["weight_scale"] = arguments.pop("scale")
    arguments["weight_sum"] = torch.full((16,), 144, dtype=torch.int32) if sums is None else sums
    return {**arguments, **table(), **other}


def norm(**other):
    arguments = plain.quantized_norm()[1]
    del arguments["scale"], arguments["zero_point"]
    return {**arguments, **table(), **other}


def image(x=None, **other):
    arguments = plain.image(**({} if x is None else {"x": x}))[1]
    del arguments["scale"], arguments["zero_point"]
    return {**arguments, **table(), **other}


def attention(query=(2, 4, 5, 8), **other):
    zeros = torch.tensor([3, 3, 0, 3]).expand(3, 4).contiguous()
    return {**plain.attention(query=query)[1], **table((4,)), "zero_points": zeros, **other}


MAKERS = dict(zip(OPERATOR_NAMES, (conv, norm, image, attention), strict=True))
TABLES = {
    "scales in double": ("scales", lambda x: x.double(), "the scales are torch.float64"),
    "zero points in int32": ("zero_points", lambda x: x.int(), "the zero points are torch.int32"),
    "an empty table": ("scales", lambda x: x[:0], "the scales are"),
    "another axis": ("scales", lambda x: x[..., None], "the scales are"),
    "one number": ("scales", lambda x: x.reshape(-1)[0], "the scales are"),
    "fewer zero points": ("zero_points", lambda x: x[:2], "unlike numbers of rows"),
    "scales with gaps": ("scales", lambda x: torch.cat([x, x])[::2], "contiguous"),
    "rows in int32": ("rows", lambda x: x.int(), "the rows are torch.int32"),
    "floating rows": ("rows", lambda x: x.float(), "the rows are torch.float32"),
    "no rows": ("rows", lambda x: x[:0], "not int64 of a divisor"),
    "one row without an axis": ("rows", lambda x: x[0], "not int64 of a divisor"),
    "rows with two axes": ("rows", lambda x: x[None], "not int64 of a divisor"),
    "rows that do not divide the images": ("rows", lambda x: torch.tensor([0, 1, 2]), "for 2 images"),
    "more rows than images": ("rows", lambda x: torch.tensor([0, 1, 2, 0]), "for 2 images"),
}
OTHERS = {
    "sums in int64": ("integer_conv", conv(torch.zeros(16, dtype=torch.int64)), "the sums are torch.int64"),
    "few sums": ("integer_conv", conv(torch.zeros(8, dtype=torch.int32)), "the sums are"),
    "a short bias": ("integer_conv", conv(bias=torch.ones(8)), "bias is"),
    "odd groups": ("quantized_group_norm", norm(groups=3), "do not make 3 groups"),
    "a short weight": ("quantized_group_norm", norm(weight=torch.ones(8)), "weight is"),
    "a shift of other images": ("quantized_group_norm", norm(shift=torch.ones(3, 16)), "the shift is"),
    "a negative border": ("quantized_image", image(padding=[0, -1, 0, 0]), "the padding is"),
    "odd channels": ("quantized_image", image((2, 4, 4, 24)), "24 channels"),
    "an odd depth": ("integer_attention", attention((2, 4, 5, 6)), "last axis"),
    "three columns": (
        "integer_attention",
        attention(scales=torch.ones(3, 3), zero_points=torch.zeros(3, 3).long()),
        "the scales",
    ),
}


def refuses(name, arguments, words):
    operator = getattr(OPERATORS, name).rows
    with pytest.raises(LoweringError, match=words) as raised:
        operator(**arguments)
    assert "\n" not in str(raised.value) and "tfmq::" in str(raised.value)
    fakes, mode = on_fakes(arguments)
    with mode, pytest.raises(LoweringError, match=words):
        operator(**fakes)


@pytest.mark.parametrize("name", OPERATOR_NAMES)
@pytest.mark.parametrize("case", TABLES)
def test_a_wrong_table_is_one_sentence(case, name):
    key, change, words = TABLES[case]
    arguments = MAKERS[name]()
    refuses(name, {**arguments, key: change(arguments[key])}, words)


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_operators_refuse_their_overloads_refuse_too(case):
    refuses(*OTHERS[case])


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_a_right_call_has_the_size_that_was_traced(name):
    operator, arguments = getattr(OPERATORS, name).rows, MAKERS[name]()
    fakes, mode = on_fakes(arguments)
    with mode:
        traced = operator(**fakes)
    result = operator(**arguments)
    assert (traced.shape, traced.dtype) == (result.shape, result.dtype)
    torch.library.opcheck(operator, (), arguments, test_utils=("test_schema", "test_faketensor"))


def test_as_many_rows_as_a_symbolic_batch_has_images():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    arguments = image()
    batch = mode.from_tensor(torch.zeros(5, 2), static_shapes=False).shape[0]
    with mode:
        sizes = {"x": torch.empty(batch * 3, 4, 4, 16), "rows": torch.empty(batch, dtype=torch.int64)}
        fixed = {key: mode.from_tensor(arguments[key], static_shapes=True) for key in ("scales", "zero_points")}
        assert OPERATORS.quantized_image.rows(**{**arguments, **fixed, **sizes}).shape[0] == batch * 3
        twice = {**sizes, "rows": torch.empty(batch * 6, dtype=torch.int64)}
        with pytest.raises(LoweringError, match="not int64 of a divisor"):
            OPERATORS.quantized_image.rows(**{**arguments, **fixed, **twice})


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_a_row_means_the_operator_with_its_numbers(name):
    """One row for all is the plain operator; an item with several rows is each of them by itself."""
    arguments = MAKERS[name]()
    generator = torch.Generator().manual_seed(0)
    for key, value in arguments.items():
        if key == "x" and isinstance(value, list):
            arguments[key] = [torch.randn(part.shape, generator=generator) for part in value]
        elif key in ("x", "query", "key", "value"):
            random = torch.randn(value.shape, generator=generator)
            arguments[key] = (random * 50 + 100).byte() if value.dtype == torch.uint8 else random
    sizes = torch.tensor([0.02, 0.03, 0.05]).view(3, *[1] * (arguments["scales"].ndim - 1))
    arguments["scales"] = (sizes * torch.ones_like(arguments["scales"])).contiguous()
    arguments["zero_points"] = arguments["zero_points"] * torch.tensor([40, 42, 30]).view_as(sizes)
    operator = getattr(OPERATORS, name)
    # Rows outside the table are the nearest inside it.
    result = operator.rows(**{**arguments, "rows": torch.tensor([7, -1])})
    for image_number, row in enumerate((2, 0)):
        one = {key: value for key, value in arguments.items() if key not in ("scales", "zero_points", "rows")}
        for key in ("x", "query", "key", "value"):
            if key in one:
                own = slice(image_number, image_number + 1)
                one[key] = [part[own] for part in one[key]] if isinstance(one[key], list) else one[key][own]
        scale, zero = arguments["scales"][row], arguments["zero_points"][row]
        if name == "integer_conv":
            sums = one.pop("weight_sum")
            one["scale"] = one.pop("weight_scale") * scale
            one["bias"] = one["bias"] - one["scale"] * sums * zero
        elif name == "integer_attention":
            one |= {"scales": scale.tolist(), "zero_points": [int(zero[0]), int(zero[1]), int(zero[3])]}
        else:
            one |= {"scale": float(scale), "zero_point": int(zero)}
        torch.testing.assert_close(result[image_number : image_number + 1], operator.default(**one))


def test_one_image_of_queries_is_quantized_by_each_items_row():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 2, 5, 8, generator=generator) for n in (1, 3, 3))
    scales = torch.tensor([[0.01, 0.02, 1 / 255, 0.02], [0.2, 0.03, 1 / 255, 0.02]])
    zeros = torch.tensor([[128, 120, 0, 125], [100, 110, 0, 130]])
    rows = torch.tensor([1, 0, 1])
    result = OPERATORS.integer_attention.rows(query, key, value, 0.3, scales, zeros, rows)
    repeated = query.expand(3, -1, -1, -1).contiguous()
    wanted = OPERATORS.integer_attention.rows(repeated, key, value, 0.3, scales, zeros, rows)
    assert torch.equal(result, wanted) and not torch.equal(result[0], result[1])
