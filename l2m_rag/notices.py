"""Short papers of everyday life and plain questions about them: what people ask of a letter, a bill or a notice.

A paper says a few things of one kind (an invoice, minutes, a guarantee) in a sentence each, with names, sums and dates
drawn by chance; asked is what it says, and what others of its kind say and it does not. The wording is in
`data/notices.json`. Sets of questions that people made are about long passages of an encyclopedia; a reader that has
learnt from those alone takes a paper of three sentences for one that says nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

_FEWEST, _MOST = 2, 6  # things that a paper says
_UNSAID = 1  # things of its kind that are asked and not said


def notices(draw: random.Random, count: int, part: str = "train") -> Iterator[tuple[str, str, str]]:
    """Give (paper, question, answer) for each thing that a paper says, and "" for one that it does not.

    Args:
        draw: chance.
        count: papers.
        part: "validation" or "evaluation" for kinds that are never learnt from, to fit with and to measure with.
    """
    wording = _wording()
    held = [name for names in wording["parts"].values() for name in names]
    kinds = wording["parts"].get(part) or [name for name in wording["kinds"] if name not in held]
    for _ in range(count):
        kind = wording["kinds"][draw.choice(kinds)]
        thing = draw.choice(kind["things"])
        facts = draw.sample(kind["facts"], draw.randint(_FEWEST, min(_MOST, len(kind["facts"]) - _UNSAID)) + _UNSAID)
        said, answers = [], []
        for fact in facts[_UNSAID:]:
            answers.append(_value(fact["kind"], draw))
            told = draw.choice(fact["says"])
            if told.startswith("{}"):
                answers[-1] = _begun(answers[-1])
            said.append(_begun(told.format(answers[-1], thing=thing).replace("..", ".")))
        paper = draw.choice(wording["openings"]) + draw.choice((" ", " ", "\n")).join(said)
        for fact, answer in zip(facts, [""] * _UNSAID + answers, strict=True):
            question = draw.choice(fact["asks"]).format(thing=thing)
            put = draw.choice(wording["put"])
            yield paper, put.format(question if put.endswith("{}") else question.removesuffix("?")), answer


@cache
def _wording() -> dict[str, Any]:
    text = files("l2m_rag").joinpath("data/notices.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _value(kind: str, draw: random.Random) -> str:
    """Give a name, a sum, a date... as one would write it."""
    words = _wording()["words"]
    some: dict[str, str] = {name: draw.choice(values) for name, values in words.items()}
    if kind == "person":
        return draw.choice((f"{some['first']} {some['last']}", some["first"], f"{some['first'][0]}. {some['last']}"))
    if kind == "company":
        return f"{draw.choice((some['firm'], some['last'], some['city']))} {some['form']}"
    if kind == "date":
        day, year = draw.randint(1, 28), draw.randint(2015, 2031)
        month = words["month"].index(some["month"]) + 1
        return draw.choice(
            (
                f"{day} {some['month']} {year}",
                f"{day} {some['month']}",
                f"{some['month']} {day}, {year}",
                f"{year}-{month:02d}-{day:02d}",
            )
        )
    if kind == "money":
        sum_ = draw.choice((draw.randint(2, 99), 10 * draw.randint(10, 99), 50 * draw.randint(20, 900)))
        cents = f".{draw.randint(5, 99):02d}" if sum_ < 1000 and draw.random() < 0.3 else ""
        return draw.choice(("{} euros", "{} dollars", "${}", "€{}", "{} EUR", "£{}", "{} francs")).format(
            f"{sum_:,}{cents}"
        )
    if kind == "span":
        number = draw.choice((some["number"], str(draw.randint(2, 90))))
        return f"{number} {some['unit']}"
    if kind == "number":
        return draw.choice((some["number"], str(draw.randint(2, 400))))
    if kind == "time":
        hour = draw.randint(6, 21)
        return draw.choice((f"{hour}:{draw.choice((0, 15, 30, 45)):02d}", f"{(hour - 1) % 12 + 1} {'ap'[hour > 11]}m"))
    if kind == "code":
        return f"{draw.choice('ABCDEFGHKLMNPRST')}{draw.choice(('-', '', '/'))}{draw.randint(100, 99999)}"
    if kind == "phone":
        return f"0{draw.randint(20, 999)} {draw.randint(10000, 999999)}"
    if kind == "place":
        return some["place"].format(n=draw.randint(1, 40), c=some["colour"])
    measures = {
        "percent": ("{} %", "{} percent"),
        "weight": ("{} kg", "{} grams", "{} kilograms"),
        "temperature": ("{} degrees", "{} °C"),
        "area": ("{} hectares", "{} acres", "{} square metres"),
        "distance": ("{},000 km", "{},000 miles"),
    }
    return draw.choice(measures[kind]).format(draw.randint(2, 90)) if kind in measures else some[kind]
