"""Slots against LM2's equations, and the ring of records against plain lists."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from l2m_rag.memory_tiers.working import Records, Slots, empty_records, evict, insert, split, touch


def slots(*, delta: bool, written: int = 5) -> Slots:
    torch.manual_seed(0)
    made = Slots(8, 5, 2, written, delta=delta)
    for weight in made.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    return made


def naive(made: Slots, held: torch.Tensor, x: torch.Tensor, real: list[int]) -> torch.Tensor:
    """Write one slot, head and token at a time."""
    out = held.clone()
    for row, count in enumerate(real):
        if not count:
            continue
        seen = made.norm(x[row, :count])
        keys, values = made.key(seen), made.value(seen)
        new, fits = [], []
        for slot in range(held.shape[1]):
            query = made.query(held[row, slot] + made.address[slot])
            read, fit = [], []
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                matches = torch.stack([query[part] @ key[part] for key in keys]) / 4**0.5
                weights = torch.softmax(matches, 0)
                fit.append(float(matches.exp().sum().log()))
                read.append((weights[:, None] * values[:, part]).sum(0))
            memory = torch.cat(read)
            take = torch.sigmoid(made.input_gate(memory))
            kept = torch.sigmoid(made.forget_gate(memory)) * held[row, slot]
            new.append(kept + take * (torch.tanh(memory) - kept) if made.delta else take * torch.tanh(memory) + kept)
            fits.append(sum(fit))
        for slot in np.argsort(fits)[::-1][: made.written]:
            out[row, slot] = new[slot]
    return out


@settings(max_examples=20, deadline=None)
@given(delta=st.booleans(), written=st.integers(1, 7), real=st.lists(st.integers(0, 6), min_size=2, max_size=2))
def test_the_update_of_the_slots_is_lm2s(delta: bool, written: int, real: list[int]) -> None:
    made = slots(delta=delta, written=written)
    with torch.no_grad():
        held, x = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
        assert_close(made(held, x, torch.tensor(real)), naive(made, held, x, real), atol=1e-5, rtol=1e-5)


def test_forgetting_begins_with_keeping() -> None:
    made = Slots(8, 5, 2, 5)
    assert torch.equal(made.forget_gate.bias, torch.ones(8))
    assert torch.equal(made.input_gate.bias, torch.zeros(8))


def ring(count: int, room: int, seed: int = 0) -> Records:
    """Give records of which some places are empty."""
    draw = torch.Generator().manual_seed(seed)
    empty = empty_records(1, room, 3, 4, 2, torch.float32, torch.device("cpu"))
    lengths = torch.randint(0, 4, (1, count), generator=draw)
    numbers = torch.arange(count)[None]
    new = Records(
        torch.randn(1, count, 3, 4, generator=draw), torch.randn(1, count, 2, generator=draw),
        torch.zeros(1, count, 3, dtype=torch.int64), lengths, numbers * 3, numbers, numbers, 0 * numbers,
    )  # fmt: skip
    return insert(empty, new)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), room=st.integers(1, 8), seed=st.integers(0, 50), ties=st.booleans())
def test_eviction_with_a_fixed_score_is_a_plain_sort(count: int, room: int, seed: int, ties: bool) -> None:
    records = ring(count, room, seed)
    scores = torch.randn(1, count + room, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    kept, gone = evict(records, scores, room)
    order = torch.where(records.lengths[0] > 0, scores[0], -torch.inf)
    ranked = sorted(range(count + room), key=lambda place: (float(order[place]), place))
    for part, at_kept, at_gone in zip(records, kept, gone, strict=True):
        assert torch.equal(at_gone[0], part[0, sorted(ranked[:count])])
        assert torch.equal(at_kept[0], part[0, sorted(ranked[count:])])
    assert kept.lengths.shape == (1, room)


def test_nothing_is_evicted_while_there_is_room() -> None:
    records = empty_records(1, 6, 3, 4, 2, torch.float32, torch.device("cpu"))
    parts = split(
        torch.randn(1, 8, 4), torch.arange(8)[None], torch.tensor([8]), torch.tensor([0]), torch.tensor([0]), 3
    )
    values, tokens, *numbers = parts
    everything = insert(records, Records(values, torch.zeros(1, 3, 2), tokens, *numbers))
    kept, gone = evict(everything, torch.zeros(1, 9), 6)
    assert kept.lengths.sum() == 8
    assert gone.lengths.sum() == 0
    assert kept.starts[kept.lengths > 0].tolist() == [0, 3, 6]


@settings(max_examples=30, deadline=None)
@given(real=st.lists(st.integers(0, 7), min_size=1, max_size=3), length=st.integers(1, 9))
def test_a_segment_is_cut_without_loss(real: list[int], length: int) -> None:
    x, tokens = torch.randn(len(real), 7, 4), torch.arange(1, 8).expand(len(real), 7)
    position = torch.tensor([10] * len(real))
    values, ids, lengths, starts, written, read_at, reads = split(
        x, tokens, torch.tensor(real), position, torch.full((len(real),), 3), length
    )
    for row, count in enumerate(real):
        pieces = [ids[row, at, : lengths[row, at]] for at in range(ids.shape[1])]
        assert torch.cat(pieces).tolist() == tokens[row, :count].tolist()
        states = [values[row, at, : lengths[row, at]] for at in range(ids.shape[1])]
        assert torch.equal(torch.cat(states), x[row, :count])
        assert_close(values[row].abs().sum(), torch.cat(states).abs().sum())
        filled = lengths[row] > 0
        assert starts[row][filled].tolist() == [10 + length * at for at in range(int(filled.sum()))]
    assert (written == 3).all()
    assert (read_at == 3).all()
    assert (reads == 0).all()


def test_reads_are_noted() -> None:
    records = ring(4, 2)
    touched = touch(records, torch.tensor([[1, 3, 1]]), torch.tensor([[True, True, False]]), torch.tensor([9]))
    assert touched.reads.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert touched.read_at[0, [1, 3]].tolist() == [9, 9]
    assert records.reads.sum() == 0
