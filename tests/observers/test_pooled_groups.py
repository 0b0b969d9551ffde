"""Timestep groups of few calibration items share the ranges of their neighbours."""

import torch

from tfmq_fx.observers import GroupedMinMaxObserver
from tfmq_fx.observers.grouped import pooled


def test_a_group_takes_the_nearest_ones_until_the_items_are_enough():
    low, high = -torch.arange(1.0, 6.0), torch.arange(1.0, 6.0)
    lows, highs = pooled(low, high, torch.tensor([8, 4, 4, 0, 9]), 8)
    # The second and third reach to both sides, the fourth has nothing of its own, the first and last stand alone.
    assert highs.tolist() == [1, 3, 3, 5, 5]
    assert torch.equal(lows, -highs)
    assert pooled(low, high, torch.tensor([1, 0, 0, 0, 1]), 8)[1].tolist() == [5.0] * 5


def test_a_group_without_items_has_no_range_to_give():
    _, highs = pooled(torch.zeros(3), torch.tensor([1.0, 100.0, 2.0]), torch.tensor([9, 0, 9]), 8)
    assert highs.tolist() == [1, 2, 2]


def test_entries_of_an_item_count_once_and_without_pooling_a_group_stands_for_itself():
    x, groups = torch.tensor([[1.0], [1.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1])
    scales = []
    for least, entries in ((1, 1), (2, 1), (2, 2)):
        observer = GroupedMinMaxObserver(2, 8)
        observer.pool_groups(least, entries)
        observer(x, groups)
        scales.append((observer.calculate_qparams()[0] * 255).round().tolist())
    assert scales == [[1, 5], [1, 5], [5, 5]]
