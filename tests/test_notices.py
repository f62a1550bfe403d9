"""Short papers and plain questions: answers stand in their paper, and what is measured on is not learnt from."""

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from l2m_rag.notices import notices

PARTS = ("train", "validation", "evaluation")


@given(seed=st.integers(0, 10_000), part=st.sampled_from(PARTS))
def test_an_answer_stands_in_its_paper_and_one_question_of_each_has_none(seed: int, part: str) -> None:
    made = list(notices(random.Random(seed), 3, part))
    assert made == list(notices(random.Random(seed), 3, part))
    assert all(answer in paper for paper, _, answer in made)
    assert all("{" not in paper + question for paper, question, _ in made)
    assert sum(not answer for *_, answer in made) == 3
    assert all(2 <= sum(other == paper for other, *_ in made) - 1 <= 6 for paper, *_ in made)


def test_no_kind_is_in_two_parts() -> None:
    made = {part: " ".join(paper for paper, *_ in notices(random.Random(1), 400, part)) for part in PARTS}
    things = {
        "train": ("choir", "dairy"),
        "validation": ("clock museum", "camper"),
        "evaluation": ("parrot", "shuttle"),
    }
    for part, own in things.items():
        for thing in own:
            assert [other for other in PARTS if thing in made[other]] == [part]


def test_no_paper_is_about_what_the_demonstration_is_about() -> None:
    made = [f"{paper} {question}".lower() for paper, question, _ in notices(random.Random(2), 600)]
    assert not any(re.search(r"\b(landlord|tenant|lease|rent)\b", text) for text in made)
