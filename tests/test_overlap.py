"""Answers compared by their words."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2m_rag.overlap import by_expected_f1, token_f1


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("the Eiffel Tower", "Eiffel Tower", 1.0),
        ("Tower", "Eiffel Tower", 2 / 3),
        ("a b b", "b b c", 0.8),  # "a" is an article
        ("nothing alike", "quite another", 0.0),
        ("", "", 1.0),
        ("", "something", 0.0),
        ("The", "an", 1.0),  # both empty once the articles are gone
    ],
)
def test_f1_is_that_of_squad(answer: str, gold: str, f1: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(f1)


def test_answers_that_nearly_agree_win_over_a_likelier_one() -> None:
    scores = {"the tesla": -1.6, "the SI unit of magnetic flux density": -1.3, "tesla": -1.7}
    assert by_expected_f1(scores) == ["the tesla", "tesla", "the SI unit of magnetic flux density"]


_ANSWERS = st.dictionaries(st.text("ab c", min_size=1, max_size=8), st.floats(-30, 0), max_size=8)


@given(_ANSWERS, st.floats(-20, 20))
def test_answers_are_ordered_by_the_f1_to_expect_whatever_their_scores_are_counted_from(
    scores: dict[str, float], shift: float
) -> None:
    ordered = by_expected_f1(scores)
    assert sorted(ordered) == sorted(scores)
    weights = {text: math.exp(score) for text, score in scores.items()}
    total = sum(weights.values())
    expected = [sum(weight * token_f1(text, other) for other, weight in weights.items()) / total for text in ordered]
    assert all(one >= other - 1e-9 for one, other in pairwise(expected))
    moved = by_expected_f1({text: score + shift for text, score in scores.items()})
    best = sum(weight * token_f1(moved[0], other) for other, weight in weights.items()) / total if scores else 0.0
    assert best == pytest.approx(expected[0] if scores else 0.0)


@given(_ANSWERS)
def test_an_answer_that_is_more_likely_than_not_and_shares_no_word_stays_first(scores: dict[str, float]) -> None:
    certain = {"other": 1.0, **{text: min(score, -3.0) for text, score in scores.items() if text.strip()}}
    assert by_expected_f1(certain)[0] == "other"
