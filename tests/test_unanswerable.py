"""Questions that only look answered: changed where it counts, never holding the answer, and asked as having none."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2m_rag.reading_data import Material, Question, bare, rows_of
from l2m_rag.unanswerable import harder, twisted, without

TOLD = (
    "In 911 King Charles III gave Normandy to Rollo, the first duke. The duke swore loyalty to the king. "
    "In 1066 William crossed the Channel. The largest ship was built in Dives."
)


@pytest.mark.parametrize(
    ("question", "answer", "one_of"),
    [
        ("Who gave land to Rollo?", "King Charles III", {"William", "Normandy", "Channel", "Dives"}),
        ("What did he cross in 1066?", "the Channel", set()),  # no other number of four digits stands there
        ("Where was the largest ship built?", "Dives", {"smallest"}),
    ],
)
def test_a_name_a_number_or_a_word_is_exchanged(question: str, answer: str, one_of: set[str]) -> None:
    found = {twisted(question, TOLD, answer, random.Random(seed)) for seed in range(40)}
    plain = {one for one in found if one and "n't" not in one}
    new = {bare(one).split()[-1] if not one_of else word for one in plain for word in (one_of or {""}) if word in one}
    assert new <= one_of
    assert len(plain) >= min(1, len(one_of))
    assert question not in found


def test_what_cannot_be_changed_is_left() -> None:
    assert twisted("Who swore loyalty?", "A duke swore loyalty.", "A duke", random.Random(0)) is None


@given(st.integers(0, 10_000), st.sampled_from(["King Charles III", "Rollo", "911", "Dives"]))
def test_a_changed_question_differs_and_does_not_name_the_answer(seed: int, answer: str) -> None:
    question = "Was it William who met the first duke in 1066?"
    found = twisted(question, TOLD, answer, random.Random(seed))
    assert found is not None
    assert bare(found) != bare(question)
    assert not (set(bare(found).split()) - set(bare(question).split())) & set(bare(answer).split())


def test_evidence_is_taken_out_whole_or_not_at_all() -> None:
    short = without(TOLD, "Dives")
    assert short == TOLD.rsplit(". ", 1)[0] + "."
    assert without(TOLD, "Paris") is None
    assert without("One thing. Another thing.", "Another") is None
    assert without("The duke. The duke. The king. The sea.", "the duke") is None  # half of it would go


def _material() -> Material:
    questions = [
        Question(0, "Who gave Normandy to Rollo?", "King Charles III"),
        Question(0, "Where was the largest ship built?", "Dives"),
        Question(1, "Who lives here?", "Ada"),
    ]
    return Material([TOLD, "Ada lives here."], ["squad", "ropes"], questions, [[1], [0]], [[2], [0]])


def test_what_is_added_has_no_answer_in_its_passage_and_nothing_is_changed() -> None:
    before = _material()
    made = harder(before, seed=0, cut=1.0)
    assert made.passages[:2] == before.passages
    assert made.questions[:3] == before.questions
    assert harder(before, seed=0, cut=1.0) == made
    assert len(made.passages) == 3 == len(made.near) == len(made.lures) == len(made.sources)
    gone = [one for one in made.questions[3:] if not one.answer]
    assert {one.passage for one in gone} == {0, 2}  # ropes is left alone
    texts = {one.text: one.answer for one in before.questions}
    for one in made.questions:
        if one.answer:
            assert one.answer in made.passages[one.passage]
        elif one.text in texts:
            assert bare(texts[one.text]) not in bare(made.passages[one.passage])
        else:
            assert one.text not in texts


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_rows_ask_them_without_an_answer(seed: int, share: float) -> None:
    made = harder(_material(), seed=seed, cut=1.0)
    rows = rows_of(
        made, random.Random(seed), sizes=[20] * len(made.passages), costs=[10] * len(made.questions), longest=400,
        unanswerable=share, most_passages=1,
    )  # fmt: skip
    asked = [one for row in rows for one in row.questions]
    assert {number for number, right in asked if right} >= {0, 1, 2}
    for row in rows:
        for number, right in row.questions:
            question = made.questions[number]
            assert right == bool(question.answer and question.passage in row.passages)
    if not share:
        assert all(right for _, right in asked)
    if share == 3:
        assert any(not made.questions[number].answer for number, _ in asked)
