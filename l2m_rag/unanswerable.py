"""Questions that a passage looks as if it answered: changed by a word, or asked where their evidence was taken out.

The kinds are those that Rajpurkar et al. (2018, table 2) found people to write for SQuAD 2.0: an entity or a number
exchanged for another, an antonym, a negation; what they call mutual exclusion and impossible condition cannot be made
without understanding the passage, and evidence that is taken out stands in for them.
"""

from __future__ import annotations

import random
import re

from l2m_rag.clozes import names_in
from l2m_rag.reading_data import Material, Question, bare

PLAIN = ("squad", "qed", "qamr", "tweetqa", "fairytaleqa", "narrativeqa", "covidqa")
"""Sources whose questions have no answer when a name of them is exchanged. Another year or another party of a
comparison (timeqa, ropes) makes a question with another answer, and what is left out of a cloze may be anything."""
_OPPOSITES = [
    "first last", "largest smallest", "biggest smallest", "highest lowest", "oldest youngest", "longest shortest",
    "most least", "more less", "before after", "earliest latest", "early late", "north south", "northern southern",
    "east west", "eastern western", "increase decrease", "increased decreased", "rise fall", "won lost", "win lose",
    "begin end", "began ended", "start stop", "started stopped", "open close", "opened closed", "gain lose",
    "gained lost", "above below", "inside outside", "male female", "mother father", "brother sister", "son daughter",
    "husband wife", "king queen", "positive negative", "major minor", "old new", "ancient modern", "public private",
    "accept reject", "accepted rejected", "support oppose", "supported opposed", "allow forbid", "allowed forbidden",
    "always never", "buy sell", "bought sold", "birth death", "born killed", "happy sad", "good bad", "love hate",
    "strong weak", "rich poor", "left right", "day night", "summer winter", "cold hot", "maximum minimum",
]  # fmt: skip
_OPPOSITE = {one: other for pair in _OPPOSITES for a, b in [pair.split()] for one, other in ((a, b), (b, a))}
_VERB = re.compile(r"\b(?:is|are|was|were|did|does|has|had|could|would)(?= \w)")
_FEWEST = 3  # sentences of a passage of which one may be taken out


def twisted(question: str, passage: str, answer: str, draw: random.Random) -> str | None:
    """Give a question that reads much like one and that the passage does not answer.

    A name or number is exchanged for another of the passage, so that words alone do not tell. Some will have an answer
    by chance; none of them has the old one.

    Args:
        question: that the passage answers.
        passage: its words.
        answer: to the question, which is not put into it.
        draw: chance.

    Returns:
        The question, or None when nothing in it can be changed.
    """
    made: list[str] = []
    names = list(dict.fromkeys(one[0] for one in names_in(passage)))
    for match in names_in(question):
        if not match.start() or match[0].lower() in answer.lower():
            continue
        number = match[0][0].isdigit()
        others = [
            name for name in names if name[0].isdigit() == number and len(name) > 2
            and not _overlap(name, question) and not _overlap(name, answer)
            and (not number or len(name) == len(match[0]))
        ]  # fmt: skip
        if others:
            made.append(question[: match.start()] + draw.choice(others) + question[match.end() :])
    for word in re.finditer(r"\b[a-z]+\b", question):
        if word[0] in _OPPOSITE:
            made.append(question[: word.start()] + _OPPOSITE[word[0]] + question[word.end() :])
    verb = _VERB.search(question)
    if verb and not re.search(r"\b(?:not|never|no)\b|n't", question) and draw.random() < (0.15 if made else 0.4):
        made.append(f"{question[: verb.end()]}n't{question[verb.end() :]}")
    return draw.choice(made) if made else None


def _overlap(one: str, other: str) -> bool:
    return bool(set(bare(one).split()) & set(bare(other).split()))


def without(passage: str, answer: str) -> str | None:
    """Give a passage less its sentences that hold an answer; None when too little would be left, or it holds none."""
    sentences = re.split(r"(?<=[.!?]) +", passage)
    kept = [one for one in sentences if bare(answer) not in bare(one)]
    if len(sentences) < _FEWEST or not len(sentences) // 2 < len(kept) < len(sentences):
        return None
    text = " ".join(kept)
    return None if bare(answer) in bare(text) else text


def harder(material: Material, *, seed: int, cut: float = 0.5) -> Material:
    """Give the material with questions that have no answer in their own passage: those whose `answer` is empty.

    Args:
        material: to be added to; it is not changed.
        seed: of what is drawn.
        cut: share of the passages that come a second time less the evidence of one of their questions.
    """
    draw = random.Random(seed)
    questions = list(material.questions)
    passages, sources = list(material.passages), list(material.sources)
    near, lures = list(material.near), list(material.lures)
    for number, passage in enumerate(material.passages):
        if material.sources[number] not in PLAIN:
            continue
        asked = [material.questions[one] for one in material.asked[number] if not material.questions[one].free]
        taken = {bare(one.text) for one in asked}
        for one in asked:
            text = twisted(one.text, passage, one.answer, draw)
            if text and bare(text) not in taken:
                questions.append(Question(number, text, ""))
        if draw.random() >= cut or not asked:
            continue
        short = without(passage, draw.choice(asked).answer)
        if short:
            questions += [
                Question(len(passages), one.text, one.answer if one.answer in short else "") for one in asked
                if one.answer in short or bare(one.answer) not in bare(short)
            ]  # fmt: skip
            passages.append(short)
            sources.append(material.sources[number])
            near.append(list(material.near[number]))
            lures.append([lure for lure in material.lures[number] if material.questions[lure].passage != number])
    return Material(passages, sources, questions, near, lures)
