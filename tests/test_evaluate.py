"""The measures: equal to their definitions, and moved by what they are to measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2m_rag import evaluate, evidence, qa
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.records import Chunk, Passage
from l2m_rag.spans import Quoted, Span
from l2m_rag.tasks import Task, TaskSet


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_order(pairs: list[tuple[bool, int]]) -> None:
    labels, scores = [int(label) for label, _ in pairs], [float(score) for _, score in pairs]
    high = [s for label, s in zip(labels, scores, strict=True) if label]
    low = [s for label, s in zip(labels, scores, strict=True) if not label]
    found = evaluate.auroc(labels, scores)
    if not high or not low:
        assert math.isnan(found)
        return
    pairs_in_order = sum((h > s) + (h == s) / 2 for h in high for s in low) / (len(high) * len(low))
    assert found == pytest.approx(pairs_in_order)


def test_the_interval_narrows_with_more_questions() -> None:
    few, many = [0.0, 1.0] * 20, [0.0, 1.0] * 500
    assert evaluate.half_width(few) > 3 * evaluate.half_width(many) > 0
    # 1.96 standard errors
    assert evaluate.half_width(many) == pytest.approx(1.96 * np.std(many) / math.sqrt(len(many)), rel=0.15)


def test_a_sample_is_the_same_each_time_and_keeps_the_order() -> None:
    tasks = [Task(str(number), "?") for number in range(100)]
    taken = evaluate.sample(tasks, 10)
    assert taken == evaluate.sample(tasks, 10)
    assert [int(task.id) for task in taken] == sorted(int(task.id) for task in taken)
    assert evaluate.sample(tasks, None) == tasks


class Shelf:
    """A collection whose search gives what a test has put here, by mode."""

    def __init__(self, hits: dict[str, list[Passage]]) -> None:
        self.hits = hits
        self.settings = Settings()

    def search(self, text: str, k: int, *, mode: str, fusion: str) -> list[Passage]:
        return self.hits[mode][:k]


def passage(document: str, text: str = "text", start: int = 0) -> Passage:
    return Passage(Chunk(f"{document}:{start}", document, 0, None, "", start, start + len(text), text), 1.0)


def test_documents_are_ranked_once_however_many_chunks_they_have() -> None:
    hits = [passage("a"), passage("a", start=9), passage("b"), passage("c")]
    shelf: Any = Shelf({"dense": hits, "text": hits[::-1], "hybrid": hits})
    rows = evaluate.retrieval(shelf, [Task("1", "?", document="b"), Task("2", "?", document="nowhere")])
    dense, text = rows[0], rows[1]
    assert (dense.recall_1, dense.recall_5, dense.mrr) == (0.0, 0.5, 0.25)
    assert dense.ndcg_10 == pytest.approx(1 / math.log2(3) / 2, abs=1e-3)
    assert (text.recall_1, text.mrr) == (0.0, 0.25)
    assert dense.questions == 2


def test_without_a_document_a_passage_that_holds_an_answer_is_right() -> None:
    hits = [passage("a", "nothing"), passage("b", "It was Ada Lovelace.")]
    shelf: Any = Shelf({"dense": hits, "text": hits[:1], "hybrid": hits})
    rows = evaluate.retrieval(shelf, [Task("1", "?", answers=("ada lovelace",))])
    assert [row.mrr for row in rows] == [0.5, 0.0, 0.5, 0.5]


def test_questions_without_anything_to_find_are_refused() -> None:
    shelf: Any = Shelf({})
    with pytest.raises(UsageError, match='give "document" or "answers"'):
        evaluate.retrieval(shelf, [Task("1", "?")])


class Oracle:
    """A collection that answers as a test says: by question and by whether its document is in reach."""

    def __init__(self, say: Callable[[str, str | None], tuple[str, float, int]]) -> None:
        self.say = say
        self.settings = Settings(abstain_below=0.5)
        self.kept = "Ada wrote it. Bob read it."

    def text(self, document: str) -> str:
        return self.kept

    def ask(self, question: str, *, free: bool, where: str | None, abstain_below: float) -> qa.Answer:
        assert abstain_below == 0.0
        text, probability, start = self.say(question, where)
        quote = self.kept[start : start + len(text)]
        cited = [qa.Citation(1, "d", None, start, start + len(text), quote, 1.0)]
        return qa.Answer(
            question, text, "span", False, probability, cited, [], {"first_token_ms": 5.0}, {"positions": 9}
        )


def test_answers_are_scored_and_the_document_is_hidden_for_abstention() -> None:
    asked: list[str | None] = []

    def say(question: str, where: str | None) -> tuple[str, float, int]:
        asked.append(where)
        return ("Bob", 0.1, 14) if where and where.startswith("NOT") else ("Ada", 0.9, 0)

    oracle: Any = Oracle(say)
    row = evaluate.answers(oracle, [Task("1", "Who wrote it?", ("Ada",), "d'x")], gold=False)
    assert asked == [None, "NOT (document = 'd''x')"]
    assert (row.em, row.f1, row.answered, row.auroc, row.verbatim) == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert row.citation_precision == 0.0  # the quote is right, but it is not the gold document's
    found = evaluate.answers(oracle, [Task("1", "Who wrote it?", ("Ada",), "d")], gold=True)
    assert found.citation_precision == 1.0
    assert asked[2] == "document = 'd'"


def test_what_was_asked_is_not_asked_again_and_the_unanswerable_can_be_left_out() -> None:
    asked: list[str | None] = []

    def say(question: str, where: str | None) -> tuple[str, float, int]:
        asked.append(where)
        return "Ada", 0.9, 0

    oracle: Any = Oracle(say)
    tasks, known = [Task("1", "Who wrote it?", ("Ada",), "d")], evaluate.Outcomes()
    given = evaluate.answers(oracle, tasks, gold=True, known=known)
    found = evaluate.answers(oracle, tasks, gold=False, known=known)
    assert asked == ["document = 'd'", "NOT (document = 'd')", None]
    assert (given.auroc, found.auroc, found.positions) == (0.5, 0.5, 9.0)
    few = evaluate.answers(oracle, tasks, gold=False, unanswerable=False)
    assert asked[3:] == [None]
    assert math.isnan(few.auroc)
    assert few.f1 == 1.0


def test_other_ways_are_asked_with_other_settings_and_named(tmp_path: Path) -> None:
    made = Collection("c", tmp_path, Settings(home=tmp_path))
    other = evaluate.changed(made, evaluate.BESIDE["every passage that fits"])
    assert (other.path, other.settings.enough, made.settings.enough) == (made.path, 1.0, Settings().enough)
    assert evaluate.changed(made, evaluate.BESIDE["the first passage alone"]).settings.passages == 1
    oracle: Any = Oracle(lambda question, where: ("Ada", 0.9, 0))
    row = evaluate.answers(oracle, [Task("1", "Who?", ("Ada",), "d")], gold=True, way="so")
    assert row.evidence == "gold document, so"
    short = evaluate.beginnings(TaskSet("s", {"d": "Ada wrote it."}, [Task("1", "Who?")]), lambda text: text[:3])
    assert (short.name, short.documents, short.tasks) == ("s-cut", {"d": "Ada"}, [Task("1", "Who?")])


def test_a_forged_quote_is_found() -> None:
    oracle: Any = Oracle(lambda question, where: ("Ada", 0.9, 0))
    oracle.kept = "Ada wrote it."
    forged = oracle.ask

    def ask(question: str, **options: Any) -> qa.Answer:
        answer: qa.Answer = forged(question, **options)
        return replace(answer, citations=[replace(answer.citations[0], quote="Eve")])

    oracle.ask = ask
    row = evaluate.answers(oracle, [Task("1", "Who?", ("Ada",), "d")], gold=True)
    assert row.verbatim == 0.0


def test_a_wrong_citation_lowers_precision() -> None:
    oracle: Any = Oracle(lambda question, where: ("Bob", 0.9, 14))
    row = evaluate.answers(oracle, [Task("1", "Who wrote it?", ("Ada",), "d")], gold=True)
    assert (row.em, row.citation_precision) == (0.0, 0.0)


def test_a_set_becomes_files_and_a_collection_and_is_made_once(embedder: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, embedder=str(embedder), chunk_size=64)
    tasks = TaskSet("small", {"00000.txt": "The lease ends in May.\r\nYes.", "x": "Rent is due."}, [])
    made = evaluate.collection_of(tasks, settings)
    assert sorted(row.id for row in made.documents()) == ["00000.txt", "x.txt"]
    assert made.text("00000.txt") == "The lease ends in May.\r\nYes."
    assert isinstance(evaluate.collection_of(tasks, settings), Collection)
    found = evaluate.retrieval(made, [Task("1", "lease", document="00000.txt")])
    assert {row.recall_5 for row in found} == {1.0}


def test_the_shipped_weights_were_fitted_and_point_the_right_way() -> None:
    kept = json.loads((Path(qa.__file__).parent / "data" / "answerability.json").read_text())
    assert kept["fitted"] != "not yet"
    assert set(kept["weights"]) - {"bias"} == set(
        evidence.evidence_features([passage("a")], [], Quoted([Span(0, 0, 1, -1.0, 1)], None, 1))
    )


class Sure:
    """A reader of whole passages that is sure where the answer is."""

    name, whole, together = "sure", True, 1
    answerability = prior = {"bias": 0.0}  # noqa: RUF012

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, tokens: int) -> str:
        return text

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        raise NotImplementedError

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        held = any("Ada" in passage for passage in passages)
        return Quoted([Span(0, 0, 3, -0.1 if held else -4.0, 1)], -5.0 if held else -0.1, 4, 3)


class Kept:
    """A collection that finds what it is told to for each filter, and keeps what it was asked."""

    settings = Settings()
    closeness = None

    def __init__(self, hits: dict[str | None, list[Passage]]) -> None:
        self.hits = hits
        self.asked: list[tuple[str, str | None]] = []

    def text(self, document: str) -> str:
        return "Ada wrote it."

    def evidence(self, question: str, k: int, where: str | None) -> list[Passage]:
        self.asked.append((question, where))
        return self.hits[where]


def test_a_half_is_where_as_many_have_an_answer_as_have_none() -> None:
    pytest.importorskip("sklearn")
    points = [{"x": float(number)} for number in range(-4, 5)] * 2
    labels = [0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1]
    once = evaluate._fitted(points, labels, [1.0] * len(points))
    # each that has none comes three times, and weighs a third
    more = [(point, label) for point, label in zip(points, labels, strict=True) for _ in range(1 if label else 3)]
    shares = [1.0 if label else 1 / 3 for _, label in more]
    again = evaluate._fitted([point for point, _ in more], [label for _, label in more], shares)
    assert again == pytest.approx(once, abs=2e-3)
    lean = evaluate._fitted([point for point, _ in more], [label for _, label in more], [1.0] * len(more))
    assert lean["bias"] < once["bias"] - 0.5


def test_the_probability_is_fitted_on_readings_with_and_without_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_language_model", lambda settings: Sure())
    hits = [passage("d", "Ada wrote it."), passage("e", "Nobody knows."), passage("f", "Ada of another one.")]
    kept: Any = Kept({None: hits, "NOT (document = 'd')": hits[1:], "document = 'd'": hits[:1]})
    told = TaskSet("told", {}, [Task("1", "Who wrote first", ("Ada",), "d"), Task("2", "When?", (), "d")])
    found = evaluate.calibrate([(kept, told)] * 2)
    whole, others, itself = None, "NOT (document = 'd')", "document = 'd'"
    assert kept.asked == [("Who wrote first", whole), ("Who wrote first", others), ("Who wrote last", itself)] * 2
    assert found["fitted"] == "12 readings for 6 searches; 2 held the answer"
    weights: Any = found["weights"]
    assert weights["empty"] < 0 < weights["span"]
    assert set(found["prior"]) == {"bias", "passage", "behind"}  # type: ignore[call-overload]
    alone = found["prior"]
    monkeypatch.setattr(Sure, "together", 2)
    found = evaluate.calibrate([(kept, told)] * 2)
    assert found["fitted"] == "16 readings for 6 searches; 4 held the answer"  # two more of several passages
    assert "together" in set(found["weights"])  # type: ignore[call-overload]
    assert found["prior"] == alone  # of passages read by themselves
    with pytest.raises(UsageError, match="which some are found"):
        evaluate.calibrate([(kept, TaskSet("told", {}, [Task("1", "Who?", ("nothing",), "d")]))])


def test_questions_about_their_document_alone_are_asked_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_language_model", lambda settings: Sure())
    kept: Any = Kept({"document = 'd'": [passage("d", "Ada wrote it.")]})
    papers = [Task("1", "Who wrote first", ("Ada",), "d"), Task("2", "When?", (), "d", answerable=False)]
    found = evaluate.calibrate([(kept, TaskSet("papers", {}, papers, alone=True))])
    assert kept.asked == [(question, "document = 'd'") for question in ("Who wrote first", "When?", "Who wrote last")]
    assert found["fitted"] == "3 readings for 3 searches; 1 held the answer"


def test_a_question_of_many_passages_weighs_as_much_as_one_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_language_model", lambda settings: Sure())
    monkeypatch.setattr(evaluate, "twisted", lambda *given: "")
    right, wrong = passage("d", "Ada wrote it."), passage("e", "Nobody knows.")
    told = TaskSet("told", {}, [Task("1", "Who wrote first", ("Ada",), "d")])

    def fitted(times: int) -> dict[str, object]:
        hits: Any = {None: [right, wrong] * times, "NOT (document = 'd')": [wrong]}
        return evaluate.calibrate([(cast("Any", Kept(hits)), told)])

    few, many = fitted(1), fitted(5)
    assert few["fitted"] != many["fitted"]
    assert many["weights"] == pytest.approx(few["weights"], abs=1e-3)
    assert many["prior"] == pytest.approx(few["prior"], abs=1e-3)
