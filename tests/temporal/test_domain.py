"""Domains: what a time path is evaluated over, made from finite sets or from conditionings of batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conditional_cases import BATCHES, CONDITIONS, all_pairs, captured
from tests.models import TIMESTEPS
from tfmq_fx.temporal import domain as module
from tfmq_fx.temporal.domain import conditioned_domain, finite_domain, schedule_domain, table_domain, time_path
from tfmq_fx.temporal.inputs import Conditionings, collect_conditionings


def numbered(count):
    return Conditionings(("a",), [(torch.tensor([float(n)]),) for n in range(count)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_finite_domain_has_every_combination_once_the_timestep_slowest(sizes):
    values = {f"input{n}": 10 * torch.arange(size, dtype=torch.float64) for n, size in enumerate(sizes)}
    domain = finite_domain("input0", values)
    columns = domain.columns()
    naive = torch.cartesian_prod(*values.values()).reshape(-1, len(sizes))
    assert torch.equal(torch.stack(list(columns.values()), 1), naive)
    assert domain.rows.tolist() == list(range(len(naive))) and domain.entry_per_row
    assert domain.further == tuple(values)[1:]


def test_the_domain_of_a_graph_is_that_of_its_table_and_else_the_timesteps():
    graph = captured()
    assert table_domain(graph) is None and schedule_domain(graph, "timestep", None) is None
    domain = schedule_domain(graph, "timestep", TIMESTEPS.double())
    assert domain.columns()["timestep"].tolist() == TIMESTEPS.tolist() and domain.further == ()


def test_conditionings_of_batches_are_kept_once_in_their_order():
    found = collect_conditionings(captured(), CONDITIONS, [*BATCHES, *BATCHES]).values
    assert len(found) == 3
    first = [item for _, _, _, pooled in BATCHES for item in pooled]
    naive = [value for n, value in enumerate(first) if not any(torch.equal(value, other) for other in first[:n])]
    assert all(torch.equal(ours, theirs) for (ours,), theirs in zip(found, naive, strict=True))


def test_a_conditioned_domain_has_every_timestep_and_goes_round_the_conditionings():
    pairs = all_pairs()
    assert len(pairs) == 30 and pairs.columns()["pooled"].shape == (30, 6) and not pairs.entry_per_row
    few = conditioned_domain("t", torch.arange(10.0), numbered(5), most=20)
    assert few.chosen["t"].bincount().tolist() == [2] * 10 and few.chosen["a"].bincount().tolist() == [4] * 5
    alone = conditioned_domain("t", torch.arange(10.0), numbered(5), most=3)
    assert len(alone) == 10 and alone.entry_per_row


def test_conditioned_rows_count_in_the_order_of_noise():
    """As parameters per timestep do outside the block, whatever the order of the schedule."""
    domain = conditioned_domain("t", torch.tensor([900.0, 500.0, 700.0]), numbered(2))
    assert domain.columns()["t"].tolist() == [900, 900, 500, 500, 700, 700]
    assert domain.rows.tolist() == [2, 2, 0, 0, 1, 1]
    assert domain.timesteps_of((2, 0)).tolist() == [900, 900, 500, 500]


def test_a_sample_keeps_entries_as_they_are_in_their_order():
    domain = conditioned_domain("t", torch.arange(10.0), numbered(5), most=20)
    sampled = domain.sampled(7, seed=0)
    assert len(sampled) == 7 and bool((sampled.chosen["t"].diff() >= 0).all())
    assert torch.equal(sampled.columns()["a"][:, 0], sampled.chosen["a"].float())
    assert torch.equal(sampled.rows, sampled.chosen["t"])
    whole = {tuple(pair) for pair in torch.stack([domain.columns()["t"], domain.columns()["a"][:, 0]], 1).tolist()}
    drawn = [tuple(pair) for pair in torch.stack([sampled.columns()["t"], sampled.columns()["a"][:, 0]], 1).tolist()]
    assert len(set(drawn)) == 7 and set(drawn) <= whole
    assert domain.sampled(20, seed=0) is domain


@pytest.mark.parametrize("room", [1, 7, 100, 10**6])
def test_chunks_are_the_columns_in_pieces(room, monkeypatch):
    monkeypatch.setattr(module, "MOST_NUMBERS", room)
    pairs = all_pairs()
    chunks = list(pairs.chunks())
    for name, column in pairs.columns().items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), column)
    # Seven numbers an entry.
    assert max(len(chunk["timestep"]) for chunk in chunks) == min(30, max(1, room // 7))


def test_the_time_path_takes_in_what_the_conditioning_reaches():
    graph = captured()
    block = time_path(graph, finite_domain("timestep", {"timestep": TIMESTEPS}))
    whole = time_path(graph, all_pairs())
    assert set(block.nodes) < set(whole.nodes)
    assert not block.embedding_layers and [layer.fqn for layer in whole.embedding_layers] == ["down.embed", "up.embed"]
