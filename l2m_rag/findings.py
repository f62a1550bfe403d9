"""What a reader finds in passages, step by step: by themselves, and together where none is enough.

`findings` is what answers rest on (`l2m_rag.qa`), what the probability of an answer is fitted on and measured by
(`l2m_rag.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from l2m_rag import answerability
from l2m_rag.evidence import Closeness, Sentence, evidence_features, prior_features, rank_sentences
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.spans import Quoted, Span

HOPELESS = 0.03
"""Probability of holding the answer below which a passage is not worth reading."""
_QUESTION_SHARE = 4  # a question takes at most one in four of the positions
_ALONE = 0.3  # of the surest passage, below which passages are read together
_OWN = 2.0  # weight of what a passage says by itself beside what is said of it among others
_UNSAID = -12.0  # log-probability of a span that is not among the best ones of a reading


class Speller(Protocol):
    """What an answer needs of any language model: to count, to cut, and to write."""

    @property
    def name(self) -> str:
        """How the model is called."""
        ...

    def count(self, text: str) -> int:
        """Give the number of tokens of a text."""
        ...

    def cut(self, text: str, tokens: int) -> str:
        """Give the beginning of a text that has at most `tokens` tokens."""
        ...

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        """Write a reply of at most `most` tokens, piece by piece."""
        ...


@runtime_checkable
class Reader(Speller, Protocol):
    """A language model that can be held to spans of the passages."""

    @property
    def whole(self) -> bool:
        """Whether it reads passages whole, each by itself; else the sentences of all that fit the question best."""
        ...

    @property
    def together(self) -> int:
        """How many passages it reads together when none was enough by itself; 1 where it has not learnt to."""
        ...

    @property
    def answerability(self) -> dict[str, float]:
        """Weights of the probability that there is an answer."""
        ...

    @property
    def prior(self) -> dict[str, float]:
        """Weights of the same before a passage is read; used when passages are read whole."""
        ...

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        """Find the spans of some texts that most likely answer a question, best first."""
        ...


@runtime_checkable
class Teller(Reader, Protocol):
    """A reader that can also answer in its own words."""

    @property
    def free(self) -> bool:
        """Whether it has learnt to."""
        ...

    def tell(self, question: str, passages: Sequence[str]) -> str:
        """Answer a question from some texts in a few words of its own; "" where it finds that they do not."""
        ...


def cut_question(question: str, model: Speller, budget: int) -> str:
    """Give the beginning of a question that takes at most its share of the positions."""
    return model.cut(question, budget // _QUESTION_SHARE)


def within(hits: Sequence[Passage], model: Speller, budget: int) -> tuple[list[Passage], int]:
    """Give the best passages that fit the budget whole (the first one in any case, cut later), and their positions."""
    read: list[Passage] = []
    positions = 0
    for hit in hits:
        cost = model.count(hit.chunk.text)
        if read and positions + cost > budget:
            continue
        read.append(hit)
        positions += min(cost, budget)
    return read, positions


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reader found in passages that it read together.

    Args:
        passages: that were read.
        spans: the best ones, best first, each with its passage; offsets are those in it.
        quoted: all that the reader said.
        features: of the probability that the passages hold an answer.
        prior: the same before they were read.
    """

    passages: Sequence[Passage]
    spans: list[tuple[Span, Passage]]
    quoted: Quoted
    features: dict[str, float]
    prior: dict[str, float]


def findings(
    question: str,
    read: Sequence[Passage],
    reader: Reader,
    *,
    budget: int,
    focus: int,
    closeness: Closeness | None,
    skip: float = HOPELESS,
    alone: float = _ALONE,
) -> Iterator[Finding]:
    """Read passages, and give what was found after each step.

    A reader of whole passages reads each by itself, in the order of the search (docs/decisions/0009-one-by-one.md). One
    that is not likely to hold the answer is skipped. If it is sure of none and has learnt to, it then reads the first
    passage and those that most likely hold the answer together, as one may say who is meant and another what is asked
    (docs/decisions/0018-wider.md). Any other model reads the best sentences of all of them at once, worst first, so
    that the best stands by the question.

    Args:
        question: to be asked.
        read: passages, best first; at least one.
        reader: reads.
        budget: a passage is cut to so many tokens, and no more are read together.
        focus: sentences that are read at once.
        closeness: compares the question with sentences.
        skip: probability of holding the answer, by the search alone, below which a passage but the first is not read.
        alone: probability of the surest passage from which on none are read together.
    """
    if not reader.whole:
        ranked = rank_sentences(question, read, closeness)
        places = [(sentence.passage, sentence.start, sentence.end) for sentence in ranked[:focus]]
        if places:
            yield _found(question, read, ranked, places[::-1], reader, prior_features(read[0], read[0].score))
        return
    tried: list[Finding] = []
    for number, passage in enumerate(read):
        prior = prior_features(passage, read[0].score)
        if number and answerability.probability(reader.prior, prior) < skip:
            continue
        whole = len(reader.cut(passage.chunk.text, budget))
        if passage.chunk.text[:whole].strip():
            ranked = rank_sentences(question, [passage], None)
            tried.append(_found(question, [passage], ranked, [(0, 0, whole)], reader, prior))
            yield tried[-1]
    both = _together(tried, reader, budget, alone)
    if len(both) > 1:
        places = [(number, 0, len(passage.chunk.text)) for number, passage in enumerate(both)]
        ranked, prior = rank_sentences(question, both, None), prior_features(both[0], read[0].score)
        yield _agreed(_found(question, both, ranked, places[::-1], reader, prior), tried)


def _together(tried: Sequence[Finding], reader: Reader, budget: int, alone: float) -> list[Passage]:
    """Give the passages that are worth reading together: the first, and those that most likely hold the answer."""
    if reader.together == 1:
        return []
    likely = [answerability.probability(reader.answerability, found.features) for found in tried]
    if max(likely, default=1.0) >= alone:
        return []
    order = [0, *sorted(range(1, len(tried)), key=lambda number: -likely[number])]
    return within([tried[number].passages[0] for number in order], reader, budget)[0][: reader.together]


def _agreed(joint: Finding, tried: Sequence[Finding]) -> Finding:
    """Give what was found in passages together, each span weighed by what its passage said of it by itself, too.

    The score is a weighted sum of both log-probabilities, a product of experts (Hinton, 2002, equation 1).
    """

    def said(found: Sequence[Finding]) -> dict[tuple[str, str], float]:
        return {
            (passage.chunk.id, span_text(span, passage)): span.score for one in found for span, passage in one.spans
        }

    together, alone = said([joint]), said(tried)
    inside = {passage.chunk.id for passage in joint.passages}
    spans: dict[tuple[str, int, int], tuple[Span, Passage]] = {}
    for span, passage in (entry for one in [joint, *tried] for entry in one.spans if entry[1].chunk.id in inside):
        key = passage.chunk.id, span_text(span, passage)
        score = max(together.get(key, _UNSAID), _UNSAID) + _OWN * max(alone.get(key, _UNSAID), _UNSAID)
        spans.setdefault((passage.chunk.id, span.start, span.end), (replace(span, score=score), passage))
    return replace(joint, spans=sorted(spans.values(), key=lambda entry: -entry[0].score))


def _found(
    question: str,
    read: Sequence[Passage],
    ranked: Sequence[Sentence],
    places: Sequence[tuple[int, int, int]],
    reader: Reader,
    prior: dict[str, float],
) -> Finding:
    """Read (number of the passage, start, end) of some places, in their order."""
    quoted = reader.quote(question, [read[number].chunk.text[low:high] for number, low, high in places])
    spans = []
    for span in quoted.spans:
        number, shift, _ = places[span.passage]
        moved = replace(span, passage=number, start=span.start + shift, end=span.end + shift)
        spans.append((moved, read[number]))
    features = evidence_features(read, ranked, quoted)
    if reader.whole:
        features = {**prior, **features, "together": float(len(read) > 1)}
    return Finding(read, spans, quoted, features, prior)


def span_text(span: Span, passage: Passage) -> str:
    """Give the words of a span."""
    return passage.chunk.text[span.start : span.end]
