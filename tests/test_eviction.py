"""Policies of eviction on cases whose outcome is plain."""

import numpy as np
import pytest
import torch

from l2m_rag.memory_eval import eviction
from l2m_rag.memory_tiers.eviction import POLICIES, Policy, retention
from l2m_rag.memory_tiers.working import Records
from l2m_rag.probes import read_trace


def records(written: list[int], read_at: list[int], reads: list[int]) -> Records:
    count = len(written)
    numbers = [torch.tensor([part]) for part in (written, read_at, reads)]
    starts = torch.arange(count)[None] * 7
    return Records(
        torch.zeros(1, count, 1, 1), torch.zeros(1, count, 2), torch.zeros(1, count, 1, dtype=torch.int64),
        torch.ones(1, count, dtype=torch.int64), starts, *numbers,
    )  # fmt: skip


@pytest.mark.parametrize(("policy", "first"), [("lru", 2), ("lfu", 1), ("fifo", 0), ("belady", 0), ("learned", 3)])
def test_each_policy_lets_go_of_its_own(policy: Policy, first: int) -> None:
    held = records([0, 1, 2, 3], [9, 5, 2, 8], [4, 0, 2, 1])
    keep, next_read = torch.tensor([[0.3, 0.2, 0.9, 0.1]]), torch.tensor([[torch.inf, 11.0, 12.0, 13.0]])
    scores = retention(policy, held, torch.tensor([9]), keep=keep, next_read=next_read)
    assert scores.argmin() == first


def test_what_just_came_is_not_the_least_frequently_used() -> None:
    held = records([0, 1, 9], [8, 7, 9], [4, 3, 0])
    assert retention("lfu", held, torch.tensor([9])).argmin() == 1
    assert retention("lfu", held, torch.tensor([10])).argmin() == 2


def test_chance_is_repeatable_and_even() -> None:
    held = records([0] * 8, [0] * 8, [0] * 8)
    gone = [int(retention("random", held, torch.tensor([step])).argmin()) for step in range(800)]
    assert gone == [int(retention("random", held, torch.tensor([step])).argmin()) for step in range(800)]
    assert (np.bincount(gone, minlength=8) > 50).all()


def test_what_a_policy_needs_must_be_given() -> None:
    held = records([0], [0], [0])
    with pytest.raises(ValueError, match="keep scores"):
        retention("learned", held, torch.tensor([1]))
    with pytest.raises(ValueError, match="next reads"):
        retention("belady", held, torch.tensor([1]))


def test_the_learned_score_beats_every_policy_but_the_one_that_knows_the_future() -> None:
    rows = {
        row["policy"]: row
        for row in eviction(read_trace(np.random.default_rng(5), records=600, steps=1200, skew=3.0), 60)
    }
    assert set(rows) == set(POLICIES)
    others = [rows[policy]["hits"] for policy in ("lru", "lfu", "fifo", "random")]
    assert rows["belady"]["hits"] >= rows["learned"]["hits"] > max(others)
    assert rows["learned"]["of_belady"] >= 0.85
