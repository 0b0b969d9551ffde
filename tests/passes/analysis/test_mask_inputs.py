"""Inputs that are additive masks of attention are told from those that are read in any other way."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

import tfmq_fx
from tfmq_fx.passes import DecomposeAttention, DeferSoftmaxNormalization
from tfmq_fx.passes.analysis.mask_inputs import mask_inputs

X = torch.randn(2, 4, 8)
MASK = torch.zeros(2, 1, 4, 4)


def found(compute, *inputs, rewrite=None):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, mask):
            return compute(self.linear(x)[:, None], mask)

    graph = tfmq_fx.capture(Model().eval(), inputs or (X, MASK))
    if rewrite:
        assert rewrite(graph).modified
    return mask_inputs(graph)


def by_hand(h, mask):
    return torch.softmax(h @ h.transpose(-1, -2) / 3 + mask, -1) @ h


MASKS = {
    "fused": lambda h, m: attention(h, h, h, attn_mask=m),
    "twice": lambda h, m: attention(attention(h, h, h, attn_mask=m), h, h, attn_mask=m),
    "fused, behind views": lambda h, m: attention(h, h, h, attn_mask=m[:, :, :1].expand(-1, 1, 4, 4)),
    "fused, behind casts": lambda h, m: attention(h, h, h, attn_mask=m.double().float()[:, 0][:, None]),
    "by hand": by_hand,
    "by hand, the mask first": lambda h, m: torch.softmax(m + h @ h.transpose(-1, -2), -1) @ h,
    "by hand, a view between": lambda h, m: torch.softmax((h @ h.mT + m).flatten(0, 1), -1)[:, None] @ h,
    "a product with a summand": lambda h, m: torch.baddbmm(m[:, 0], h[:, 0], h[:, 0].mT).softmax(-1) @ h[:, 0],
    "its size read besides": lambda h, m: by_hand(h, m) * m.shape[0],
}
OTHERS = {
    "multiplied": lambda h, m: attention(h, h, h, attn_mask=m * -1e4),
    "added to what is returned": lambda h, m: h @ h.mT + m,
    "added to scores that are returned": lambda h, m: ((s := h @ h.mT + m), torch.softmax(s, -1) @ h),
    "the mask returned": lambda h, m: (by_hand(h, m), m.reshape(-1)),
    "the mask as a value too": lambda h, m: attention(h, h, m + 0, attn_mask=m),
    "added to itself": lambda h, m: torch.softmax(m + m, -1) @ h,
    "scaled in the addition of two masks": lambda h, m: torch.softmax((m + 1.0) * (h @ h.mT), -1) @ h,
    "unread": lambda h, m: h,
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask(name):
    assert found(MASKS[name]) == {"mask"}


@pytest.mark.parametrize("name", OTHERS)
def test_no_mask(name):
    assert found(OTHERS[name]) == set()


def test_a_boolean_mask_holds_no_infinity():
    assert found(MASKS["fused"], X, MASK == 0) == set()


def test_a_mask_is_one_after_its_attention_was_split():
    assert found(MASKS["fused"], rewrite=DecomposeAttention()) == {"mask"}


def test_a_mask_is_one_after_the_division_was_deferred():
    assert found(by_hand, rewrite=DeferSoftmaxNormalization()) == {"mask"}
    assert found(OTHERS["added to scores that are returned"], rewrite=DeferSoftmaxNormalization()) == set()
