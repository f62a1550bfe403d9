"""Answers from passages, with citations that can be checked.

One function serves a collection, a single file and a turn of a conversation: they differ in what `search` looks into
and in the history. By default the answer is a span of the passages, found by span-constrained decoding, so that its
quote is verbatim by construction; free text is an option, and its quotes are looked up in the passages.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, runtime_checkable

from l2m_rag import answerability
from l2m_rag.config import LONGEST_QUESTION
from l2m_rag.errors import UsageError
from l2m_rag.evidence import (
    Closeness,
    Sentence,
    evidence_features,
    prior_features,
    rank_sentences,
    sentences,
)
from l2m_rag.generate import milliseconds
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.spans import Quoted, Span

_QUESTION_SHARE = 4  # a question takes at most one in four of the positions
_SYSTEM_FREE = (
    "You answer questions from the numbered passages only. Name the passages you used like [1]. "
    "Reply with 'I cannot answer' when they do not hold the answer."
)
_REFUSAL = re.compile(r"\b(?:cannot|can't|can not|unable to) answer\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")
_HOPELESS = 0.03  # probability of holding the answer below which a passage is not worth reading
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


@dataclass(frozen=True, slots=True)
class Citation:
    """Where an answer stands.

    Args:
        n: number of the citation, from 1.
        document: id of the document.
        page: page, from 1, or None.
        start: character offset in the document's text.
        end: offset just behind it; `document_text[start:end] == quote`.
        quote: the characters themselves.
        score: of the passage that it was read from.
    """

    n: int
    document: str
    page: int | None
    start: int
    end: int
    quote: str
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with what it rests on; the fields are those of `l2m ask --json`.

    Args:
        question: as it was asked.
        answer: the answer, "" when abstained.
        answer_type: "span", "free", or "none" when abstained.
        abstained: no answer was given.
        answerable_probability: that the passages hold an answer, in [0, 1].
        citations: where the answer stands.
        steps: what was retrieved and read.
        timings: retrieve_ms, first_token_ms, total_ms.
        tokens: prompt, generated, positions (of evidence).
    """

    question: str
    answer: str
    answer_type: str
    abstained: bool
    answerable_probability: float
    citations: list[Citation] = field(default_factory=list)
    steps: list[dict[str, object]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Give the answer as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Draft:
    text: str
    kind: str
    probability: float
    citations: list[Citation]
    prompt: int
    generated: int
    first: float  # on the monotonic clock
    read: Sequence[Sequence[Passage]] = ()  # at each step
    positions: int = 0  # that they took
    ratio: int = 1  # tokens that each stands for


def answer(
    question: str,
    search: Callable[[str, int], list[Passage]],
    model: Speller | Reader,
    *,
    passages: int = 8,
    budget: int = 768,
    focus: int = 3,
    enough: float = 0.8,
    closeness: Closeness | None = None,
    abstain_below: float = 0.5,
    free: bool = False,
    history: Sequence[tuple[str, str]] = (),
    on_text: Callable[[str], object] | None = None,
) -> Answer:
    """Answer a question from what a search finds.

    Args:
        question: at most `LONGEST_QUESTION` characters, with at least one letter or digit.
        search: gives the k best passages for a text.
        model: a decoder, or an endpoint that can only write freely.
        passages: passages looked at.
        budget: positions (tokens of the model) of evidence that are read, best passages first.
        focus: sentences of those passages that an answer is quoted from, those that fit the question best.
        enough: probability that the passage just read holds the answer, from which on a reader of whole passages
            reads no more; 1 reads all that fit the budget.
        closeness: compares the question with sentences; without it only their words are compared.
        abstain_below: no answer is given when the probability that there is one lies below.
        free: write freely instead of quoting.
        history: (question, answer) of the turns before, oldest first; the last one helps the search.
        on_text: called with each piece of the answer as soon as it is certain.

    Raises:
        UsageError: the question cannot be asked.
    """
    began = time.monotonic()
    check_question(question)
    say = on_text or (lambda text: None)
    hits = search(f"{history[-1][0]} {question}" if history else question, passages)
    retrieved = milliseconds(began)
    asked = cut_question(question, model, budget)
    read, positions = within(hits, model, budget)
    if not read:
        draft = _Draft("", "none", 0.0, [], 0, 0, time.monotonic())
    elif isinstance(model, Reader) and not free:
        draft = _quote(asked, read, model, abstain_below, budget, focus, enough, closeness)
        say(draft.text)
    else:
        draft = _write(asked, read, model, history, closeness, abstain_below, say)
    return Answer(
        question=question,
        answer=draft.text,
        answer_type=draft.kind,
        abstained=draft.kind == "none",
        answerable_probability=round(draft.probability, 4),
        citations=draft.citations,
        steps=_steps(hits, draft.read or [read], draft.ratio),
        timings={
            "retrieve_ms": retrieved,
            "first_token_ms": round((draft.first - began) * 1000, 1),
            "total_ms": milliseconds(began),
        },
        tokens={"prompt": draft.prompt, "generated": draft.generated, "positions": draft.positions or positions},
    )


def _steps(hits: Sequence[Passage], read: Sequence[Sequence[Passage]], ratio: int) -> list[dict[str, object]]:
    """Give the trace of an answer: what was found at first, and what was read at each step."""
    return [
        {
            "step": number,
            "retrieve": not number,
            "tier": "long-term",
            "query_top": [] if number else [hit.chunk.id for hit in hits],
            "read": [{"chunk_id": one.chunk.id, "resolution": f"{ratio}:1"} for one in passages],
            "evicted": [],
            "stop": number == len(read) - 1,
        }
        for number, passages in enumerate(read)
    ]


def abstention(answer: Answer) -> str:
    """Say in words that there is no answer."""
    percent = round(100 * answer.answerable_probability)
    return f"The documents do not answer this (probability that they do: {percent} %)."


def check_question(question: str) -> None:
    """Refuse what cannot be a question.

    Raises:
        UsageError: it is empty, has no letter or digit, or is longer than `LONGEST_QUESTION`.
    """
    if len(question) > LONGEST_QUESTION:
        raise UsageError(f"the question has {len(question):,} characters; at most {LONGEST_QUESTION:,} can be asked")
    if not any(letter.isalnum() for letter in question):
        raise UsageError("the question needs at least one letter or digit")


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
    skip: float = _HOPELESS,
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
        return {(passage.chunk.id, _text(span, passage)): span.score for one in found for span, passage in one.spans}

    together, alone = said([joint]), said(tried)
    inside = {passage.chunk.id for passage in joint.passages}
    spans: dict[tuple[str, int, int], tuple[Span, Passage]] = {}
    for span, passage in (entry for one in [joint, *tried] for entry in one.spans if entry[1].chunk.id in inside):
        key = passage.chunk.id, _text(span, passage)
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


def _quote(
    question: str,
    read: Sequence[Passage],
    reader: Reader,
    abstain_below: float,
    budget: int,
    focus: int,
    enough: float,
    closeness: Closeness | None,
) -> _Draft:
    """Answer with the best span, unless the passages are not likely to hold an answer."""
    tried: list[tuple[float, Finding]] = []
    sizes = {"budget": budget, "focus": focus}
    skip = _HOPELESS if enough < 1 else 0.0  # 1 is to read all
    for finding in findings(question, read, reader, **sizes, closeness=closeness, skip=skip):
        probability = answerability.probability(reader.answerability, finding.features)
        if len(finding.passages) > 1:  # has seen what the others have
            probability = max([probability, *(known for known, _ in tried)])
        tried.append((probability, finding))
        if probability >= enough:
            break
    steps = [finding.passages for _, finding in tried]
    prompt = sum(finding.quoted.prompt for _, finding in tried)
    positions = sum(finding.quoted.recalled for _, finding in tried)
    ratio = max((finding.quoted.ratio for _, finding in tried), default=1)
    spoken = (entry for entry in tried if entry[1].spans)
    tried = sorted(spoken, key=lambda entry: (-entry[0], -len(entry[1].passages)))
    none = _Draft("", "none", 0.0, [], prompt, 0, time.monotonic(), steps, positions, ratio)
    if not tried:
        return none
    probability, finding = tried[0]
    top = finding.spans[0][0].score
    # the same words at several places: the passage that the search likes best is cited first
    equal = sorted((entry for entry in finding.spans if entry[0].score == top), key=lambda entry: -entry[1].score)
    text = _text(*equal[0])
    equal += [other.spans[0] for _, other in tried[1:] if _text(*other.spans[0]) == text]
    once: dict[tuple[str, int], tuple[Span, Passage]] = {}  # though it was read by itself and with others
    for span, passage in equal:
        once.setdefault((passage.chunk.id, span.start), (span, passage))
    if probability < abstain_below:
        return replace(none, probability=probability, generated=equal[0][0].tokens)
    cited, generated = _numbered(list(once.values())[:3]), equal[0][0].tokens
    return replace(none, text=text, kind="span", probability=probability, citations=cited, generated=generated)


def _write(
    question: str,
    read: Sequence[Passage],
    model: Speller,
    history: Sequence[tuple[str, str]],
    closeness: Closeness | None,
    abstain_below: float,
    say: Callable[[str], object],
) -> _Draft:
    """Answer in the model's own words, and look up what it rests on."""
    evidence = "\n\n".join(f"[{number}] {passage.chunk.text}" for number, passage in enumerate(read, 1))
    turns = "".join(f"Earlier question: {asked}\nEarlier answer: {told}\n\n" for asked, told in history[-3:])
    user = f"{evidence}\n\n{turns}Question: {question}"
    pieces: list[str] = []
    first = 0.0
    for piece in model.reply(_SYSTEM_FREE, user, most=256):
        first = first or time.monotonic()
        pieces.append(piece)
        say(piece)
    text = "".join(pieces).strip()
    spans = _support(text, read)
    found = bool(text) and not _REFUSAL.search(text) and bool(spans)
    ranked = rank_sentences(question, read, closeness)
    probability = answerability.probability(answerability.untrained(), evidence_features(read, ranked, None))
    kind = "free" if found and probability >= abstain_below else "none"
    return _Draft(
        text if kind == "free" else "",
        kind,
        probability if found else min(probability, 0.5),
        _numbered(spans) if kind == "free" else [],
        model.count(_SYSTEM_FREE) + model.count(user),
        model.count(text),
        first or time.monotonic(),
    )


def _numbered(found: Sequence[tuple[Span, Passage]]) -> list[Citation]:
    return [
        Citation(
            n=number,
            document=passage.chunk.document,
            page=passage.chunk.page,
            start=passage.chunk.start + span.start,
            end=passage.chunk.start + span.end,
            quote=_text(span, passage),
            score=round(passage.score, 4),
        )
        for number, (span, passage) in enumerate(found, 1)
    ]


def _text(span: Span, passage: Passage) -> str:
    return passage.chunk.text[span.start : span.end]


def _support(text: str, read: Sequence[Passage]) -> list[tuple[Span, Passage]]:
    """Give, for free text, the sentence of each passage that shares most of its words; named passages ([n]) first."""
    words = {word.lower() for word in _WORD.findall(re.sub(r"\[\d+\]", " ", text))}
    named = {int(number) - 1 for number in re.findall(r"\[(\d+)\]", text)}
    found: list[tuple[float, Span, Passage]] = []
    for number, passage in enumerate(read):
        best = max(
            (
                (
                    len(words & {word.lower() for word in _WORD.findall(passage.chunk.text[low:high])}),
                    low,
                    high,
                )
                for low, high in sentences(passage.chunk.text)
            ),
            key=lambda entry: (entry[0], entry[1] - entry[2]),
        )
        share = best[0] / max(len(words), 1)
        if share >= (0.2 if number in named else 0.5):
            found.append((share + (number in named), Span(number, best[1], best[2], math.log(share), 0), passage))
    found.sort(key=lambda entry: -entry[0])
    return [(span, passage) for _, span, passage in found[:3]]
