"""Answers from passages, with citations that can be checked.

One function serves a collection, a single file and a turn of a conversation: they differ in what `search` looks into
and in the history. By default the answer is a span of the passages, found by span-constrained decoding, so that its
quote is verbatim by construction; free text is an option, and its quotes are looked up in the passages.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from l2m_rag import answerability
from l2m_rag.config import LONGEST_QUESTION
from l2m_rag.errors import UsageError
from l2m_rag.evidence import Closeness, evidence_features, rank_sentences, sentences
from l2m_rag.findings import HOPELESS, Finding, Reader, Speller, Teller, cut_question, findings, span_text, within
from l2m_rag.generate import milliseconds
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.spans import Span

_SYSTEM_FREE = (
    "You answer questions from the numbered passages only. Name the passages you used like [1]. "
    "Reply with 'I cannot answer' when they do not hold the answer."
)
_REFUSAL = re.compile(r"\b(?:cannot|can't|can not|unable to) answer\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


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
    enough: float = 0.7,
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
        free: answer in the model's own words instead of quoting: in a few, from the passage that most likely holds the
            answer, if the model has learnt that; else in a text that is written from all passages.
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
    teller = model if free and isinstance(model, Teller) and model.free else None
    if not read:
        draft = _Draft("", "none", 0.0, [], 0, 0, time.monotonic())
    elif isinstance(model, Reader) and (teller or not free):
        draft = _quote(asked, read, model, abstain_below, budget, focus, enough, closeness, teller)
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


def _quote(
    question: str,
    read: Sequence[Passage],
    reader: Reader,
    abstain_below: float,
    budget: int,
    focus: int,
    enough: float,
    closeness: Closeness | None,
    teller: Teller | None,
) -> _Draft:
    """Answer with the best span, or in words that rest on it, unless the passages are not likely to hold an answer."""
    tried: list[tuple[float, Finding]] = []
    sizes = {"budget": budget, "focus": focus}
    skip = HOPELESS if enough < 1 else 0.0  # 1 is to read all
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
    text = span_text(*equal[0])
    equal += [other.spans[0] for _, other in tried[1:] if span_text(*other.spans[0]) == text]
    once: dict[tuple[str, int], tuple[Span, Passage]] = {}  # though it was read by itself and with others
    for span, passage in equal:
        once.setdefault((passage.chunk.id, span.start), (span, passage))
    if probability < abstain_below:
        return replace(none, probability=probability, generated=equal[0][0].tokens)
    found, generated = list(once.values())[:3], equal[0][0].tokens
    draft = replace(none, text=text, kind="span", probability=probability, citations=_numbered(found))
    draft = replace(draft, generated=generated)
    return _tell(question, finding, found[0], draft, teller) if teller else draft


def _tell(question: str, finding: Finding, best: tuple[Span, Passage], quoted: _Draft, teller: Teller) -> _Draft:
    """Answer in a few words of the model's own from the passages of the best quote; with that where it has none."""
    read = finding.passages
    said = teller.tell(question, [passage.chunk.text for passage in reversed(read)])
    draft = replace(
        quoted,
        read=[*quoted.read, read],
        prompt=quoted.prompt + finding.quoted.prompt,
        positions=quoted.positions + finding.quoted.recalled,
        first=time.monotonic(),
    )
    if not said:
        return draft
    sentence = _sentence(*best)
    agrees = _words(said) & _words(span_text(*sentence))
    found = [sentence] if agrees else _support(said, read) or [sentence]
    generated = quoted.generated + teller.count(said)
    return replace(draft, text=said, kind="free", citations=_numbered(found), generated=generated)


def _sentence(span: Span, passage: Passage) -> tuple[Span, Passage]:
    """Give the sentence that a span stands in, or the span if it is longer."""
    inside = [place for place in sentences(passage.chunk.text) if place[0] <= span.start and span.end <= place[1]]
    low, high = inside[0] if inside else (span.start, span.end)
    return replace(span, start=low, end=high), passage


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
            quote=span_text(span, passage),
            score=round(passage.score, 4),
        )
        for number, (span, passage) in enumerate(found, 1)
    ]


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _support(text: str, read: Sequence[Passage]) -> list[tuple[Span, Passage]]:
    """Give, for free text, the sentence of each passage that shares most of its words; named passages ([n]) first."""
    words = _words(re.sub(r"\[\d+\]", " ", text))
    named = {int(number) - 1 for number in re.findall(r"\[(\d+)\]", text)}
    found: list[tuple[float, Span, Passage]] = []
    for number, passage in enumerate(read):
        best = max(
            (
                (
                    len(words & _words(passage.chunk.text[low:high])),
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
