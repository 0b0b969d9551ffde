"""Budgets and candidates as they are written, and what is refused."""

import pytest

from tfmq_fx import ConfigError
from tfmq_fx.search.budget import Budget
from tfmq_fx.search.widths import Widths, check_candidates


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("size=0.2x", "size", 0.2),
        (" latency = 1.1X ", "latency", 1.1),
        ("psnr=40", "psnr", 40.0),
        ("psnr=40dB", "psnr", 40.0),
        ("size=.25", "size", 0.25),
    ],
)
def test_a_budget_is_read(text, measure, limit):
    budget = Budget.of(text)
    assert (budget.measure, budget.limit) == (measure, limit)
    assert Budget.of(str(budget)) == budget


@pytest.mark.parametrize("value", ["size", "size=", "size=0x", "size=-1x", "size=1.2.3x", "psnr=40x", "size=1dB", "x=1",
                                   "size=0.2x,psnr=3", 0.2, None])  # fmt: skip
def test_what_is_no_budget_is_refused(value):
    with pytest.raises(ConfigError, match=r"write size=0\.2x, latency=1\.1x or psnr=40"):
        Budget.of(value)


def test_candidates_are_read():
    assert check_candidates("w8a8, W4A8,float,w8a8") == (Widths(8, 8), Widths(4, 8), Widths(32, 32))
    assert [str(each) for each in check_candidates(("w8a8", "w6a6", "w32a32"))] == ["w8a8", "w6a6", "float"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("w8a8", "leaves nothing to choose"),
        ("w8a8,int4", "'int4' is not supported"),
        ("w8a8,w9a8", "weight_bits=9"),
        (("w8a8", 4), "must be a tuple"),
    ],
)
def test_what_are_no_candidates_is_refused(names, words):
    with pytest.raises(ConfigError, match=words):
        check_candidates(names)


def test_no_kernel_takes_more_than_eight_bits():
    kernels = {str(each): each.has_integer_kernel for each in check_candidates("w8a8,w4a8,w8a16,w16a8,float")}
    assert kernels == {"w8a8": True, "w4a8": True, "w8a16": False, "w16a8": False, "float": False}
