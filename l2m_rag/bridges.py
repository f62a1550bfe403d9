"""Questions that take two passages: one tells who is meant, the other what is asked of them.

Encyclopedia passages name one another; where one says that a film was directed by someone who has a passage too, that
passage can be asked for the director's birth without a name in the question. The kinds are the bridge questions of
HotpotQA (Yang et al., 2018, section 2); those of its training questions that are there come as they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from l2m_rag.tasks import rows

_NAME = r"[A-Z][\w.'’-]*(?:,? (?:(?:of|the|de|von|van) )?[A-Z][\w.'’-]*)+"  # noqa: RUF001
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"((?:\d{{1,2}} )?{_MONTH},? (?:\d{{1,2}}, ?)?\d{{4}}|\d{{3,4}})\b"
_HE = re.compile(r"\b(?:he|his|him)\b", re.IGNORECASE)
_SHE = re.compile(r"\b(?:she|her)\b", re.IGNORECASE)
_WORKS = {
    "directed": "director", "produced": "producer", "written": "writer", "composed": "composer",
    "performed": "performer", "recorded": "performer", "sung": "singer",
}  # fmt: skip
_KIN = {"son": "parent", "daughter": "parent", "child": "parent", "wife": "spouse", "husband": "spouse"}
_MEANT = re.compile(
    rf"\b(?:(?P<work>{'|'.join(_WORKS)})(?: and \w+)? by|(?P<kin>{'|'.join(_KIN)}) of|(?P<wed>married)(?: to)?)"
    rf"(?: (?:the )?(?:[a-z-]+ ){{0,3}})? ?(?P<name>{_NAME})(?!,? (?:\d|[A-Z]))"
)
_TOLD = (
    (re.compile(rf"\bborn(?: on| in)? {_DATE}"), ("When was {} born?", "What is the date of birth of {}?")),
    (
        re.compile(rf"(?:\bdied(?: on| in)? |\bborn [^()]{{0,60}}? ?[-–] ?){_DATE}"),  # noqa: RUF001
        ("When did {} die?", "What is the date of death of {}?"),
    ),
    (
        re.compile(rf"\bborn (?:(?:on )?{_DATE},? )?(?:in|at) (?P<told>[A-Z][\w'-]+(?:,? [A-Z][\w'-]+)*)"),
        ("Where was {} born?", "What is the place of birth of {}?"),
    ),
    (
        re.compile(r"\b(?:is|was) an? (?P<told>[A-Z][a-z]+(?:[- ][A-Z][a-z]+)*) [a-z]"),
        ("What nationality is {}?", "What is the nationality of {}?", "Which country is {} from?"),
    ),
    (
        re.compile(r"\b(?:best|mainly|mostly|well) known for (?P<told>[^.;,()]{8,80}?)(?= and |[.;,(])"),
        ("What is {} known for?", "What is {} best known for?"),
    ),
    (re.compile(rf"\b(?:son|daughter|child) of (?P<told>{_NAME})"), ("Who is a parent of {}?", "Whose child is {}?")),
)


class Bridge(NamedTuple):
    """A question; its answer stands in `passage`, and `beside` tells whom or what it means."""

    passage: str
    question: str
    answer: str
    beside: str


def bridges(texts: Mapping[str, str], draw: random.Random) -> Iterator[Bridge]:
    """Make questions of passages by their titles."""
    named: dict[str, list[str]] = {}
    for title, text in texts.items():
        named.setdefault(_plain(title), []).append(text)
    for title, beside in texts.items():
        plain = _plain(title)
        for meant in _MEANT.finditer(beside):
            name = meant["name"].rstrip(".")
            held = named.get(name, [])
            if len(held) != 1 or held[0] == beside or plain == name or plain not in beside:
                continue
            passage = held[0]
            who = f"the {_role(meant, passage)} of {_called(plain, title, beside, draw)}"
            for pattern, asks in _TOLD:
                told = pattern.search(passage)
                answer = (told.groupdict().get("told") or told[1]) if told else ""
                if answer and answer not in beside and answer not in who:
                    yield Bridge(passage, draw.choice(asks).format(who), answer, beside)


def _plain(title: str) -> str:
    """Give a title without what tells it from others of the name, as "(film)"."""
    return re.sub(r" \(.*\)$", "", title)


def _role(meant: re.Match[str], passage: str) -> str:
    """Say what the one who is meant is to the other."""
    if meant["work"]:
        return _WORKS[meant["work"]]
    kin = "spouse" if meant["wed"] else _KIN[meant["kin"]]
    he, she = len(_HE.findall(passage)), len(_SHE.findall(passage))
    if he == she:
        return kin
    return {"parent": ("father", "mother"), "spouse": ("husband", "wife")}[kin][she > he]


def _called(plain: str, title: str, text: str, draw: random.Random) -> str:
    """Give a title as it is put into a question, with what it is as often as not."""
    kind = re.search(r"\b(film|song|album|novel|series)\b", f"{title} {text[:200]}")
    return f"the {kind[1]} {plain}" if kind and draw.random() < 0.5 else plain


def hotpot(path: Path) -> Iterator[Bridge]:
    """Give the bridge questions of a part of HotpotQA whose answer stands in just one of their two passages."""
    for row in rows(path):
        wanted = dict.fromkeys(title for title, _ in row["supporting_facts"])
        found = {title: "".join(parts) for title, parts in row["context"] if title in wanted}
        holding = [text for text in found.values() if re.search(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", text)]
        others = [text for text in found.values() if text not in holding]
        if len(holding) == 1 and len(others) == 1:
            yield Bridge(holding[0], row["question"].strip(), row["answer"], others[0])


def titled(found: Iterator[dict[str, Any]]) -> dict[str, str]:
    """Give texts by their titles; of the same title the first."""
    texts: dict[str, str] = {}
    for row in found:
        texts.setdefault(row["title"], " ".join(row["text"].split()))
    return texts
