"""Stories in the language of bAbI without end, decoys beside them, and noise to hide them in.

The world in which they happen and its wording are in `l2m_rag.worlds`; `l2m_rag.babi` reads them back.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from l2m_rag.babi import Story, answer, before, correct, known_task, parse_babi
from l2m_rag.errors import UsageError
from l2m_rag.worlds import TASKS, Language, Meaning, World, labels, language, read

__all__ = ["Hidden", "Story", "answer", "correct", "decoys", "hide", "labels", "parse_babi", "stories"]

MIN_NOISE_TOKENS = 10
"""Shorter noise sentences (headings, "he said") are passed over, as in BABILong."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A story hidden in noise; `support` are indexes into all of `sentences`."""

    sentences: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    task: str


def stories(task: str, *, seed: int, facts: tuple[int, int] = (2, 20), renamed: bool = False) -> Iterator[Story]:
    """Give fresh stories without end, the same ones for the same arguments.

    Half of them are worded like the sets of shared/data/babi, half like the published bAbI. "Is X in Y?" after an
    "either" is asked only where bAbI's two readings agree (see `answer`).

    Args:
        task: "qa1".."qa10".
        seed: of the stories.
        facts: fewest and most sentences of a story; a map (qa4) has at most one less than there are places.
        renamed: draw people, places, things and verbs per story from other, larger vocabularies.

    Raises:
        UsageError: there is no such task, or none of its questions can be asked of so few sentences.
    """
    rules = TASKS[known_task(task)]
    fewest, most = facts
    if not 1 <= fewest <= most or most < rules.fewest:
        raise UsageError(
            f"facts ({fewest}, {most}) must be (fewest, most), with most at least {rules.fewest} for {task}"
        )
    return _stories(task, random.Random(f"{task} {seed} {facts} {renamed}"), max(fewest, rules.fewest), most, renamed)


def _stories(task: str, rng: random.Random, fewest: int, most: int, renamed: bool) -> Iterator[Story]:
    while True:
        name = "wide" if renamed else rng.choice(("generator", "release"))
        spoken = language(name, task).narrowed(rng) if renamed else language(name, task)
        limit = min(most, len(spoken.places) - 1) if task == "qa4" else most
        length = rng.randint(min(fewest, limit), limit)
        story = None
        while story is None:  # what has happened by chance may leave nothing to ask: begin again
            story = _Scene(task, spoken, rng).story(length)
        yield story


class _Scene:
    """A world in which people do what they can do where they are."""

    def __init__(self, task: str, spoken: Language, rng: random.Random) -> None:
        self.task, self.spoken, self.rng = task, spoken, rng
        self.world = World(spoken.counts)
        # people are busy to different degrees, so that long stories too have some who were seen once only
        self.busy = [0.05 + rng.random() ** 2 for _ in spoken.people]
        # and one is only ever said to be in either of two places, or "maybe" would be a rare answer
        self.unsure = rng.choice(spoken.people)
        self.cells = {rng.choice(spoken.places): (0, 0)}
        for person in spoken.people:
            self.world.position[person] = (rng.choice(spoken.places), -1)
        for thing in spoken.things:
            self.world.place_thing(thing, rng.choice(spoken.places))

    def step(self) -> bool:
        """Let one thing happen; False when nothing can, which is when the whole map is told."""
        events = TASKS[self.task].events
        if "relation" in events and len(self.cells) == len(self.spoken.places):
            return False
        while True:
            kind = self.rng.choices(list(events), list(events.values()))[0]
            if can := self._adjoin() if kind == "relation" else self._can(kind):
                fact = self.rng.choice(can)
                self.world.tell(fact)
                if kind == "gone":  # to a place that nobody says
                    self.world.position[fact.person] = (self._elsewhere(fact.place), -1)
                return True

    def _elsewhere(self, place: str) -> str:
        return self.rng.choice([other for other in self.spoken.places if other != place])

    def _can(self, kind: str) -> list[Meaning]:
        world = self.world
        person = self.rng.choices(self.spoken.people, self.busy)[0]
        here, said = world.position[person]
        if person == self.unsure and "either" in TASKS[self.task].events:
            if earlier := world.statements[person]:
                return [earlier[-1][0]]
            kind = "either"
        if kind in ("move", "out"):
            return [Meaning(kind, person, place=self._elsewhere(here))]
        if kind in ("in", "gone"):  # nobody is "no longer" where he was never said to be
            return [Meaning(kind, person, place=here)] if kind == "in" or said >= 0 else []
        if kind == "either":
            place, other = self.rng.sample((here, self._elsewhere(here)), 2)
            return [Meaning(kind, person, place=place, other=other)]
        if kind == "take":
            near = [thing for thing in self.spoken.things if world.trail[thing][-1].place == here]
            return [Meaning(kind, person, thing) for thing in near if thing not in world.holder]
        held = world.things_of(person)
        if kind == "drop":
            return [Meaning(kind, person, thing) for thing in held]
        others = [other for other in self.spoken.people if other != person and world.position[other][0] == here]
        return [Meaning(kind, person, thing, other=other) for thing in held for other in others]

    def _adjoin(self) -> list[Meaning]:
        """Put a place beside one that is on the map."""
        pair = self.rng.randrange(2)
        relation, inverse = self.spoken.relations[pair]
        place = self.rng.choice([place for place in self.spoken.places if place not in self.cells])
        other, (x, y) = self.rng.choice(list(self.cells.items()))
        sign = self.rng.choice((1, -1))
        cell = (x, y + sign) if pair == 0 else (x + sign, y)
        if cell in self.cells.values():
            return []
        self.cells[place] = cell
        if sign < 0:
            relation, inverse = inverse, relation
        if self.rng.random() < 0.5:
            return [Meaning("relation", place=place, other=other, relation=relation)]
        return [Meaning("relation", place=other, other=place, relation=inverse)]

    def _questions(self, kind: str) -> list[Meaning]:
        world, spoken = self.world, self.spoken
        if kind in ("where_person", "count", "list"):
            return [Meaning(kind, person) for person in spoken.people]
        if kind == "where_thing":
            return [Meaning(kind, thing=thing) for thing in spoken.things]
        if kind == "before":
            return [
                Meaning(kind, thing=thing, place=at.place) for thing in spoken.things for at in world.trail[thing][1:]
            ]
        if kind == "is_in":
            return [Meaning(kind, person, place=place) for person in spoken.people for place in spoken.places]
        if kind in ("what_is", "of_what"):
            return [Meaning(kind, place=place, relation=relation) for relation, place in world.relations]
        gifts = [fact for fact in world.facts if fact.kind == "give"]
        asks = {"gave_what": "person other", "gave_whom": "person thing", "gave_who": "thing other"}.get(kind, "thing")
        return [Meaning(kind, **{part: getattr(gift, part) for part in asks.split()}) for gift in gifts]

    def story(self, length: int) -> Story | None:
        """Let so many things happen and ask one question.

        Each possible answer has the same chance, and for it each kind of sentence that may decide it: else most of
        the "no" would follow from where people are, and few from where they are not.
        """
        for _ in range(length):
            self.step()
        world, rng = self.world, self.rng
        kinds = [kind for kind in TASKS[self.task].questions if kind in self.spoken.wording]
        asked = [question for kind in kinds for question in self._questions(kind)]
        by_answer: dict[str, dict[str, list[tuple[Meaning, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(list))
        for question in asked:
            found = world.reply(question)
            if found and not (question.kind == "before" and self._hangs_on_a_drop(question, *found)):
                by_answer[found[0]][world.facts[found[1][-1]].kind].append((question, found[1]))
        if not by_answer:
            return None
        text = rng.choice(list(by_answer))
        question, support = rng.choice(by_answer[text][rng.choice(list(by_answer[text]))])
        sentences, asking = _say([*world.facts, question], self.spoken, rng)
        return Story(self.task, sentences, asking, text, support)

    def _hangs_on_a_drop(self, asked: Meaning, text: str, support: tuple[int, ...]) -> bool:
        """Whether the answer needs to hear that a thing was put down before its bearer came by again.

        That would be a fourth supporting fact.
        """
        facts = self.world.facts
        touches = [i for i, fact in enumerate(facts) if fact.thing == asked.thing and i not in support]
        return any(before(facts[:i] + facts[i + 1 :], asked) != text for i in touches)


def _say(meanings: Sequence[Meaning], spoken: Language, rng: random.Random) -> tuple[tuple[str, ...], str]:
    *sentences, question = [spoken.say(meaning, rng) for meaning in meanings]
    return tuple(sentences), question


def decoys(story: Story, rng: random.Random, count: int) -> tuple[str, ...]:
    """Give sentences of the same form that never change the answer.

    They are about people and things that the story does not name, at the places of its language (in qa4 about places
    that it does not name): first bAbI's own words, others when those are used up.
    """
    return _strangers(story, rng, count)


def _strangers(story: Story, rng: random.Random, count: int) -> tuple[str, ...]:
    wide = language("wide", story.task)
    told = [found for text in (*story.sentences, story.question) if (found := read(text))]
    used = {word for _, fact in told for word in (fact.person, fact.thing, fact.place, fact.other)}
    if used & {*wide.people, *wide.places}:
        spoken = wide
    else:
        spoken = language("release" if any(name == "release" for name, _ in told) else "generator", story.task)

    def unused(words: Sequence[str], more: Sequence[str], enough: int) -> tuple[str, ...]:
        fresh = [word for word in dict.fromkeys(words) if word not in used]
        spare = [word for word in more if word not in used and word not in fresh]
        return (*fresh, *rng.sample(spare, max(0, enough - len(fresh))))

    cast = replace(
        spoken,
        people=unused((*spoken.people, *spoken.strangers), wide.people, 3),
        things=unused(spoken.things, wide.things, 3),
        places=unused((*spoken.places, *language("release", "qa10").places), wide.places, 6)
        if story.task == "qa4"
        else spoken.places,
    )
    if spoken is wide:
        cast = cast.narrowed(rng)
    facts: list[Meaning] = []
    while len(facts) < count:
        scene = _Scene(story.task, cast, rng)
        while len(facts) < count and scene.step():
            facts.append(scene.world.facts[-1])
    return tuple(cast.say(fact, rng) for fact in facts)


def hide(
    story: Story,
    noise: Sequence[str],
    rng: random.Random,
    *,
    length: int,
    count: Callable[[str], int],
    decoys: int = 0,
) -> Hidden:
    """Hide a story in consecutive noise sentences, as BABILong does.

    The noise starts at a random place (past its end it goes on from its start) and sentences of less than
    `MIN_NOISE_TOKENS` are passed over; the facts keep their order and stand at sorted random gaps. BABILong cuts the
    last noise sentence to the exact length; here it is left out.

    Args:
        story: what to hide.
        noise: sentences in the order of their book.
        rng: decides where.
        length: of all sentences together, in tokens, at most.
        count: gives the number of tokens of a sentence.
        decoys: sentences of the story's form to hide beside it.

    Raises:
        UsageError: the story is longer than `length`, or the noise shorter.
    """
    others = _strangers(story, rng, decoys)
    room = length - sum(map(count, (*story.sentences, *others)))
    if room < 0:
        raise UsageError(f"the facts have {length - room} tokens, more than length {length}; give a greater length")
    start, background = rng.randrange(len(noise)) if noise else 0, list[str]()
    for sentence in (*noise[start:], *noise[:start]):
        tokens = count(sentence)
        if tokens < MIN_NOISE_TOKENS:
            continue
        if tokens > room:
            break
        background.append(sentence)
        room -= tokens
    else:
        if room >= MIN_NOISE_TOKENS:
            raise UsageError(f"the noise is {room} tokens short of length {length}; give more of it")
    hidden = len(story.sentences) + len(others)
    gaps = sorted(rng.choices(range(len(background) + 1), k=hidden))
    own = set(rng.sample(range(hidden), len(story.sentences)))
    facts, strangers = iter(story.sentences), iter(others)
    sentences: list[str] = []
    places: list[int] = []
    filled = 0
    for turn, gap in enumerate(gaps):
        sentences += background[filled:gap]
        filled = gap
        if turn in own:
            places.append(len(sentences))
        sentences.append(next(facts if turn in own else strangers))
    sentences += background[filled:]
    support = tuple(places[index] for index in story.support)
    return Hidden(tuple(sentences), story.question, story.answer, support, story.task)
