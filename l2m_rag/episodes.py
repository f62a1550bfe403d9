"""Batches to train on: texts in segments with a question each, made fresh from a seed and a step.

The same seed and step always give the same batch, so that a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from l2m_rag.errors import ConfigError
from l2m_rag.losses import IGNORED, Episode
from l2m_rag.probes import NAMES, associative_recall, noise_sentences, vocabulary
from l2m_rag.reading_data import SOURCES
from l2m_rag.stories import Hidden, Story, hide, stories

Make = Callable[[int, int], Episode]
"""Called with (step, number of segments); gives a batch."""

KINDS = ("associative_recall", "stories", "needle", "books", "reading")
_MARKER = "\nAnswer:"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecipe:
    """What is trained on.

    Args:
        kind: "associative_recall" (token ids, no tokenizer), "stories" (simulated worlds), "needle" (a pass key among
            the sentences of books), "books" (going on) or "reading" (questions about passages, `l2m_rag.reading`).
        pairs: of a text; associative recall.
        keys: different keys; associative recall.
        values: different values; associative recall.
        stories: their kinds, drawn in turn.
        facts: fewest and most sentences of a story.
        renamed: share of stories in other words.
        noise: folder of books; stories and needles are hidden in their sentences, and "books" reads them.
        decoys: sentences about others that a story or a needle has hidden beside it, at most.
        data: folder of the question sets; reading.
        sources: names of those that are read, of `reading_data.SOURCES`.
        shares: share of the passages of each source that one epoch takes, as many as there are sources; () for all.
        clozes: passages that cloze questions are made of.
        row: most tokens of passages and all their questions together; reading.
        unanswerable: about how many questions for each with an answer are asked where there is none; reading.
        twisted: also ask questions that were changed so that their own passage does not answer them, and passages of
            which the evidence was taken out (`l2m_rag.unanswerable`); reading.
        asks: learn to write questions instead (`l2m_rag.asking`); reading.
        asker: folder of a checkpoint that learnt it; its questions are learnt from, beside the sources.
        written: passages that it writes questions to.
        together: most passages of a row; the reader that answers by default reads one at a time.
        freely: share of the questions whose answer stands in the passage that are asked for the reader's own words;
            reading.
        again: put each question twice; reading.
        ratios: at which passages are read, one drawn for each batch; reading.
        rebuild: share of steps in which passages, of `noise` where it is named, are written back from pooled states.
        cached: most bytes of lower states that are kept between batches; reading on a CPU.
    """

    kind: Literal["associative_recall", "stories", "needle", "books", "reading"] = "associative_recall"
    pairs: int = 8
    keys: int = 32
    values: int = 32
    stories: tuple[str, ...] = ("qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10")
    facts: tuple[int, int] = (2, 20)
    renamed: float = 0.5
    noise: str = ""
    decoys: int = 0
    data: str = ""
    sources: tuple[str, ...] = SOURCES
    shares: tuple[float, ...] = ()
    clozes: int = 3000
    row: int = 768
    unanswerable: float = 0.25
    twisted: bool = False
    asks: bool = False
    asker: str = ""
    written: int = 4000
    together: int = 4
    freely: float = 0.0
    again: bool = False
    ratios: tuple[int, ...] = (1,)
    rebuild: float = 0.0
    cached: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"task.kind ({self.kind}) must be one of {', '.join(KINDS)}")
        if self.kind in ("needle", "books") and not self.noise:
            raise ConfigError(f"task.noise must name a folder of books for task.kind {self.kind}")
        if self.kind == "reading" and not self.data:
            raise ConfigError("task.data must name the folder of the question sets for task.kind reading")
        if not 0 <= self.freely <= 1:
            raise ConfigError(f"task.freely ({self.freely}) must be a share between 0 and 1")
        if self.shares and len(self.shares) != len(self.sources):
            raise ConfigError(f"task.shares ({list(self.shares)}) must hold one share for each of task.sources")
        if not 0 <= self.renamed <= 1:
            raise ConfigError(f"task.renamed ({self.renamed}) must be a share between 0 and 1")


@dataclass(frozen=True, slots=True)
class Batches:
    """Makes batches of one task.

    Args:
        task: which.
        batch: texts in one.
        segment_length: T.
        seed: of all of them.
        tokenizer: of the backbone; not needed for associative recall.
    """

    task: TaskRecipe
    batch: int
    segment_length: int
    seed: int
    tokenizer: Any = None
    _sentences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.task.kind != "associative_recall" and self.tokenizer is None:
            raise ConfigError(f"task.kind {self.task.kind} needs a backbone with a tokenizer")
        if self.task.noise:
            self._sentences.extend(noise_sentences(Path(self.task.noise), at_least=10, count=_words))

    def __call__(self, step: int, segments: int) -> Episode:
        """Give the batch of a step, with texts of so many segments (of stories without noise: at most)."""
        if self.task.kind == "associative_recall":
            return self._recall(step, segments)
        draw = random.Random(f"{self.seed} {step}")
        makes = {"stories": self._story, "needle": self._needle, "books": self._passage}[self.task.kind]
        return self.pack([makes(draw, segments) for _ in range(self.batch)])

    @property
    def vocab_size(self) -> int:
        """Token ids that associative recall takes."""
        return vocabulary(self.task.keys, self.task.values)

    def _recall(self, step: int, segments: int) -> Episode:
        task, T = self.task, self.segment_length
        made = associative_recall(
            np.random.default_rng([self.seed, step]),
            batch=self.batch,
            segments=segments,
            pairs=min(task.pairs, segments * (T // 2)),
            keys=task.keys,
            values=task.values,
            segment_length=T,
        )
        tokens, question = torch.from_numpy(made.tokens), torch.from_numpy(made.question)
        B = len(tokens)
        return Episode(
            tokens,
            torch.full((B, segments), T),
            question,
            torch.full((B,), question.shape[1]),
            question[:, 1:],  # the key again: what follows it is the answer
            torch.from_numpy(made.answer)[:, None],
            torch.from_numpy(made.gold)[:, None] * T,
        )

    def _story(self, draw: random.Random, segments: int) -> Hidden:
        task = self.task
        kind, renamed = draw.choice(task.stories), draw.random() < task.renamed
        story = next(islice(stories(kind, seed=draw.getrandbits(40), facts=task.facts, renamed=renamed), 1))
        return as_hidden(story) if not self._sentences else self._hidden(story, draw, segments)

    def _hidden(self, story: Story, draw: random.Random, segments: int) -> Hidden:
        return hide(
            story,
            self._sentences,
            draw,
            length=int(0.9 * segments * self.segment_length),
            count=lambda text: len(self._ids(text)),
            decoys=draw.randint(0, self.task.decoys),
        )

    def _needle(self, draw: random.Random, segments: int) -> Hidden:
        """Hide a pass key in consecutive sentences of a book, and those of other names beside it."""
        names = draw.sample(NAMES, 1 + draw.randint(0, self.task.decoys))
        keys = [f"{draw.randrange(10_000, 100_000)}" for _ in names]
        at, size = draw.randrange(len(self._sentences) - 1000), 0
        text: list[str] = []
        while size < int(0.8 * segments * self.segment_length):
            text.append(self._sentences[at + len(text)])
            size += len(self._ids(text[-1]))
        told = [f"The pass key of {name} is {key}." for name, key in zip(names, keys, strict=True)]
        for sentence in told[1:] + told[:1]:
            text.insert(draw.randint(0, len(text)), sentence)
        return Hidden(tuple(text), f"What is the pass key of {names[0]}?", keys[0], (text.index(told[0]),), "needle")

    def _passage(self, draw: random.Random, segments: int) -> Hidden:
        """Take sentences of a book as they follow each other, the last of which is to be written."""
        taken: list[str] = []
        at, size = draw.randrange(len(self._sentences) - 1000), 0
        while size < segments * self.segment_length:
            taken.append(self._sentences[at + len(taken)])
            size += len(self._ids(taken[-1]))
        *text, question, answer = taken
        return Hidden(tuple(text), question, answer, (), "books")

    def pack(self, made: Sequence[Hidden]) -> Episode:
        """Lay texts out in segments; a sentence is not cut unless it is longer than a segment."""
        T = self.segment_length
        rows, gold = [], []
        for one in made:
            segments: list[list[int]] = [[]]
            starts, position = [], 0
            for sentence in one.sentences:
                ids = self._ids(" " + sentence)[:T]
                if len(segments[-1]) + len(ids) > T:
                    segments.append([])
                segments[-1] += ids
                starts.append(position)
                position += len(ids)
            rows.append(segments)
            gold.append([starts[number] for number in one.support])
        marker = self._ids(_MARKER)
        asked = [self._ids("\nQuestion: " + one.question)[:T] for one in made]
        answers = [[*self._ids(" " + one.answer)[: T - len(marker)], self._end()] for one in made]
        most = max(map(len, rows))
        tokens = _padded([segment for row in rows for segment in [*row, *[[]] * (most - len(row))]], 0, T)
        real = [[*map(len, row), *[0] * (most - len(row))] for row in rows]
        fed = [marker + answer[:-1] for answer in answers]
        told = [[IGNORED] * (len(marker) - 1) + answer for answer in answers]
        return Episode(
            tokens.view(len(made), most, T),
            torch.tensor(real),
            _padded(asked, 0),
            torch.tensor(list(map(len, asked))),
            _padded(fed, 0),
            _padded(told, IGNORED),
            _padded([found or [-1] for found in gold], -1),
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)


def as_hidden(story: Story) -> Hidden:
    """Give a story without noise."""
    return Hidden(story.sentences, story.question, story.answer, story.support, story.task)


def _words(text: str) -> int:
    return len(text.split())


def _padded(rows: Sequence[Sequence[int]], filler: int, width: int = 0) -> torch.Tensor:
    width = max(width, *map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
