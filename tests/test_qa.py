"""Answers: quotes are verbatim at their offsets, the budget holds, abstention is a choice with a probability."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_rag import answerability, evidence, qa
from l2m_rag.config import LONGEST_QUESTION
from l2m_rag.errors import UsageError
from l2m_rag.indexers.chunking import split
from l2m_rag.memory_tiers.records import Chunk, Parsed, Passage
from l2m_rag.spans import Quoted, Span


class Words:
    """A model whose tokens are words, that quotes the first words of the passage it is told to."""

    name = "words"

    def __init__(
        self, reply: str = "", spans: list[Span] | None = None, *, whole: bool = False, together: int = 1
    ) -> None:
        self.text = reply
        self.reads_whole, self.reads_together = whole, together
        self.found = spans
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        self.prompts.append(user)
        yield from (word + " " for word in self.text.split())

    @property
    def whole(self) -> bool:
        return self.reads_whole

    @property
    def together(self) -> int:
        return self.reads_together

    @property
    def answerability(self) -> dict[str, float]:
        return answerability.untrained()

    @property
    def prior(self) -> dict[str, float]:
        return {"bias": 1.0, "behind": -10.0}

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        self.prompts.append("\n\n".join(passages) + f"\n\nQuestion: {question}")
        found = self.found
        if found is None:
            number = max(range(len(passages)), key=lambda n: len(passages[n]))
            text = passages[number]
            found = [Span(number, 0, len(text), -1.0, 3), Span(number, 0, max(1, len(text) // 2), -2.0, 2)]
        return Quoted(found, None, self.count(self.prompts[-1]))


class Writer:
    """A model that can only write."""

    def __init__(self, model: Words) -> None:
        self.name, self.count, self.cut, self.reply = model.name, model.count, model.cut, model.reply


def passage(
    text: str, *, document: str = "d.txt", start: int = 0, score: float = 1.0, page: int | None = None
) -> Passage:
    chunk = Chunk(f"{document}:{start}", document, 0, page, "", start, start + len(text), text)
    return Passage(chunk, score, dense=0.7, lexical=3.0)


class NeverFit(Words):
    """Words, but every passage fills the whole budget."""

    def count(self, text: str) -> int:
        return 10_000


class Spaces:
    """Tokens are stretches without spaces."""

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        result = []
        for text in texts:
            spans, start = [], None
            for at, letter in enumerate(text + " "):
                if letter.isspace() and start is not None:
                    spans.append((start, at))
                    start = None
                elif not letter.isspace() and start is None:
                    start = at
            result.append(spans)
        return result


@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n.é́👩‍👧")), max_size=300),
    question=st.text(min_size=1, max_size=20).filter(lambda q: any(c.isalnum() for c in q)),
)
@settings(max_examples=60, deadline=None)
def test_quotes_are_verbatim_at_their_offsets(text: str, question: str) -> None:
    question = question.encode("utf-8", "replace").decode()
    chunks = list(split(Parsed(text, "text/plain"), "d", Spaces(), size=8, overlap=2))
    hits = [Passage(chunk, 1.0 / (n + 1)) for n, chunk in enumerate(chunks)]
    answer = qa.answer(question, lambda _, k: hits[:k], Words(), abstain_below=0.0)
    assert bool(answer.citations) == bool(chunks)
    for citation in answer.citations:
        assert text[citation.start : citation.end] == citation.quote
    if answer.citations:
        assert answer.answer == answer.citations[0].quote


def test_the_answer_is_the_best_span_with_page_and_place() -> None:
    read = [passage("The rent is 900 euros.", document="lease.pdf", start=500, page=4)]
    answer = qa.answer(
        "What is the rent?", lambda _, k: read, Words(spans=[Span(0, 12, 21, -0.5, 2)]), abstain_below=0.0
    )
    assert (answer.answer, answer.answer_type, answer.abstained) == ("900 euros", "span", False)
    citation = answer.citations[0]
    assert (citation.document, citation.page, citation.start, citation.end) == ("lease.pdf", 4, 512, 521)
    assert answer.steps[0]["read"] == [{"chunk_id": "lease.pdf:500", "resolution": "1:1"}]


def test_of_equal_words_the_passage_that_the_search_likes_best_is_cited_first() -> None:
    good, poor = passage("in Oslo", document="a"), passage("in Oslo", document="b", score=0.2)
    spans = [Span(0, 3, 7, -0.5, 1), Span(1, 3, 7, -0.5, 1)]
    answer = qa.answer("Where?", lambda _, k: [good, poor], Words(spans=spans), abstain_below=0.0)
    assert [citation.document for citation in answer.citations] == ["a", "b"]
    assert [citation.n for citation in answer.citations] == [1, 2]


def test_below_the_threshold_nothing_is_answered() -> None:
    read = [passage("The rent is 900 euros.")]
    answer = qa.answer("Who is the king?", lambda _, k: read, Words(), abstain_below=1.01)
    assert (answer.answer, answer.answer_type, answer.abstained, answer.citations) == ("", "none", True, [])
    assert 0 <= answer.answerable_probability <= 1


def test_no_passage_means_no_answer_and_probability_zero() -> None:
    answer = qa.answer("Who?", lambda _, k: [], Words(), abstain_below=0.0)
    assert answer.abstained
    assert answer.answerable_probability == 0.0


def test_the_budget_holds_and_the_best_passage_is_always_read() -> None:
    hits = [
        passage("a " * 60, document="1"),
        passage("b " * 60, document="2"),
        passage("c " * 30, document="3"),
    ]
    answer = qa.answer("Who?", lambda _, k: hits, Words(), budget=100, abstain_below=0.0)
    assert answer.tokens["positions"] == 90  # the second does not fit, the third does
    read = answer.steps[0]["read"]
    assert isinstance(read, list)
    assert [entry["chunk_id"] for entry in read] == ["1:0", "3:0"]
    assert len(qa.answer("Who?", lambda _, k: hits, NeverFit(), abstain_below=0.0).steps[0]["read"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ["", "   ", "?!...", "\n", "x" * (LONGEST_QUESTION + 1)])
def test_what_is_no_question_is_refused(question: str) -> None:
    with pytest.raises(UsageError, match="question"):
        qa.answer(question, lambda _, k: [], Words())


def test_a_long_question_is_cut_to_its_share_of_the_budget() -> None:
    model = Words()
    qa.answer("why " * 20_000, lambda _, k: [passage("because")], model, budget=100, abstain_below=0.0)
    assert model.count(model.prompts[0]) < 60


def test_free_text_cites_the_sentences_it_shares_words_with() -> None:
    read = [
        passage("Cats sleep. The lease ends on 31 May 2027. Dogs bark."),
        passage("Nothing here.", document="e"),
    ]
    pieces: list[str] = []
    answer = qa.answer(
        "When does the lease end?",
        lambda _, k: read,
        Writer(Words("The lease ends on 31 May 2027 [1]")),
        abstain_below=0.0,
        on_text=pieces.append,
    )
    assert answer.answer_type == "free"
    assert "".join(pieces).strip() == answer.answer
    assert [citation.quote for citation in answer.citations] == ["The lease ends on 31 May 2027."]


@pytest.mark.parametrize("reply", ["I cannot answer that.", "", "Purple monkeys dance wildly tonight"])
def test_free_text_without_support_is_an_abstention(reply: str) -> None:
    answer = qa.answer("Who?", lambda _, k: [passage("The rent is 900.")], Writer(Words(reply)), abstain_below=0.0)
    assert answer.abstained
    assert answer.answer == ""
    assert answer.citations == []


class Telling(Words):
    """Words, that also answers in words of its own."""

    free = True

    def tell(self, question: str, passages: Sequence[str]) -> str:
        self.prompts.append(" ".join(passages))
        return self.text


@pytest.mark.parametrize(
    ("told", "quote"),
    [
        ("Yes", "Dogs bark at night."),  # where the span stands
        ("In the night", "Dogs bark at night."),
        ("They sleep all day", "Cats sleep all day."),  # what was said stands elsewhere
    ],
)
def test_a_reader_that_has_learnt_it_answers_in_its_own_words(told: str, quote: str) -> None:
    text = "Cats sleep all day. Dogs bark at night."
    span = Span(0, text.index("night"), text.index("night") + 5, -0.1, 1)
    pieces: list[str] = []
    model = Telling(told, [span], whole=True)
    answer = qa.answer(
        "Do they?", lambda _, k: [passage(text)], model, abstain_below=0.0, free=True, on_text=pieces.append
    )
    assert (answer.answer_type, answer.answer, pieces) == ("free", told, [told])
    assert [citation.quote for citation in answer.citations] == [quote]
    assert model.prompts[-1] == text


def test_own_words_fall_back_to_the_quote_and_to_abstaining() -> None:
    text = "Dogs bark at night."
    asked = {"free": True, "abstain_below": 0.0}
    found = qa.answer("When?", lambda _, k: [passage(text)], Telling("", [Span(0, 5, 9, -0.1, 1)]), **asked)  # type: ignore[arg-type]
    assert (found.answer_type, found.answer) == ("span", "bark")
    model = Telling("Yes", [Span(0, 5, 9, -0.1, 1)])
    none = qa.answer("When?", lambda _, k: [passage(text)], model, free=True, abstain_below=1.0)
    assert none.abstained
    assert none.answer == ""
    assert len(model.prompts) == 1  # nothing is written that will not be given


def test_the_turn_before_helps_the_search() -> None:
    asked: list[str] = []

    def search(text: str, k: int) -> list[Passage]:
        asked.append(text)
        return []

    qa.answer("And when does it end?", search, Words(), history=[("Where is the flat?", "Oslo")])
    assert asked == ["Where is the flat? And when does it end?"]


def test_json_has_the_fields_of_the_contract() -> None:
    answer = qa.answer("Who?", lambda _, k: [passage("Ada wrote it.")], Words(), abstain_below=0.0)
    found = json.loads(json.dumps(answer.to_json()))
    outer = "question answer answer_type abstained answerable_probability citations steps timings tokens"
    assert set(found) == set(outer.split())
    assert set(found["citations"][0]) == {"n", "document", "page", "start", "end", "quote", "score"}
    assert set(found["steps"][0]) == {"step", "retrieve", "tier", "query_top", "read", "evicted", "stop"}
    assert set(found["timings"]) == {"retrieve_ms", "first_token_ms", "total_ms"}
    assert set(found["tokens"]) == {"prompt", "generated", "positions"}


def test_more_support_never_makes_an_answer_less_likely() -> None:
    def probability(cosine: float, span: float) -> float:
        features = {"passage": cosine, "sentence": cosine, "covered": 0.5, "span": span, "margin": 0.5}
        return answerability.probability(answerability.untrained(), features)

    assert probability(0.8, -2.0) >= probability(0.3, -2.0)
    assert probability(0.6, -1.0) >= probability(0.6, -8.0)


def test_sentences_cover_the_text_and_wrapped_lines_go_on() -> None:
    text = (
        "# Heading\nShort line\n- an entry\n- another one\n\nThis line is so long that it was wrapped by whoever wrote "
        "it down\nand it goes on here. A new one!  And 3.5 more.\na | b\nc | d"
    )
    found = [text[start:end] for start, end in evidence.sentences(text)]
    assert found == [
        "# Heading",
        "Short line",
        "- an entry",
        "- another one",
        "This line is so long that it was wrapped by whoever wrote it down\nand it goes on here.",
        "A new one!",
        "And 3.5 more.",
        "a | b",
        "c | d",
    ]


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t.!?。|-")), max_size=200))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    found = evidence.sentences(text)
    assert all(start < end for start, end in found)
    assert [bound for pair in found for bound in pair] == sorted(bound for pair in found for bound in pair)
    inside = set().union(*(range(start, end) for start, end in found)) if found else set()
    assert all(letter.isspace() for at, letter in enumerate(text) if at not in inside)


def test_the_sentence_that_shares_meaning_and_words_comes_first() -> None:
    read = [
        passage("The rent is due monthly. The deposit is 900 euros."),
        passage("Deposit slips are green.", score=0.2),
    ]

    def closeness(question: str, texts: Sequence[str]) -> list[float]:
        return [0.6 if "900" in text else 0.1 for text in texts]

    ranked = evidence.rank_sentences("How much is the deposit?", read, closeness)
    first = ranked[0]
    assert read[first.passage].chunk.text[first.start : first.end] == "The deposit is 900 euros."
    assert [sentence.fit for sentence in ranked] == sorted((s.fit for s in ranked), reverse=True)
    assert len(ranked) == 3


def test_only_so_many_sentences_are_read() -> None:
    model = Words()
    read = [passage("One fact. Two facts. Three facts. Four facts.")]
    qa.answer("facts?", lambda _, k: read, model, focus=2, abstain_below=0.0)
    assert len(model.prompts[0].split("Question:")[0].strip().split("\n\n")) == 2


class ByPassage(Words):
    """A reader of whole passages that finds what a test says in each, and is as sure of it as it says."""

    def __init__(self, odds: dict[str, float], answers: dict[str, str]) -> None:
        super().__init__(whole=True)
        self.odds, self.answers = odds, answers

    @property
    def answerability(self) -> dict[str, float]:
        return {"bias": 0.0, "span": 1.0}

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        self.prompts.append(passages[0])
        start = passages[0].index(self.answers[passages[0]])
        end = start + len(self.answers[passages[0]])
        return Quoted([Span(0, start, end, self.odds[passages[0]], 1)], -1.0, 5, self.count(passages[0]))


def test_passages_are_read_one_by_one_until_it_is_enough() -> None:
    read = [passage(f"fact number {number}", document=f"{number}.txt", score=1 - number / 10) for number in range(5)]
    texts = [one.chunk.text for one in read]
    odds = dict(zip(texts, [-1.0, 3.0, 5.0, 9.0, 9.0], strict=True))  # not a log-probability, but the reader's to say
    model = ByPassage(odds, dict.fromkeys(texts, "number"))
    found = qa.answer("facts?", lambda _, k: read, model, enough=0.99, abstain_below=0.0)
    assert model.prompts == texts[:3]
    assert [len(step["read"]) for step in found.steps] == [1, 1, 1]  # type: ignore[arg-type]
    assert [step["stop"] for step in found.steps] == [False, False, True]
    assert [step["retrieve"] for step in found.steps] == [True, False, False]
    assert found.tokens["positions"] == 9
    assert found.answerable_probability == pytest.approx(0.9933, abs=1e-3)
    # the surest comes first, and passages that say the same are cited behind it
    assert [one.document for one in found.citations] == ["2.txt", "1.txt", "0.txt"]


def test_a_passage_that_cannot_be_it_is_not_read_but_the_first_is() -> None:
    read = [passage("first", score=1.0), passage("far behind", score=0.2), passage("close behind", score=0.9)]
    answers = {"first": "first", "far behind": "far", "close behind": "close"}
    model = ByPassage(dict.fromkeys(answers, -3.0), answers)
    found = qa.answer("which?", lambda _, k: read, model, abstain_below=0.0)
    assert model.prompts == ["first", "close behind"]
    assert found.answer == "first"
    assert qa.answer("which?", lambda _, k: read, model, abstain_below=0.9).abstained
    model.prompts.clear()
    qa.answer("which?", lambda _, k: read, model, enough=1.0)
    assert model.prompts == ["first", "far behind", "close behind"]  # 1 is to read everything


class Joining(ByPassage):
    """Finds, in several passages together, the whole of the one that it reads nearest the question."""

    def __init__(self, odds: dict[str, float], answers: dict[str, str], *, joint: float) -> None:
        super().__init__(odds, answers)
        self.reads_together, self.joint = 3, joint

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        if len(passages) == 1:
            return super().quote(question, passages)
        self.prompts.append(" | ".join(passages))
        last = len(passages) - 1
        return Quoted([Span(last, 0, len(passages[last]), self.joint, 1)], -1.0, 5, self.count(self.prompts[-1]))


def test_passages_that_are_not_enough_by_themselves_are_read_together() -> None:
    odds = {"the first": -3.0, "b": -5.0, "c likely": -1.0, "d": -1.5, "e": -9.0}
    read = [passage(text, document=text, score=1 - number / 100) for number, text in enumerate(odds)]
    model = Joining(odds, {text: text for text in odds}, joint=-0.2)
    found = qa.answer("facts?", lambda _, k: read, model, abstain_below=0.0)
    assert model.prompts == [*odds, "d | c likely | the first"]  # the first and the likeliest, worst first
    assert found.answer == "the first"
    assert found.answerable_probability == pytest.approx(1 / (1 + math.exp(0.2)), abs=1e-4)
    assert [len(step["read"]) for step in found.steps] == [1] * 5 + [3]  # type: ignore[arg-type]
    (cited,) = found.citations  # read twice, cited once
    assert (cited.document, cited.start, cited.quote) == ("the first", 0, "the first")
    model.joint = -11.0  # it hardly says so, and "c likely" by itself was far surer of its own
    found = qa.answer("facts?", lambda _, k: read, model, abstain_below=0.0)
    assert found.answer == "c likely"
    assert found.answerable_probability == pytest.approx(1 / (1 + math.exp(1.0)), abs=1e-4)  # of the surest of all
    model.prompts.clear()
    qa.answer("facts?", lambda _, k: read[:1], model, abstain_below=0.0)
    assert model.prompts == ["the first"]
    model.prompts.clear()
    qa.answer("facts?", lambda _, k: read, model, budget=5, abstain_below=0.0)
    assert len(model.prompts[-1].replace(" |", "").split()) <= 5
    model.odds, model.prompts = {**odds, "d": -0.8}, []
    assert qa.answer("facts?", lambda _, k: read, model, abstain_below=0.0).answer == "d"
    assert model.prompts == [*odds]  # one that is not unlikely by itself is enough


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
def test_the_answer_is_of_the_surest_passage_that_was_read(given_: list[tuple[float, float]], enough: float) -> None:
    read = [passage(f"p{number}", document=f"{number}", score=score) for number, (_, score) in enumerate(given_)]
    read.sort(key=lambda one: -one.score)
    odds = {f"p{number}": odd for number, (odd, _) in enumerate(given_)}
    model = ByPassage(odds, {text: text for text in odds})
    found = qa.answer("which?", lambda _, k: read, model, enough=enough, abstain_below=0.0)
    assert model.prompts[0] == read[0].chunk.text
    likely = [answerability.probability(model.answerability, {"span": odds[text]}) for text in model.prompts]
    assert likely[model.prompts.index(found.answer)] == max(likely)
    assert all(one < enough for one in likely[:-1])
