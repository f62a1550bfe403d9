"""What `benchmarks/conversations.py` rests on: probes whose answer is certain, windows, and shares that were found."""

from __future__ import annotations

import importlib
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("conversation_sets")


@pytest.fixture
def conversations(sets: Any) -> Any:
    return importlib.import_module("conversations")


def test_the_word_asked_for_stands_in_one_message_only_and_not_in_the_question(sets: Any) -> None:
    said = [
        "I went to Green Meadow Park and saw a blooming cherry tree. It was a wonderful quiet morning walk.",
        "My sister Rosa has moved to Porto and teaches piano there. The park is quiet.",
        "Hello, thank you.",
        "My sister Rosa bought a cherry tree for the garden in spring.",
    ]
    begin = datetime(2023, 4, 27, tzinfo=UTC)
    turns = []
    for day, text in enumerate(said):
        turns.append(sets.Turn(f"{day}u", "human", text, begin + timedelta(days=day)))
        turns.append(sets.Turn(f"{day}a", "ai", f"A reply: {text.split('.')[0]} spring?", turns[-1].at))
    for seed in range(20):
        made = list(sets.probes(turns, random.Random(seed), 2))
        assert made == list(sets.probes(turns, random.Random(seed), 2))
        assert made
        for one in made:
            holding = {turn.id for turn in turns if one.answer in re.findall(r"[a-z'-]+", turn.text.lower())}
            assert holding == one.evidence
            assert one.answer not in one.text
            (turn,) = (turn for turn in turns if turn.id in one.evidence)
            asked = one.text.removeprefix("What did I say about ").removesuffix("?").split()
            assert all(word in turn.text.lower() for word in asked)
            assert one.group == ("2-3 days" if turn.at < begin + timedelta(days=2) else "0-1 days")


def test_the_share_of_the_evidence_that_was_found(conversations: Any) -> None:
    found = [(["a"], ""), (["b", "c"], ""), (["d"], "")]
    assert conversations.recalled(found, frozenset("ac"), 1) == 0.5
    assert conversations.recalled(found, frozenset("ac"), 2) == 1
    assert conversations.recalled(found, frozenset("dx"), 2) == 0
    assert conversations.recalled(found, frozenset("dx"), None) == 0.5


def test_a_window_holds_the_newest_turns_whole_and_is_read_in_pieces(conversations: Any) -> None:
    costs = [5, 1, 4, 3, 2]
    assert conversations.newest_of(costs, 9) == [4, 3, 2]
    assert conversations.newest_of(costs, 1) == []
    assert conversations.newest_of(costs, 100) == [4, 3, 2, 1, 0]
    assert conversations.pieces_of(costs, [4, 3, 2, 1, 0], 5) == [[3, 4], [1, 2], [0]]
    assert conversations.pieces_of([9], [0], 5) == [[0]]
