"""Questions of two passages: what is asked stands in one, who is meant in the other, and neither is enough."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from l2m_rag.bridges import Bridge, bridges, hotpot
from l2m_rag.reading_data import Material, Question, gather, rows_of

zstandard = pytest.importorskip("zstandard")

FILM = "The Long Pier (1938 film)", "The Long Pier is a 1938 film directed by Ada Byron and written by Charles Babbage."
HER = (
    "Ada Byron",
    "Ada Byron (born 10 December 1901 in London; died 27 November 1952) was a British film maker. She wrote.",
)
SON = "Byron Noel", "Byron Noel was the son of Ada Byron."


class Alike:
    """An embedder and tokenizer to which all texts are alike."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.ones((len(texts), 1), np.float32)

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [[(0, len(text))] for text in texts]


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def asked(*texts: tuple[str, str], seed: int = 0) -> list[Bridge]:
    return list(bridges(dict(texts), random.Random(seed)))


def test_a_film_leads_to_the_birth_of_who_made_it() -> None:
    found = asked(FILM, HER)
    assert [one.answer for one in found] == ["10 December 1901", "27 November 1952", "London", "British"]
    for one in found:
        assert (one.passage, one.beside) == (HER[1], FILM[1])
        assert one.answer in one.passage
        assert one.answer not in one.beside
        assert "the director of" in one.question
        assert "Ada Byron" not in one.question
    kinds = {one.question for seed in range(20) for one in asked(FILM, HER, seed=seed)}
    assert {"When was the director of The Long Pier born?", "When was the director of the film The Long Pier born?"} < (
        kinds
    )


def test_a_parent_is_a_mother_when_the_passage_says_she() -> None:
    found = asked(SON, HER)
    assert [one.answer for one in found] == ["10 December 1901", "27 November 1952", "London", "British"]
    assert all("the mother of Byron Noel" in one.question for one in found)


@pytest.mark.parametrize(
    "other",
    [
        ("Ada Byron (singer)", "Ada Byron is a singer, born in 1990."),  # who is meant?
        ("x", ""),
    ],
)
def test_who_is_meant_must_be_certain(other: tuple[str, str]) -> None:
    assert bool(asked(FILM, HER, other)) == (not other[1])
    assert not asked(FILM)
    assert not asked(("A", f"A was directed by {HER[0]}, 3rd Countess of Lovelace."), HER)


def test_questions_of_hotpotqa_have_their_answer_in_one_passage_of_two(tmp_path: Path) -> None:
    def line(answer: str) -> dict[str, object]:
        return {
            "question": "When was the director of The Long Pier born? ",
            "answer": answer,
            "supporting_facts": [[FILM[0], 0], [HER[0], 0]],
            "context": [["Other", ["Nothing."]], [FILM[0], [FILM[1]]], [HER[0], [HER[1]]]],
        }

    write(tmp_path / "h.jsonl.zst", line("1901"), line("yes"), line("Ada"))
    assert list(hotpot(tmp_path / "h.jsonl.zst")) == [
        Bridge(HER[1], "When was the director of The Long Pier born?", "1901", FILM[1])
    ]


def test_the_data_name_the_passage_beside_and_come_back_as_they_were(tmp_path: Path) -> None:
    write(tmp_path / "wiki_passages/2wiki_corpus.jsonl.zst", *({"title": t, "text": x} for t, x in (FILM, HER)))
    write(tmp_path / "wiki_passages/hotpot_corpus.jsonl.zst", {"title": SON[0], "text": SON[1]})
    write(tmp_path / "hotpotqa_100/train_sample.jsonl.zst")
    made = gather(tmp_path, ["bridges"], Alike(), Alike())
    assert {made.passages[one.beside] for one in made.questions} == {FILM[1], SON[1]}
    assert all(made.passages[one.passage] == HER[1] for one in made.questions)
    made.save(tmp_path / "m.json")
    assert Material.load(tmp_path / "m.json") == made


def test_a_question_of_two_passages_is_answered_where_both_are_and_not_where_one_is() -> None:
    questions = [
        Question(0, "When was the director of it born?", "1901", 1),
        Question(0, "What was she?", "born"),
        Question(1, "Who wrote it?", "Babbage"),
    ]
    texts = ["born 1901", "by Ada and Babbage", "else"]
    material = Material(texts, ["bridges"] * 3, questions, [[2], [2], [0]], [[]] * 3)
    seen = set()
    for seed in range(40):
        for most in (1, 3):
            laid = rows_of(
                material, random.Random(seed), sizes=[10] * 3, costs=[5] * 3, longest=100, unanswerable=1.0,
                most_passages=most,
            )  # fmt: skip
            for row in laid:
                assert len(set(row.passages)) == len(row.passages) <= most
                for number, right in row.questions:
                    if number == 0:
                        assert right == (1 in row.passages)
                        seen.add((most, right))
    assert {(1, False), (3, True)} <= seen
