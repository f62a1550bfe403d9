"""Synthetic probes of memory: what was read long ago, where it was read, and what is worth keeping.

Three workloads with known answers: associative recall over segments of tokens, a pass key in a long text, and a
skewed trace of reads for policies of eviction. `noise_sentences` reads the books that the texts are made of.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l2m_rag.errors import UsageError
from l2m_rag.tasks import rows

PAD = 0
ASK = 1
FEATURES = 8
"""Size of the feature vector of a record of `read_trace`."""
INSERT = 0
READ = 1
RECENT = 4
RECENT_READS = 0.1
"""Share of the reads of `read_trace` that go to one of the last `RECENT` records."""
WANE = 0.5
"""Age at which a record of `read_trace` is read e times less often, as a share of all records."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Recall:
    """Texts of key and value pairs, each with a question about one of the keys.

    Args:
        tokens: ids, (batch, segments, segment_length) int64; a key stands just before its value, filler is `PAD`.
        question: [`ASK`, key], (batch, 2) int64.
        answer: the value's id, (batch,) int64.
        gold: number of the segment that holds the pair, (batch,) int64.
    """

    tokens: Ids
    question: Ids
    answer: Ids
    gold: Ids


def vocabulary(keys: int, values: int) -> int:
    """Give the number of token ids: `PAD`, `ASK`, the keys, then the values."""
    return 2 + keys + values


def associative_recall(
    rng: np.random.Generator,
    *,
    batch: int,
    segments: int,
    pairs: int,
    keys: int,
    values: int,
    segment_length: int,
) -> Recall:
    """Spread pairs over segments, each key once in a text, and ask for the value of one.

    Args:
        rng: draws pairs, places and questions.
        batch: number of texts.
        segments: of each text.
        pairs: of each text, anywhere in it but never across two segments.
        keys: number of different keys.
        values: number of different values; a value may come twice.
        segment_length: in tokens.

    Raises:
        UsageError: the pairs do not fit, or there are more of them than keys.
    """
    room = segments * (segment_length // 2)
    if min(batch, segments, pairs, keys, values) < 1:
        raise UsageError("batch, segments, pairs, keys and values must be at least 1")
    if pairs > keys:
        raise UsageError(f"pairs ({pairs}) must not exceed keys ({keys}): each key comes once in a text")
    if pairs > room:
        raise UsageError(f"pairs ({pairs}) must not exceed {room}, the room of {segments} segments of {segment_length}")
    tokens = np.full((batch, segments, segment_length), PAD, dtype=np.int64)
    key = 2 + rng.permuted(np.tile(np.arange(keys), (batch, 1)), axis=1)[:, :pairs]  # (batch, pairs)
    value = 2 + keys + rng.integers(values, size=(batch, pairs))
    segment = np.empty((batch, pairs), dtype=np.int64)
    for row in range(batch):
        slots = rng.permutation(room)[:pairs]
        segment[row] = slots // (segment_length // 2)
        for number in np.unique(segment[row]):
            here = np.flatnonzero(segment[row] == number)
            # starts of pairs among the places left when each pair counts as one: never overlapping, any parity
            starts = np.sort(rng.choice(segment_length - len(here), size=len(here), replace=False)) + np.arange(
                len(here)
            )
            tokens[row, number, starts] = key[row, here]
            tokens[row, number, starts + 1] = value[row, here]
    asked = rng.integers(pairs, size=batch)
    each = np.arange(batch)
    question = np.stack((np.full(batch, ASK, dtype=np.int64), key[each, asked]), axis=1)
    return Recall(tokens, question, value[each, asked], segment[each, asked])


@dataclass(frozen=True, slots=True)
class Needle:
    """A text that holds a pass key, and the question for it.

    Args:
        text: noise sentences with the needle among them.
        question: asks for the pass key by its name.
        answer: the pass key, five digits.
    """

    text: str
    question: str
    answer: str


NAMES = (
    "amber",
    "birch",
    "cobalt",
    "dune",
    "ember",
    "fjord",
    "granite",
    "heron",
    "indigo",
    "jade",
    "krypton",
    "lotus",
)


def needle(
    noise: Sequence[str], rng: random.Random, *, length: int, depth: float, count: Callable[[str], int]
) -> Needle:
    """Hide a pass key in consecutive noise sentences that start at a random place.

    Args:
        noise: sentences in the order of their book; past the end they go on from the start.
        rng: draws the start, the name and the key.
        length: of the text, in tokens, at most.
        depth: where the needle stands among the tokens, in [0, 1]: 0 is before all noise, 1 after it.
        count: gives the number of tokens of a sentence.

    Raises:
        UsageError: the depth is outside [0, 1], the length too small, or the noise too short for it.
    """
    if not 0 <= depth <= 1:
        raise UsageError(f"depth ({depth}) must lie in [0, 1]")
    name, key = rng.choice(NAMES), f"{rng.randrange(10_000, 100_000)}"
    sentence = f"The pass key of {name} is {key}."
    room = length - count(sentence)
    if room < 0:
        raise UsageError(f"length ({length}) leaves no room for the needle; give at least {length - room}")
    start = rng.randrange(len(noise)) if noise else 0
    background: list[str] = []
    ends = [0]  # tokens before each gap
    for text in (*noise[start:], *noise[:start]):
        end = ends[-1] + count(text)
        if end > room:
            break
        background.append(text)
        ends.append(end)
    else:
        if ends[-1] < room:
            raise UsageError(f"the noise is {room - ends[-1]} tokens short of length {length}; give more of it")
    gap = min(range(len(ends)), key=lambda at: abs(ends[at] - depth * ends[-1]))
    text = " ".join((*background[:gap], sentence, *background[gap:]))
    return Needle(text, f"What is the pass key of {name}?", key)


@dataclass(frozen=True, slots=True, eq=False)
class ReadTrace:
    """A workload for a memory that must forget.

    Args:
        features: of the records, (records, `FEATURES`) float32, known when a record is inserted.
        events: in order, (E, 2) int64: [`INSERT` or `READ`, record].
    """

    features: NDArray[np.float32]
    events: Ids


def read_trace(rng: np.random.Generator, *, records: int, steps: int, skew: float) -> ReadTrace:
    """Give a trace that inserts a record a step, while there are any, and then reads one that was inserted before.

    A hidden linear function of its features says what a record is worth: one of high worth is read soon and often, one
    of low worth hardly ever. So a score learned from the features tells on insertion what recency and frequency only
    show later. The reads of all records wane alike with their age, so that what was read much once is no safe guess
    for LFU, and one read in ten goes to one of the last few records whatever its worth, as LRU likes it.

    Args:
        rng: draws the features, the function and the reads.
        records: number of records.
        steps: one read each, and one insert each for the first `records` of them.
        skew: logarithm of how much more often a record is read whose worth is a standard deviation higher; at 0 the
            features tell nothing.

    Raises:
        UsageError: there are fewer steps than records, no records, or the skew is negative.
    """
    if records < 1 or steps < records:
        raise UsageError(f"steps ({steps}) must be at least records ({records}), and records at least 1")
    if skew < 0:
        raise UsageError(f"skew ({skew}) must not be negative")
    features = rng.standard_normal((records, FEATURES)).astype(np.float32)
    hidden = rng.standard_normal(FEATURES)
    worth = skew * (features @ (hidden / np.linalg.norm(hidden))).astype(np.float64)
    # all wane at one rate, so the later a record comes the greater its share, and the shares stay as they are
    share = np.exp(worth - worth.max() + np.arange(records) / (WANE * records))
    before = np.concatenate(([0.0], np.cumsum(share)))
    events: list[tuple[int, int]] = []
    for step in range(steps):
        if step < records:
            events.append((INSERT, step))
        inserted = min(step + 1, records)
        if rng.random() < RECENT_READS:
            read = inserted - 1 - int(rng.integers(min(RECENT, inserted)))
        else:
            read = int(np.searchsorted(before[1 : inserted + 1], rng.random() * before[inserted], side="right"))
        events.append((READ, min(read, inserted - 1)))
    return ReadTrace(features, np.array(events, dtype=np.int64).reshape(-1, 2))


# a full stop ends no sentence after a title or an initial, or before a small letter
_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Dr", "St", "Rev", "Capt", "Esq", "No", "[A-Z]"))
_END = re.compile(rf"(?<=[.!?]){_TITLES}[\"'\u201d\u2019)]*\s+(?=[\"'\u201c\u2018(]?[A-Z0-9])")
_PARAGRAPH = re.compile(r"\n\s*\n")


def noise_sentences(folder: Path, *, at_least: int, count: Callable[[str], int]) -> list[str]:
    """Give the sentences of the books in a folder, in order.

    Books are read as they come: files in the order of their names, texts whole, headings, notes and contents pages
    with them; only line breaks are joined, and short sentences left out.

    Args:
        folder: holds texts (.txt) or lines of {"text"} (.jsonl, .jsonl.zst).
        at_least: tokens that a sentence must have.
        count: gives the number of tokens of a sentence.

    Raises:
        UsageError: the folder holds no book, or a line of one has no text.
    """
    files = sorted(path for path in folder.glob("*") if path.name.endswith((".txt", ".jsonl", ".jsonl.zst")))
    if not files:
        raise UsageError(f"{folder} holds no .txt, .jsonl or .jsonl.zst file")
    return [
        sentence
        for file in files
        for text in _texts(file)
        for sentence in sentences(text)
        if count(sentence) >= at_least
    ]


def _texts(file: Path) -> Iterable[str]:
    if file.suffix == ".txt":
        yield file.read_text(encoding="utf-8-sig")
        return
    for number, row in enumerate(rows(file), 1):
        if not isinstance(row.get("text"), str):
            raise UsageError(f'{file}, row {number}: must be an object with a string "text"')
        yield row["text"]


def sentences(text: str) -> list[str]:
    """Split a text into sentences: at the end of a paragraph, and where a stop is followed by a capital."""
    found = []
    for paragraph in _PARAGRAPH.split(text.replace("\r\n", "\n")):
        line = " ".join(paragraph.split())
        found += [sentence for sentence in _cut(line) if sentence]
    return found


def _cut(line: str) -> Iterable[str]:
    start = 0
    for stop in _END.finditer(line):
        yield line[start : stop.end()].strip()
        start = stop.end()
    yield line[start:]
