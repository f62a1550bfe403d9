"""Questions about the clauses of contracts: which passage holds one, what it says, and which passage does not.

They are from CUAD (Hendrycks et al., 2021), for which lawyers marked 41 kinds of clauses in each contract. A passage is
asked for the clauses that stand in it whole, in the data set's own words, and for those that it comes near to and does
not hold. Where the lawyers also wrote down what a clause says in a word or two ("New York", "60 days") and those words
stand in it, plain questions ask for them; their wording is in `data/contracts.json`.
"""

from __future__ import annotations

import json
import re
from calendar import month_name
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from l2m_rag.indexers.chunking import Tokenizer, split
from l2m_rag.memory_tiers.records import Parsed

LONGEST_CLAUSE = 280
"""Characters of a clause that is asked for whole: two thirds have no more."""
_LURES = 3  # clauses that a passage comes near to and does not hold
_EVERYWHERE = ("Document Name", "Parties", "Agreement Date", "Effective Date")
"""What may be read of passages that it was not marked in."""


def contracts(
    held: Iterable[dict[str, Any]], clauses: Iterable[dict[str, Any]], tokenizer: Tokenizer
) -> Iterator[tuple[str, str, str]]:
    """Give (passage, question, answer) for the clauses of contracts, "" for none.

    Args:
        held: contracts, with `doc_id` and `context`.
        clauses: what is marked in them, with `doc_id`, `category`, `question`, `answers`, `answer_starts` and
            `short_answer`; a kind of clause that a contract lacks has no answers.
        tokenizer: contracts are cut into chunks by.
    """
    marked: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in clauses:
        marked[row["doc_id"]].append(row)
    for contract in held:
        if contract["doc_id"] not in marked:  # it is cut for nothing
            continue
        whole = Parsed(contract["context"], "text/plain")
        for chunk in split(whole, contract["doc_id"], tokenizer, overlap=0):
            yield from _asked_of(chunk.text, marked[contract["doc_id"]], chunk.start)


def plain(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give plain questions about a kind of clause and the words of the contract that answer them.

    Args:
        row: what is marked in a contract, as of `contracts`.

    Yields:
        (question, answer), "" where there is no such clause; nothing where the clause says it in words that are not
        known.
    """
    said = next((said for clause in row["answers"] if (said := _said(row, clause))), "")
    if said or not (row["answers"] or row["category"] in _EVERYWHERE):
        for question in _wording().get(row["category"], []):
            yield question, said


def _asked_of(passage: str, clauses: list[dict[str, Any]], start: int) -> Iterator[tuple[str, str, str]]:
    """Give what is asked of a passage that begins at a place of its contract; nothing where it holds no clause."""
    held, away = [], []
    for row in clauses:
        marked = list(zip(row["answers"], row["answer_starts"], strict=True))
        here = [
            text.strip() for text, at in marked
            if at >= start and at + len(text) <= start + len(passage) and text.strip() in passage
        ]  # fmt: skip
        short = [text for text in here if len(text) <= LONGEST_CLAUSE]
        if short:
            held.append((row, max(short, key=len) if row["category"] == "Parties" else short[0]))
        elif (
            not here
            and row["category"] not in _EVERYWHERE
            and not any(_touches(passage, start, *one) for one in marked)
        ):
            away.append(row)
    if not held:
        return
    for row, answer in held:
        yield passage, row["question"].strip(), answer
        for question, said in plain({**row, "answers": [answer]}):
            yield passage, question, said
    words = _words(passage)
    away.sort(key=lambda row: (-_share(row["category"] + " " + row["question"], words), row["id"]))
    for row in away[:_LURES]:
        yield passage, row["question"].strip(), ""
        for question, _ in plain({**row, "answers": []}):
            yield passage, question, ""


def _touches(passage: str, start: int, text: str, at: int) -> bool:
    """Say whether a part of a clause stands in a passage, or the clause itself once more."""
    return (at < start + len(passage) and at + len(text) > start) or text.strip() in passage


def _said(row: dict[str, Any], clause: str) -> str:
    """Give the words of a clause that the lawyers' short answer repeats, "" where none do.

    Of a place the first name will do ("Ontario, Canada"), a number may stand in brackets behind its name ("sixty (60)
    days"), and a day may be written out. The name of a contract is what is marked.
    """
    short = row["short_answer"]
    if row["category"] == "Document Name":
        return clause.strip()
    words = re.findall(r"\w+", short)
    if not words or words[0] in ("Yes", "No"):
        return ""
    ways = [_spelt(words), _spelt(re.findall(r"\w+", short.partition(",")[0]))]
    if len(words) == 3 and all(word.isdigit() for word in words):
        month, day, year = (int(word) for word in words)
        name, full = month_name[month % 13], year + (100 if year < 50 else 0) + (1900 if year < 100 else 0)
        ways = [
            rf"{name}\W+0?{day}(?:st|nd|rd|th)?\W+{full}",
            rf"{day}(?:st|nd|rd|th)?\W+(?:day of\W+)?{name}\W+{full}",
        ]
    return next((found[0] for way in ways if (found := re.search(way, clause))), "")


def _spelt(words: list[str]) -> str:
    """Give a pattern of words with little between them, and with a number's name before it."""
    if not words:
        return r"(?!)"
    name = r"(?:[\w-]+ ?\()?" if words[0].isdigit() else ""
    return rf"\b{name}" + r"\W{1,3}".join(map(re.escape, words)) + r"\b"


def _share(text: str, words: frozenset[str]) -> float:
    """Give the share of a text's words that are among others."""
    own = _words(text)
    return len(own & words) / max(1, len(own))


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in re.findall(r"[a-z]{4,}", text.lower()))


@cache
def _wording() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(
        files("l2m_rag").joinpath("data/contracts.json").read_text(encoding="utf-8")
    )
    return found
