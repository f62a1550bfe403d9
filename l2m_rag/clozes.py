"""Questions made of texts that nobody asked about: a name, a number or a list left out of a sentence.

The texts are encyclopedia passages, books, meetings and papers of the data folder; the answer is what was left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from l2m_rag.errors import UsageError
from l2m_rag.probes import noise_sentences, sentences
from l2m_rag.tasks import WIKI, rows

Triple = tuple[str, str, str]
"""A passage, a question about it, and the answer, which stands in the passage."""

_NAME = re.compile(r"\b(?:[A-Z][\w'’.-]*\w(?: (?:of|the|de|and) (?=[A-Z])| (?=[A-Z]))?){1,5}|\b\d[\d,.]*\d\b")  # noqa: RUF001
_OPENS = re.compile(r"(?:^|[.!?:;\n]['\")]? +)\w+$")
_WORD = 80  # characters of a word with what stands before it
_ITEM = r"(?:(?:the|an?) )?(?:[A-Z][\w'’-]*(?: [A-Z][\w'’-]*){0,3}|[a-z][\w-]+)"  # noqa: RUF001
_LIST = re.compile(rf"(?<= )(?:{_ITEM}, ){{1,5}}{_ITEM},? (?:and|or) {_ITEM}(?= ?[.;,])")
_SPOKEN = re.compile(r"\{\w+\} ?| (?=[,.?!']|n't\b)")  # marks of a transcript, and its spaces before a stop
_WORDS = 110  # of a passage
_LONGEST = 1400  # characters of a paragraph, about 320 tokens
_FEWEST = 4  # words of a sentence
_CLOZE = "Fill in the blank: {}____{}"


def texts_of(kind: str, data: Path, draw: random.Random, most: int) -> list[str]:
    """Give at most so many passages of a kind, drawn from all of them.

    Args:
        kind: "wiki", "encyclopedia" (those and the paragraphs of other sets), "books", "meetings" or "papers".
        data: folder of the data sets.
        draw: chance.
        most: passages.

    Raises:
        UsageError: there are none in the folder.
    """
    if kind in ("wiki", "encyclopedia"):
        found = [row["text"] for name in WIKI for row in rows(data / name)]
        if kind == "encyclopedia":
            found += [untitled(row["context"]) for row in _rows(data, "boolq/dev")]
            found += [row["context"] for row in _rows(data, "selqa/dev_test")]
            found = list(dict.fromkeys(text for text in found if len(text) < _LONGEST))
    elif kind == "books":
        found = list(joined(noise_sentences(data / "books", at_least=_FEWEST, count=lambda text: len(text.split()))))
    elif kind == "meetings":
        found = [
            text
            for name in ("qmsum/train", "qmsum/val")
            for row in _rows(data, name)
            for text in joined(f"{who}: {_SPOKEN.sub('', said).strip()}" for who, said in row["turns"])
        ]
    else:
        found = [" ".join(row["contexts"]) for row in _rows(data, "pubmedqa/pqal_dev")]
        found += [text for row in _rows(data, "covidqa/docs") for text in joined(sentences(row["text"]))]
    found = [text for text in found if len(text) > 200]
    if not found:
        raise UsageError(f"there are no {kind} in {data}")
    draw.shuffle(found)
    return found[:most]


def untitled(passage: str) -> str:
    """Give a passage of BoolQ less the title that stands before it."""
    return passage.partition(" -- ")[2] or passage


def joined(pieces: Iterable[str], words: int = _WORDS) -> Iterator[str]:
    """Join consecutive sentences, or turns, to texts of at least so many words; what is left at the end is dropped."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece.split())
        if size >= words:
            yield " ".join(held)
            held, size = [], 0


def names_in(text: str) -> list[re.Match[str]]:
    """Give the names and numbers in a text; a single word that opens a sentence is seldom one."""
    return [one for one in _NAME.finditer(text) if not _OPENS.search(text, max(0, one.end() - _WORD), one.end())]


def clozes(texts: Iterable[str], draw: random.Random) -> Iterator[Triple]:
    """Give sentences with a name or number left out, asked of the passage: with the sentence in it, or taken out.

    It is taken out (an inverse cloze; Lee et al., 2019, section 4) where the name stands elsewhere in the passage too,
    so that the rest must tell.
    """
    for text in texts:
        parts = [one for one in re.split(r"(?<=[.!?]) +", text) if 40 < len(one) < 240]
        draw.shuffle(parts)
        for sentence in parts[:3]:
            names = [match for match in names_in(sentence) if match.start() and len(match[0]) > 2]
            if not names:
                continue
            name = draw.choice(names)
            rest = " ".join(text.replace(sentence, " ").split())
            kept = rest if name[0] in rest and len(rest) > 120 else text
            yield kept, _CLOZE.format(sentence[: name.start()], sentence[name.end() :]), name[0]


def lists(texts: Iterable[str], draw: random.Random) -> Iterator[Triple]:
    """Give sentences with an enumeration left out, which is the answer as a whole."""
    for text in texts:
        parts = [one for one in re.split(r"(?<=[.!?]) +", text) if 60 < len(one) < 300]
        draw.shuffle(parts)
        for sentence in parts:
            found = _LIST.search(sentence)
            if found and found.start() > 20 and len(found[0]) <= 100:
                yield text, _CLOZE.format(sentence[: found.start()], sentence[found.end() :]), found[0]
                break


def _rows(data: Path, name: str) -> Iterator[dict[str, Any]]:
    return rows(data / f"{name}.jsonl.zst")
