"""The language of bAbI read back: its files, the answers to its questions, and BABILong's metric.

`answer` shares no state with the `World` that made a story: it looks back through what was said, so that the two check
each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from l2m_rag.errors import UsageError
from l2m_rag.worlds import TASKS, Meaning, carried_over, inverses, language, read


@dataclass(frozen=True, slots=True)
class Story:
    """A story with a question that it answers.

    Args:
        task: "qa1".."qa10".
        sentences: what happens, in order.
        question: asked after the last sentence.
        answer: as bAbI writes it; lists are joined by commas in the order in which the things came into the hand.
        support: indexes of the sentences that the answer follows from, ascending; all that bear on a count or list.
    """

    task: str
    sentences: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def known_task(task: str) -> str:
    """Give the name back.

    Raises:
        UsageError: there is no such task.
    """
    if task not in TASKS:
        raise UsageError(f"no task named {task!r}; known: {', '.join(TASKS)}")
    return task


def parse_babi(text: str, task: str) -> list[Story]:
    """Read a file of bAbI: numbered sentences, and questions with their answer and supports after tabs.

    Raises:
        UsageError: a line is none of these; the text names it.
    """
    known_task(task)
    found = []
    sentences: dict[int, str] = {}
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        number, _, rest = line.strip().partition(" ")
        parts = [part.strip() for part in rest.split("\t")]
        if not number.isdigit() or not parts[0] or len(parts) == 2:
            raise UsageError(
                f"line {at} of {task} is not 'N sentence' or 'N question<TAB>answer<TAB>supports': {line!r}"
            )
        if int(number) == 1:
            sentences = {}
        if len(parts) == 1:
            sentences[int(number)] = parts[0]
            continue
        order = list(sentences)
        try:
            support = tuple(sorted(order.index(int(one)) for one in parts[2].split()))
        except ValueError:
            raise UsageError(f"line {at} of {task}: supports {parts[2]!r} are not sentences of the story") from None
        found.append(Story(task, tuple(sentences.values()), parts[0], parts[1], support))
    return found


def answer(sentences: Sequence[str], question: str, task: str, *, carry_over: bool = False) -> str:
    """Answer a question by reading the sentences; those in no language of bAbI are passed over as noise.

    Args:
        sentences: the story, or the text it is hidden in.
        question: in the words of bAbI or of a renamed story.
        task: "qa1".."qa10".
        carry_over: what an "either" means (qa10). The last statement about a person counts, says the wording, and
            BABILong has one support a question. The generator of shared/data/babi instead keeps what was known before
            ("Mary is in the garden. Mary is either in the garden or in the office." puts her in the garden), and
            takes the second place for certain when it knew of neither; True reads as it does.

    Raises:
        UsageError: the question is not one of the task.
    """
    heard = read(question)
    if heard is None or heard[1].kind not in TASKS[known_task(task)].questions:
        raise UsageError(f"{question!r} is not a question of {task}")
    name, asked = heard
    facts = [found[1] for sentence in sentences if (found := read(sentence))]
    if asked.kind == "is_in":
        return _is_in([fact for fact in facts if fact.person == asked.person], asked.place, carry_over)
    if asked.kind in ("count", "list"):
        held = _held(facts, asked.person)
        return language(name).counts[len(held)] if asked.kind == "count" else ",".join(held) or "nothing"
    if asked.kind in ("what_is", "of_what"):
        return _lies(facts, asked)
    if asked.kind == "where_thing":
        return _trail(facts, asked.thing)[-1]
    if asked.kind == "before":
        return before(facts, asked)
    for fact in reversed(facts):
        if asked.kind == "where_person" and fact.kind == "move" and fact.person == asked.person:
            return fact.place
        if fact.kind == "give" and asked == replace(
            asked,
            person=asked.person and fact.person,
            thing=asked.thing and fact.thing,
            other=asked.other and fact.other,
        ):
            sought = {"gave_what": fact.thing, "gave_whom": fact.other, "received": fact.other}
            return sought.get(asked.kind, fact.person)
    return ""


def _is_in(said: Sequence[Meaning], place: str, carry_over: bool) -> str:
    if carry_over and said and said[-1].kind == "either":
        possible = carried_over(said)
        return "no" if place not in possible else "maybe" if len(possible) > 1 else "yes"
    for fact in reversed(said):
        if fact.kind == "either":
            return "maybe" if place in (fact.place, fact.other) else "no"
        if fact.kind not in ("out", "gone"):
            return "yes" if place == fact.place else "no"
        if fact.place == place:
            return "no"
    return "maybe"


def _held(facts: Sequence[Meaning], person: str) -> list[str]:
    held: list[str] = []
    for fact in facts:
        if fact.kind not in ("take", "drop", "give"):
            continue
        if fact.thing in held:
            held.remove(fact.thing)
        if person == (fact.other if fact.kind == "give" else fact.person if fact.kind == "take" else ""):
            held.append(fact.thing)
    return held


def _lies(facts: Sequence[Meaning], asked: Meaning) -> str:
    opposite = inverses()
    wanted = asked.relation if asked.kind == "what_is" else opposite[asked.relation]
    for fact in reversed(facts):
        if (fact.relation, fact.other) == (wanted, asked.place):
            return fact.place
        if (fact.relation, fact.place) == (opposite[wanted], asked.place):
            return fact.other
    return ""


def before(facts: Sequence[Meaning], asked: Meaning) -> str:
    """Give the place where a thing was before the last time it came to another; "" when nobody says so."""
    trail = _trail(facts, asked.thing)
    last = max((index for index, place in enumerate(trail) if place == asked.place), default=0)
    return trail[last - 1] if last else ""


def _trail(facts: Sequence[Meaning], thing: str) -> list[str]:
    """Give the places where a thing was, in order; "" before anyone says so."""
    where: dict[str, str] = {}
    trail, bearer = [""], ""
    for fact in facts:
        if fact.kind == "move":
            where[fact.person] = fact.place
        elif fact.thing == thing:
            bearer = "" if fact.kind == "drop" else fact.other or fact.person
        place = where.get(fact.person, "")
        if place and place != trail[-1] and (fact.thing == thing or fact.person == bearer):
            trail.append(place)
    return trail


def correct(output: str, story_answer: str, question: str, labels: Sequence[str]) -> bool:
    """Whether an output is right by BABILong's metric.

    The labels found in the first sentence, less those of the question, must be the answer and nothing else. Labels
    are found inside words, as in BABILong, except when one holds another ("none", "one"): then as whole words.
    """
    known = {label.lower() for label in labels}
    whole = any(one != other and one in other for one in known for other in known)

    def found(text: str) -> set[str]:
        if whole:
            return {label for label in known if re.search(rf"\b{re.escape(label)}\b", text)}
        return {label for label in known if label in text}

    first = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    return found(first) - found(question.lower()) == set(story_answer.lower().split(","))
