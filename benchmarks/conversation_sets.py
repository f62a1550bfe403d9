"""The conversations that `conversations.py` asks about: their turns, their questions, and probes made of them."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2m_rag.days import day
from l2m_rag.evidence import sentences
from l2m_rag.tasks import rows

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+")
_DAY = "%I:%M %p on %d %B, %Y"
_NO_DAY = "1:00 am on 1 January, 1970"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message: who said what, and when."""

    id: str
    by: str
    text: str
    at: datetime


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the ids of the turns that answer it, what it is counted under, and the answer if it has one."""

    text: str
    evidence: frozenset[str]
    group: str
    answer: str | None


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation, oldest turn first, and what is asked of it."""

    name: str
    turns: list[Turn]
    questions: list[Question]


def line(turn: Turn) -> str:
    """Write a turn with its day, as it was said."""
    return f"[{day(turn.at)}] {turn.by}: {turn.text}"


def locomo(data: Path) -> Iterator[Talk]:
    for row in rows(data / "locomo_sample/conversations.jsonl.zst"):
        told, turns = row["conversation"], []
        for number in range(1, len(told)):
            day = datetime.strptime(told.get(f"session_{number}_date_time", _NO_DAY), _DAY).replace(tzinfo=UTC)
            turns += [Turn(one["dia_id"], one["speaker"], _said(one), day) for one in told.get(f"session_{number}", ())]
        questions = [
            Question(
                one["question"],
                frozenset(re.findall(r"D\d+:\d+", " ".join(one["evidence"]))),
                CATEGORIES[one["category"]],
                None if one["category"] == 5 else str(one["answer"]),
            )
            for one in row["qa"]
        ]
        yield Talk(row["sample_id"], turns, questions)


def _said(turn: dict[str, str]) -> str:
    """Give what a turn says, and what its photo shows, as the set's own evaluation does."""
    return f"{turn['text']} [{turn['blip_caption']}]" if "blip_caption" in turn else turn["text"]


def memorybank(data: Path, seed: int, *, stitched: bool) -> Iterator[Talk]:
    """Give each user's ten days with probes; or those of all users one after another, as one history of months."""
    users = [_turns(row) for row in rows(data / "memorybank/en.jsonl.zst")]
    if not stitched:
        for name, turns in users:
            yield Talk(name, turns, list(probes(turns, random.Random(f"{seed} {name}"), 2)))
        return
    random.Random(seed).shuffle(users)
    begins = users[0][1][0].at
    joined: list[Turn] = []
    for name, turns in users:
        joined += [dataclasses.replace(one, id=f"{name} {one.id}", at=one.at - turns[0].at + begins) for one in turns]
        begins += timedelta(days=(turns[-1].at - turns[0].at).days + 1)
    yield Talk("all", joined, list(probes(joined, random.Random(seed), 30)))


def _turns(row: dict[str, Any]) -> tuple[str, list[Turn]]:
    turns = []
    for date, exchanges in row["history"].items():
        at = datetime.fromisoformat(date).replace(tzinfo=UTC)
        for exchange in exchanges:
            for by, key in (("human", "query"), ("ai", "response")):
                turns.append(Turn(str(len(turns)), by, exchange[key], at))
    return row["user"].strip(), turns


def probes(turns: Sequence[Turn], draw: random.Random, days: int) -> Iterator[Question]:
    """Ask for a word of each of the user's messages by up to four others of its sentence.

    The word stands in that message and in no other of the history, so what is right is certain. They are counted by
    age, the days from the message to the last one, so many days together.
    """
    held = Counter(word for turn in turns for word in set(_content(turn.text)))
    last = turns[-1].at
    for turn in turns:
        if turn.by != "human":
            continue
        made = []
        for low, high in sentences(turn.text):
            words = list(dict.fromkeys(_content(turn.text[low:high])))
            rare = [word for word in words if held[word] == 1]
            if rare and len(words) > 3:
                made.append((words, rare))
        if made:
            words, rare = draw.choice(made)
            blank = draw.choice(rare)
            others = [word for word in words if word != blank]
            asked = sorted(draw.sample(others, min(4, len(others))), key=others.index)
            low = (last - turn.at).days // days * days
            age = f"{low}-{low + days - 1} days"
            yield Question(f"What did I say about {' '.join(asked)}?", frozenset([turn.id]), age, blank)


def _content(text: str) -> list[str]:
    words = (word.lower() for word in _WORD.findall(text))
    return [word for word in words if len(word) > 3 and word not in ENGLISH_STOP_WORDS]
