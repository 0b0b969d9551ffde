"""What a graph cannot hold: state that a call changes, and a branch on the batch size."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, SmallDenoiser, batch, tiny_unet
from tfmq_fx import CaptureError
from tfmq_fx.frontend.interface import interface_of


class Counting(SmallDenoiser):
    """Counts its calls, through a view in one of the cases."""

    def __init__(self, *, through_a_view):
        super().__init__()
        self.through_a_view = through_a_view
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, sample, timestep):
        (self.calls[:1] if self.through_a_view else self.calls).add_(1.0)
        return self.denoise(sample, self.time(timestep)) * self.calls[0]


class Branching(SmallDenoiser):
    def __init__(self, limit, change):
        super().__init__()
        self.limit, self.change = limit, change

    def forward(self, sample, timestep):
        result = self.denoise(sample, self.time(timestep))
        return self.change(result) if sample.shape[0] > self.limit else result


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_changed_buffer_is_refused(through_a_view):
    model = Counting(through_a_view=through_a_view).eval()
    with pytest.raises(CaptureError, match="changes its buffer 'calls' during a call") as caught:
        tfmq_fx.capture(model, batch(4, 1))
    assert "\n" not in str(caught.value)
    assert not bool(model.calls.any())


def test_batch_norm_in_evaluation_changes_none():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    tfmq_fx.capture(model, (torch.randn(2, 1, 8, 8),))
    assert model.training and int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("limit", [5, 40])
@pytest.mark.parametrize("change", [lambda y: y * 2, lambda y: y.sin(), lambda y: y - y.mean()])
def test_a_branch_on_the_batch_is_refused(limit, change):
    with pytest.raises(CaptureError, match=f"computes something else for batches above {limit} .*dynamic_batch=False"):
        tfmq_fx.capture(Branching(limit, change).eval(), batch(4, 1))


def test_the_way_out_of_a_branch():
    model = Branching(5, lambda y: y * 2).eval()
    captured = tfmq_fx.capture(model, batch(4, 1), dynamic_batch=False)
    torch.testing.assert_close(captured(*batch(4, 2)), model(*batch(4, 2)))


@pytest.mark.parametrize("change", [torch.clone, lambda y: y.contiguous()])
def test_a_branch_that_only_copies_is_a_limit(change):
    captured = tfmq_fx.capture(Branching(5, change).eval(), batch(4, 1))
    assert interface_of(captured).max_batch in (5, None)
    upsampling = tfmq_fx.capture(tiny_unet(), (torch.randn(4, 1, 8, 8), TIMESTEPS[:4]))
    assert interface_of(upsampling).max_batch == 63


class Undecided(Branching):
    """Reads a value, which tensors without values do not have."""

    def forward(self, sample, timestep):
        if not torch.compiler.is_compiling() and float(sample.sum()) == 0.5:
            return sample
        return super().forward(sample, timestep)


def test_what_cannot_be_checked_is_said():
    with pytest.warns(UserWarning, match="does not run without values .* above 5"):
        tfmq_fx.capture(Undecided(5, torch.clone).eval(), batch(4, 1))
