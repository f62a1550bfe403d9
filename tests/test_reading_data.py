"""What the reader learns from: nothing that is measured on, and answers that stand where they are said to."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from l2m_rag import reading_data, tasks
from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.reading_data import EVALUATION, SOURCES, Material, Row, Seen, batches_of, gather, rows_of

zstandard = pytest.importorskip("zstandard")
DATA = Path(tasks.__file__).resolve().parents[2] / "shared" / "data"


class Words:
    """An embedder and tokenizer of words."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), 32), np.float32)
        for number, text in enumerate(texts):
            for word in text.lower().split():
                vectors[number, sum(map(ord, word)) % 32] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)  # type: ignore[no-any-return]

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        found = []
        for text in texts:
            at, spans = 0, []
            for word in text.split():
                at = text.index(word, at)
                spans.append((at, at + len(word)))
                at += len(word)
            found.append(spans)
        return found


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def line(context: str, question: str, answer: str) -> dict[str, object]:
    return {"context": context, "question": question, "answers": [answer], "answer_start": context.find(answer)}


LONG = "The lighthouse at the end of the northern pier was built by Ada Byron in 1843 and painted white."
OTHER = "A second passage tells of the southern pier, which the storm of 1911 took away in a single night."


def test_what_is_measured_on_is_left_out_by_text_and_by_question(tmp_path: Path) -> None:
    own = "The market hall in the old town opened its doors for the first time in 1902 to great applause."
    write(
        tmp_path / "squad/squad11_train_subset.jsonl.zst",
        line(own, "When did the hall open?", "1902"),
        line(own, "Who built the LIGHTHOUSE", "old town"),
        line(f"News: {LONG} More.", "When was it built?", "1843"),
    )
    write(tmp_path / "squad_subset/xquad_en.jsonl.zst", line(LONG, "Who built the lighthouse?", "Ada Byron"))
    made = gather(tmp_path, ["squad"], Words(), Words())
    assert [(question.text, question.answer) for question in made.questions] == [("When did the hall open?", "1902")]
    assert made.passages == [own]


def test_a_source_that_is_not_known_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training source named nothing"):
        gather(tmp_path, ["nothing"], Words(), Words())
    with pytest.raises(UsageError, match="cannot read"):
        gather(tmp_path, ["squad"], Words(), Words())


def test_stories_and_conversations_are_asked_for_what_they_hold(tmp_path: Path) -> None:
    story = ["Ada went to the hall.", "Bob took the ball there.", "Ada is in the garden."]
    write(
        tmp_path / "babi/train.jsonl.zst",
        {"story": story, "question": "Where is Ada?", "answer": "garden"},
        {"story": story, "question": "Is Ada in the hall?", "answer": "no"},
        {"story": story[:1], "question": "How many went?", "answer": "all"},  # a part of a word only
    )
    slots = {"Restaurants_1": {"party_size": "2", "time": "7 pm", "has_live_music": "True", "city": "Rome"}}
    turns = [["USER", "A table for 12 people, please. No, 2."], ["SYSTEM", "At 7 pm, then."]]
    write(tmp_path / "sgd/train.jsonl.zst", {"turns": turns, "final_slots": slots})
    made = gather(tmp_path, ["stories", "dialogue"], Words(), Words())
    assert [(one.text, one.answer) for one in made.questions] == [
        ("Where is Ada?", "garden"),
        ("What party size was settled on?", "2"),
        ("What time was settled on?", "7 pm"),
    ]
    assert made.passages == [" ".join(story), "User: A table for 12 people, please. No, 2.\nSystem: At 7 pm, then."]
    assert made.sources == ["stories", "dialogue"]


def test_clozes_ask_for_a_name_that_the_passage_holds(tmp_path: Path) -> None:
    text = (
        "Ada Byron was a writer of letters and of notes on machines. In London she met Charles Babbage at a party. "
        "Later Charles Babbage showed her the engine that he had built in his own house, and asked what she thought."
    )
    for name in ("2wiki_corpus", "hotpot_corpus"):
        write(tmp_path / f"wiki_passages/{name}.jsonl.zst", {"title": "x", "text": text})
    made = gather(tmp_path, ["cloze"], Words(), Words())
    assert made.questions
    for question in made.questions:
        assert question.answer in made.passages[question.passage]
        assert "____" in question.text
        assert question.answer not in question.text.split("____")[0][-1:]
    taken_out = [question for question in made.questions if made.passages[question.passage] != text]
    for question in taken_out:  # the sentence itself is gone, the name still stands elsewhere
        before = question.text.removeprefix("Fill in the blank: ").split("____")[0].strip()
        assert before not in made.passages[question.passage] or not before


def test_names_are_left_out_of_books_meetings_and_papers_and_lists_as_a_whole(tmp_path: Path) -> None:
    told = "Later that day the captain showed Miss Ada Byron the engine room of the ship, as she had asked. " * 6
    write(tmp_path / "books/some.jsonl.zst", {"text": told})
    turns = [
        ["Chair", "So {disfmarker} we saw the draft of Ada Byron , did n't we ?"],
        ["Clerk", told],
        ["Chair", told],
    ]
    write(tmp_path / "qmsum/train.jsonl.zst", {"turns": turns})
    write(tmp_path / "qmsum/val.jsonl.zst", {"turns": turns[1:]})
    write(tmp_path / "pubmedqa/pqal_dev.jsonl.zst", {"contexts": [told, told]})
    write(tmp_path / "covidqa/docs.jsonl.zst", {"text": told, "doc_id": "1"})
    made = gather(tmp_path, ["books", "meetings", "papers"], Words(), Words())
    assert set(made.sources) == {"books", "meetings", "papers"}
    assert {one.answer for one in made.questions} <= {"Miss Ada Byron", "Ada Byron"}
    assert any(text.startswith("Chair: So we saw the draft of Ada Byron, didn't we? Clerk:") for text in made.passages)
    wiki = (
        "The house was built for a merchant in 1843. In its garden grow roses, lilies, and old oaks, which the town "
        "looks after. It was sold in the end to Ada Byron, Charles Babbage and the Royal Society, who live in it now."
    )
    for name in ("2wiki_corpus", "hotpot_corpus"):
        write(tmp_path / f"wiki_passages/{name}.jsonl.zst", {"title": "x", "text": wiki})
    (question,) = {*gather(tmp_path, ["lists"], Words(), Words()).questions}
    assert question.answer == "Ada Byron, Charles Babbage and the Royal Society"
    with pytest.raises(UsageError, match="cannot read"):
        gather(tmp_path / "books", ["papers"], Words(), Words())


def test_the_answer_of_a_lure_stands_in_none_of_the_passages(tmp_path: Path) -> None:
    texts = [f"{LONG} Entry {number}. {OTHER if number % 2 else ''}" for number in range(8)]
    write(
        tmp_path / "squad/squad11_train_subset.jsonl.zst",
        *(line(text, f"Who built pier {number}?", f"Entry {number}") for number, text in enumerate(texts)),
    )
    made = gather(tmp_path, ["squad"], Words(), Words())
    laid = rows_of(
        made, random.Random(0), sizes=[20] * 8, costs=[10] * 8, longest=200, unanswerable=1.0, most_passages=3
    )
    wrong = [(row, number) for row in laid for number, right in row.questions if not right]
    assert wrong
    for row, number in wrong:
        assert not any(made.questions[number].answer in made.passages[passage] for passage in row.passages)


def test_batches_hold_more_of_shorter_rows() -> None:
    laid = [Row([number], [(number, True)]) for number in range(40)]
    sizes = {number: 100 if number < 20 else 10 for number in range(40)}
    made = batches_of(laid, lambda row: (sizes[row.passages[0]], 5), 2, 200, random.Random(0))
    for batch in made:
        assert len(batch) % 2 == 0
        assert len(batch) * max(sizes[row.passages[0]] + 5 for row in batch) <= 2 * 200
    assert sum(map(len, made)) >= 38


def test_material_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    made = Material(
        [LONG, OTHER], ["squad", "qed"], [reading_data.Question(0, "Who?", "Ada Byron")], [[1], [0]], [[], [0]]
    )
    made.save(tmp_path / "m.json")
    assert Material.load(tmp_path / "m.json") == made
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(CorruptError, match="made again"):
        Material.load(tmp_path / "m.json")


def test_what_one_notice_is_asked_is_not_asked_of_another_that_answers_it_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "squad/squad11_train_subset.jsonl.zst", line(LONG, "Who is the treasurer, and when?", "1843"))
    made = gather(tmp_path, ["squad", "notices"], Words(), Words(), clozes=40)
    papers = [at for at, source in enumerate(made.sources) if source == "notices"]
    assert len(papers) > 30
    assert all(made.sources[other] == "squad" for at in papers for other in made.near[at])
    assert all(made.sources[made.questions[one].passage] == "squad" for at in papers for one in made.lures[at])
    assert any(made.near[at] or made.lures[at] for at in papers)


@pytest.mark.skipif(not (DATA / "squad").is_dir(), reason="the data sets are not beside this checkout")
def test_nothing_that_is_measured_on_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [name for name in EVALUATION if (DATA / f"{name}.jsonl.zst").is_file()]
    monkeypatch.setattr(
        reading_data, "_near", lambda texts, questions, embedder: ([[]] * len(texts), [[]] * len(texts))
    )
    made = gather(DATA, SOURCES, Words(), Words(), clozes=300)
    measured: set[str] = set()
    asked: set[str] = set()
    kept_out = [name for name in reading_data.KEPT_OUT if (DATA / f"{name}.jsonl.zst").is_file()]
    for name in there + kept_out:
        for row in tasks.rows(DATA / f"{name}.jsonl.zst"):
            if name in kept_out and tasks.part_of(str(row["doc_id"])) != "evaluation":
                continue
            asked.add(" ".join(str(row.get("question")).lower().split()))
            if isinstance(row.get("context"), str):
                words = row["context"].lower().split()
                measured |= {" ".join(words[at : at + 20]) for at in range(len(words) - 19)}
    assert len(measured) > 100_000
    for passage in made.passages:
        words = passage.lower().split()
        assert not any(" ".join(words[at : at + 20]) in measured for at in range(len(words) - 19)), passage[:80]
    for question in made.questions:
        assert " ".join(question.text.lower().split()) not in asked
        assert question.free or question.answer in made.passages[question.passage]
    free = [one for one in made.questions if one.free]
    assert {"Yes", "No"} < {one.answer for one in free}
    assert not any(one.answer in made.passages[one.passage] for one in free if one.answer not in ("Yes", "No"))
    unasked = {text.partition(" -- ")[2] or text for text in tasks.load_set("boolq", DATA).documents.values()}
    assert unasked
    assert not unasked & {made.passages[one.passage] for one in free}
    long = {str(row["doc_id"]): row["context"] for row in tasks.rows(DATA / "timeqa/docs.jsonl.zst")}
    kept = [text for name, text in long.items() if tasks.part_of(name) != "train"]
    learnt = [text for text, source in zip(made.passages, made.sources, strict=True) if source == "timeqa"]
    assert not any(passage in text for passage in learnt for text in kept)


def test_seen_knows_texts_however_they_are_set() -> None:
    seen = Seen([LONG], ["Who built it?"])
    assert seen.holds(f"Something before. {LONG.upper()}")
    assert seen.holds("", "who built it")
    assert not seen.holds(OTHER, "Who took it away?")
