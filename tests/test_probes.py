"""Probes: what is asked stands in the text once, where the probe says, and a learned score can win."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_rag import probes, tasks
from l2m_rag.errors import UsageError

try:
    BOOKS = tasks.data_folder() / "books"
except UsageError:
    BOOKS = None  # type: ignore[assignment]

FEW = settings(max_examples=50, deadline=None)
NOISE = [f"Line {number} of a long book." for number in range(300)]


def count(sentence: str) -> int:
    return len(sentence.split())


@FEW
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6), st.integers(2, 17), st.data())
def test_a_key_stands_once_before_its_value_in_the_gold_segment(
    seed: int, batch: int, segments: int, length: int, data: st.DataObject
) -> None:
    pairs = data.draw(st.integers(1, segments * (length // 2)))
    keys, values = pairs + seed % 5, 1 + seed % 7
    made = probes.associative_recall(
        np.random.default_rng(seed),
        batch=batch,
        segments=segments,
        pairs=pairs,
        keys=keys,
        values=values,
        segment_length=length,
    )
    assert made.tokens.shape == (batch, segments, length)
    assert made.tokens.dtype == made.question.dtype == made.answer.dtype == made.gold.dtype == np.int64
    assert 0 <= made.tokens.min() <= made.tokens.max() < probes.vocabulary(keys, values)
    for row in range(batch):
        used = made.tokens[row][(made.tokens[row] >= 2) & (made.tokens[row] < 2 + keys)]
        assert len(used) == len(set(used)) == pairs
        assert (made.tokens[row] >= 2 + keys).sum() == pairs
        assert made.question[row, 0] == probes.ASK
        ((segment, place),) = np.argwhere(made.tokens[row] == made.question[row, 1])
        assert segment == made.gold[row]
        assert made.tokens[row, segment, place + 1] == made.answer[row] >= 2 + keys


def test_recall_is_the_same_for_a_seed_and_asks_every_segment() -> None:
    def make(seed: int) -> probes.Recall:
        rng = np.random.default_rng(seed)
        return probes.associative_recall(rng, batch=200, segments=4, pairs=6, keys=9, values=5, segment_length=8)

    one, same, other = make(1), make(1), make(2)
    assert (one.tokens == same.tokens).all()
    assert (one.question == same.question).all()
    assert (one.tokens != other.tokens).any()
    assert min(Counter(one.gold.tolist()).values()) > 20
    assert probes.vocabulary(9, 5) == 16


@pytest.mark.parametrize(
    ("pairs", "keys", "message"), [(5, 4, "must not exceed keys"), (9, 20, "the room"), (0, 4, "at least 1")]
)
def test_pairs_that_do_not_fit_are_an_error(pairs: int, keys: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probes.associative_recall(
            np.random.default_rng(0), batch=1, segments=2, pairs=pairs, keys=keys, values=2, segment_length=9
        )


@FEW
@given(st.integers(0, 999), st.integers(20, 900), st.floats(0, 1))
def test_a_needle_stands_at_its_depth_and_answers_its_question(seed: int, length: int, depth: float) -> None:
    made = probes.needle(NOISE, random.Random(seed), length=length, depth=depth, count=count)
    assert made.text.count("The pass key of ") == 1
    assert length - 6 < count(made.text) <= length
    name = made.question.removeprefix("What is the pass key of ").removesuffix("?")
    assert f"The pass key of {name} is {made.answer}." in made.text
    before = count(made.text.partition("The pass key")[0])
    assert abs(before - depth * (count(made.text) - 7)) <= 3  # noise sentences have six tokens
    assert made == probes.needle(NOISE, random.Random(seed), length=length, depth=depth, count=count)


@pytest.mark.parametrize(
    ("length", "depth", "message"), [(100, 1.5, "depth"), (3, 0.5, "at least 7"), (9000, 0.5, "tokens short")]
)
def test_a_needle_that_cannot_be_hidden_is_an_error(length: int, depth: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probes.needle(NOISE, random.Random(0), length=length, depth=depth, count=count)


@FEW
@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 40), st.floats(0, 4))
def test_a_trace_inserts_each_record_once_and_reads_only_what_is_there(
    seed: int, records: int, more: int, skew: float
) -> None:
    made = probes.read_trace(np.random.default_rng(seed), records=records, steps=records + more, skew=skew)
    assert made.features.shape == (records, probes.FEATURES)
    assert made.features.dtype == np.float32
    assert made.events.shape == (2 * records + more, 2)
    assert made.events.dtype == np.int64
    there: list[int] = []
    for kind, record in made.events.tolist():
        if kind == probes.INSERT:
            assert record == len(there)
            there.append(record)
        else:
            assert record in there
    assert len(there) == records
    again = probes.read_trace(np.random.default_rng(seed), records=records, steps=records + more, skew=skew)
    assert (again.events == made.events).all()


def hits(events: list[list[int]], room: int, worth: Callable[[int, int, int, int], float]) -> float:
    """Share of the reads that are served, when the record worth least is thrown out for good."""
    kept: dict[int, tuple[int, int, int]] = {}
    served = 0
    for step, (kind, record) in enumerate(events):
        if kind == probes.INSERT:
            kept[record] = (step, step, 0)
            if len(kept) > room:
                del kept[min(kept, key=lambda one: worth(one, *kept[one]))]
        elif record in kept:
            served += 1
            inserted, _, reads = kept[record]
            kept[record] = (inserted, step, reads + 1)
    return served / sum(kind == probes.READ for kind, _ in events)


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_score_serves_more_reads_than_recency_or_frequency(seed: int) -> None:
    made = probes.read_trace(np.random.default_rng(seed), records=800, steps=1200, skew=1.5)
    # learned from the first part of the trace, measured on the whole
    part = made.events[:800]
    reads = np.bincount(part[part[:, 0] == probes.READ][:, 1], minlength=400)[:400]
    inputs = np.concatenate((made.features, np.ones((800, 1), dtype=np.float32)), axis=1)
    score = inputs @ np.linalg.lstsq(inputs[:400], np.log1p(reads), rcond=None)[0]
    events = made.events.tolist()
    served = {
        "fifo": hits(events, 80, lambda _, inserted, used, reads: inserted),
        "lru": hits(events, 80, lambda _, inserted, used, reads: used),
        "lfu": hits(events, 80, lambda _, inserted, used, reads: reads + used * 1e-6),
        "learned": hits(events, 80, lambda record, inserted, used, reads: float(score[record])),
    }
    assert served["learned"] > 0.05 + max(served["fifo"], served["lru"], served["lfu"]), served


def test_a_trace_that_cannot_be_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"steps \(3\)"):
        probes.read_trace(np.random.default_rng(0), records=4, steps=3, skew=1)
    with pytest.raises(UsageError, match="must not be negative"):
        probes.read_trace(np.random.default_rng(0), records=4, steps=4, skew=-1)


def test_sentences_end_at_stops_and_paragraphs_but_not_at_titles() -> None:
    text = (
        'CHAPTER I.\n\n"Is it so?" said Mr. Brown.\nHe laughed and J. Smith\nwent at 3.15 p.m. on foot... '
        'Then "Go." It rained!\r\n\r\nNo stop here'
    )
    assert probes.sentences(text) == [
        "CHAPTER I.",
        '"Is it so?" said Mr. Brown.',
        "He laughed and J. Smith went at 3.15 p.m. on foot...",
        'Then "Go."',
        "It rained!",
        "No stop here",
    ]


def test_books_are_read_in_order_and_short_sentences_left_out(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Three words here. No. Four words are here."}) + "\n")
    (tmp_path / "a.txt").write_text("The first book is this one. Yes.")
    (tmp_path / "README.md").write_text("Not a book at all, this one.")
    found = probes.noise_sentences(tmp_path, at_least=3, count=count)
    assert found == ["The first book is this one.", "Three words here.", "No. Four words are here."]
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="row 1"):
        probes.noise_sentences(tmp_path, at_least=3, count=count)
    with pytest.raises(UsageError, match="holds no"):
        probes.noise_sentences(tmp_path / "none", at_least=3, count=count)


@pytest.mark.slow
@pytest.mark.skipif(BOOKS is None or not BOOKS.is_dir(), reason="the books are not beside this checkout")
def test_the_books_give_noise_enough_for_ten_million_tokens() -> None:
    found = probes.noise_sentences(BOOKS, at_least=10, count=count)
    assert sum(map(count, found)) > 10_000_000
