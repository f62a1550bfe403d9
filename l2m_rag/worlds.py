"""Worlds of people, things and places: what happens, what can be asked, and the words for it.

A `World` is told what happens and knows, of everything it answers, which sentences say so. The wording is in
`data/words.json`, in three languages: "generator" (the sets of shared/data/babi: "holding", "zero"), "release" (the
published bAbI v1.2, which BABILong hides in books: "carrying", "none", "picked up ... there") and "wide", which shares
only function words with the others. Written from scratch; only the wording and the meaning of the tasks are bAbI's.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a sentence says or a question asks, whatever its words.

    Args:
        kind: a key of "facts" or "questions" in words.json.
        person: who acts; of a gift, who gives.
        other: who is given to; the second place of "either" and of a relation.
        relation: "north": `place` lies north of `other`.
    """

    kind: str
    person: str = ""
    thing: str = ""
    place: str = ""
    other: str = ""
    relation: str = ""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What happens in a task (with how often), what is asked, and how few sentences can be asked about."""

    events: dict[str, float]
    questions: tuple[str, ...]
    fewest: int = 1


_HANDS = {"move": 4.0, "take": 3.0, "drop": 1.0, "give": 2.0}
TASKS = {
    "qa1": _Rules({"move": 1.0}, ("where_person",)),
    "qa2": _Rules({"move": 2.0, "take": 2.0, "drop": 1.0}, ("where_thing",), fewest=2),
    "qa3": _Rules({"move": 2.0, "take": 2.0, "drop": 1.0}, ("before",), fewest=3),
    "qa4": _Rules({"relation": 1.0}, ("what_is", "of_what")),
    "qa5": _Rules(
        {"move": 4.0, "take": 2.0, "give": 2.0}, ("gave_what", "gave_whom", "received", "gave", "gave_who"), 2
    ),
    "qa6": _Rules({"move": 1.0}, ("is_in",)),
    "qa7": _Rules(_HANDS, ("count",)),
    "qa8": _Rules(_HANDS, ("list",)),
    "qa9": _Rules({"move": 3.0, "in": 2.0, "out": 1.0, "gone": 1.0}, ("is_in",)),
    "qa10": _Rules({"move": 2.0, "in": 2.0, "either": 2.0}, ("is_in",)),
}


@dataclass(frozen=True, slots=True)
class Language:
    """The words and the wording of a language; `verbs` of "give" are "past|base|participle"."""

    name: str
    people: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    verbs: dict[str, tuple[str, ...]]
    wording: dict[str, tuple[str, ...]]
    relations: tuple[tuple[str, str], ...]
    counts: tuple[str, ...]
    strangers: tuple[str, ...]

    def say(self, meaning: Meaning, rng: random.Random) -> str:
        """Put a meaning into words, one of its wordings at random."""
        verbs = self.verbs.get(meaning.kind if meaning.kind in self.verbs else "give", ())
        past, base, participle = (rng.choice(verbs) + "||").split("|")[:3]
        words = {name: getattr(meaning, name) for name in ("person", "thing", "place", "other", "relation")}
        template = rng.choice(self.wording[meaning.kind])
        return template.format(verb=past, base=base, participle=participle, **words)

    def narrowed(self, rng: random.Random) -> Language:
        """Give the language of one story: a few of the words, and one verb of giving, which its question takes up."""
        few = {"move": 4, "take": 3, "drop": 3, "give": 1}
        return replace(
            self,
            people=_some(rng, self.people, rng.randint(4, 6)),
            places=_some(rng, self.places, rng.randint(6, 8)),
            things=_some(rng, self.things, rng.randint(3, 4)),
            verbs={kind: _some(rng, verbs, few[kind]) for kind, verbs in self.verbs.items()},
            relations=tuple(rng.sample(self.relations, 2)),
        )


def _some(rng: random.Random, words: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(rng.sample(words, min(count, len(words))))


@cache
def _words() -> dict[str, Any]:
    text = files("l2m_rag").joinpath("data/words.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


@cache
def language(name: str, task: str = "") -> Language:
    """Give the language "generator", "release" or "wide", with the cast that it has in the task."""
    entry = _words()[name]
    entry = entry | entry["casts"].get(task, {})
    verbs = {
        kind: tuple(verb if isinstance(verb, str) else "|".join(verb) for verb in entry["verbs"][kind])
        for kind in entry["verbs"]
    }
    return Language(
        name=name,
        verbs=verbs,
        wording={kind: tuple(templates) for kind, templates in (entry["facts"] | entry["questions"]).items()},
        relations=tuple((one, inverse) for one, inverse in entry["relations"]),
        **{part: tuple(entry[part]) for part in ("people", "places", "things", "counts", "strangers")},
    )


_SLOT = re.compile(r"\\{(\w+)\\}")


@cache
def _patterns() -> list[tuple[str, str, re.Pattern[str]]]:
    spoken = [language(name) for name in _words()]
    return [
        (one.name, kind, _pattern(one, kind, template))
        for one in spoken
        for kind, templates in one.wording.items()
        for template in templates
    ]


def _pattern(spoken: Language, kind: str, template: str) -> re.Pattern[str]:
    verbs = [verb.split("|") for verb in spoken.verbs.get(kind, spoken.verbs["give"])]
    slots = {
        "verb": "(?:" + "|".join(verb[0] for verb in verbs) + ")",
        "base": "(?:" + "|".join(verb[1] for verb in verbs if len(verb) > 1) + ")",
        "participle": "(?:" + "|".join(verb[-1] for verb in verbs) + ")",
        "relation": "(?P<relation>" + "|".join(relation for pair in spoken.relations for relation in pair) + ")",
    }
    return re.compile(_SLOT.sub(lambda slot: slots.get(slot[1], rf"(?P<{slot[1]}>\w+)"), re.escape(template)))


@lru_cache(maxsize=1 << 16)
def read(text: str) -> tuple[str, Meaning] | None:
    """Give the language of a sentence or question and what it means; None when it is in none of them (noise)."""
    for name, kind, pattern in _patterns():
        if found := pattern.fullmatch(text):
            return name, Meaning(kind, **found.groupdict())
    return None


def inverses() -> dict[str, str]:
    """Give the opposite of every relation, both ways."""
    pairs = [pair for name in _words() for pair in language(name).relations]
    return dict(pairs) | {inverse: one for one, inverse in pairs}


def labels(task: str, *, renamed: bool = False) -> tuple[str, ...]:
    """Give the words that answers to a task are made of: the labels of `correct`."""
    asked = TASKS[task].questions[0]
    if asked == "is_in":
        return ("maybe", "no", "yes") if task == "qa10" else ("no", "yes")
    words: set[str] = set()
    for spoken in (language(name, task) for name in (("wide",) if renamed else ("generator", "release"))):
        parts = {
            "gave_what": (spoken.people, spoken.things),
            "count": (spoken.counts,),
            "list": (spoken.things, ("nothing",)),
        }
        words.update(*parts.get(asked, (spoken.places,)))
    return tuple(sorted(words))


Answered = tuple[str, tuple[int, ...]]


class _Visit(NamedTuple):
    """A stay of a thing at a place.

    Args:
        said: the sentence that puts the one who touched it last at the place.
        touch: the sentence by which it came into the hand that brought it.
        arrival: the sentence that brought it.
    """

    place: str
    said: int
    touch: int
    arrival: int


class World:
    """The state of a world, with the index of the sentence that says each part of it (-1: nobody said so).

    Args:
        counts: the words for none, one, two..., as the language of the questions has them.
    """

    def __init__(self, counts: Sequence[str]) -> None:
        self.facts: list[Meaning] = []
        self.counts = counts
        self.position: dict[str, tuple[str, int]] = {}
        self.statements: dict[str, list[tuple[Meaning, int]]] = defaultdict(list)  # about where a person is
        self.holder: dict[str, str] = {}
        self.touched: dict[str, int] = {}
        self.trail: dict[str, list[_Visit]] = {}  # of a thing
        self.handled: dict[str, list[int]] = defaultdict(list)
        self.relations: dict[tuple[str, str], tuple[str, int]] = {}  # ("north", place): what lies north of it
        self.inverse = inverses()

    def tell(self, fact: Meaning) -> None:
        """Let a sentence happen."""
        index = len(self.facts)
        self.facts.append(fact)
        if fact.kind == "relation":
            self.relations[fact.relation, fact.other] = (fact.place, index)
            self.relations[self.inverse[fact.relation], fact.place] = (fact.other, index)
        elif fact.kind in ("take", "drop", "give"):
            self._touch(fact, index)
        else:
            self.statements[fact.person].append((fact, index))
            if fact.kind in ("move", "in"):
                self.position[fact.person] = (fact.place, index)
                for thing in self.things_of(fact.person):
                    self._arrive(thing, fact.person)

    def things_of(self, person: str) -> list[str]:
        """Give what a person holds, in the order in which it came into the hand."""
        return [thing for thing, holder in self.holder.items() if holder == person]

    def _touch(self, fact: Meaning, index: int) -> None:
        last = fact.other or fact.person
        for person in {fact.person, last}:
            self.handled[person].append(index)
        self.holder.pop(fact.thing, None)  # a thing that changes hands comes last in the new one
        if fact.kind != "drop":
            self.holder[fact.thing] = last
        self.touched[fact.thing] = index
        self._arrive(fact.thing, last)

    def _arrive(self, thing: str, person: str) -> None:
        place, said = self.position.get(person, ("", -1))
        trail = self.trail.setdefault(thing, [])
        if trail and place in ("", trail[-1].place):  # it was there before: only who says so is new
            trail[-1] = trail[-1]._replace(said=said)
        else:
            trail.append(_Visit(place, said, self.touched[thing], said))

    def place_thing(self, thing: str, place: str) -> None:
        """Let a thing be somewhere from the start, which nobody says."""
        self.trail[thing] = [_Visit(place, -1, -1, -1)]

    def reply(self, asked: Meaning) -> Answered | None:
        """Answer a question, with the sentences the answer follows from; None when it does not follow from any."""
        replies = {
            "where_person": self._where,
            "where_thing": self._where,
            "before": self._before,
            "is_in": self._is_in,
            "count": self._hold,
            "list": self._hold,
            "what_is": self._lies,
            "of_what": self._lies,
        }
        found = replies.get(asked.kind, self._gave)(asked)
        if found is None or min(found[1], default=-1) < 0:
            return None
        return found[0], tuple(sorted(set(found[1])))

    def _where(self, asked: Meaning) -> Answered | None:
        if asked.person:
            place, said = self.position.get(asked.person, ("", -1))
            return place, (said,)
        visit = self.trail.get(asked.thing, [_Visit("", -1, -1, -1)])[-1]
        return visit.place, (visit.said, self.touched.get(asked.thing, -1))

    def _before(self, asked: Meaning) -> Answered | None:
        trail = self.trail.get(asked.thing, [])
        for before, there in zip(trail[-2::-1], trail[:0:-1], strict=True):  # the last time counts
            if there.place == asked.place:
                return before.place, (before.said, there.touch, there.arrival)
        return None

    def _is_in(self, asked: Meaning) -> Answered | None:
        """Answer from the last statement; what bAbI's two readings of "either" answer differently is not answered."""
        said = self.statements[asked.person]
        if not said:
            return None
        last, index = said[-1]
        if last.kind in ("out", "gone"):
            return ("no", (index,)) if last.place == asked.place else None
        possible = [last.place, last.other] if last.kind == "either" else [last.place]
        carried = carried_over([fact for fact, _ in said])
        if asked.place in possible and (asked.place not in carried or len(carried) != len(possible)):
            return None
        return ("no" if asked.place not in possible else "maybe" if len(possible) > 1 else "yes"), (index,)

    def _hold(self, asked: Meaning) -> Answered | None:
        held = self.things_of(asked.person)
        text = self.counts[len(held)] if asked.kind == "count" else ",".join(held) or "nothing"
        return text, tuple(self.handled[asked.person])

    def _lies(self, asked: Meaning) -> Answered | None:
        relation = asked.relation if asked.kind == "what_is" else self.inverse[asked.relation]
        place, index = self.relations.get((relation, asked.place), ("", -1))
        return place, (index,)

    def _gave(self, asked: Meaning) -> Answered | None:
        part = {"gave_what": "thing", "gave_whom": "other", "received": "other"}.get(asked.kind, "person")
        for index in range(len(self.facts) - 1, -1, -1):
            gift = self.facts[index]
            known = ((asked.person, gift.person), (asked.thing, gift.thing), (asked.other, gift.other))
            if gift.kind == "give" and all(one in ("", other) for one, other in known):
                return getattr(gift, part), (index,)
        return None


def carried_over(said: Sequence[Meaning]) -> list[str]:
    """Give where a person may be by the reading of the generator of shared/data/babi, for moves, "in" and "either".

    It keeps what was known before an "either": the places both allow, or the second one named when they allow none.
    """
    possible: list[str] = []
    for fact in said:
        named = [fact.place, fact.other] if fact.kind == "either" else [fact.place]
        both = [place for place in named if place in possible]
        possible = named if len(named) == 1 or not possible else both or named[1:]
    return possible
