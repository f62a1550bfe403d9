"""Question sets: questions with their gold answers and documents, to measure on and to fit with.

A set is read from JSON lines, zstd or plain, in whatever of the usual shapes they come: the passage in the line
("context") or in a file of documents ("doc_id"), answers as strings or as {"text"}, "answerable" or "is_impossible".
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2m_rag.contracts import plain
from l2m_rag.errors import MissingExtraError, UsageError
from l2m_rag.notices import notices

DATA = "L2M_DATA"
"""Environment variable that names the folder of the data sets."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question with what is known of its answer.

    Args:
        id: of the question.
        question: its text.
        answers: the gold answers, each sufficient; empty when there is none or none is known.
        document: the document that holds an answer (or would, were there one), "" when it is not known.
        answerable: whether the document holds an answer.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    document: str = ""
    answerable: bool = True


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Questions and the documents they are asked of.

    Args:
        name: of the set.
        documents: text by document id, distractors among them; empty when the questions are for a collection.
        tasks: the questions.
        alone: whether each question is about its own document only, as others of the kind answer it otherwise.
    """

    name: str
    documents: dict[str, str]
    tasks: list[Task]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class _Files:
    """Where a set lies below the data folder, which part of it is meant, and whether it may be trained on.

    A set without a file of questions is made of so many notices (`l2m_rag.notices`). Those that are plain ask what is
    marked in contracts in other words (`l2m_rag.contracts`). What is asked of each document is asked of it alone.
    """

    questions: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    distractors: tuple[str, ...] = ()
    part: str = ""
    train: bool = False
    notices: int = 0
    plain: bool = False
    alone: bool = False


WIKI = ("wiki_passages/2wiki_corpus.jsonl.zst", "wiki_passages/hotpot_corpus.jsonl.zst")
"""Files of encyclopedia passages, below the data folder."""
_SQUAD2 = "squad_subset/squad2_small.jsonl.zst"
_CUAD, _CONTRACTS = ("cuad/qa.jsonl.zst",), ("cuad/contracts.jsonl.zst",)

SETS = {
    # squad2's paragraphs stand among the passages of xquad: 7,430 in all
    "xquad": _Files(("squad_subset/xquad_en.jsonl.zst",), distractors=(_SQUAD2, *WIKI)),
    "squad2": _Files((_SQUAD2,), distractors=("squad_subset/xquad_en.jsonl.zst", *WIKI)),
    "squad-train": _Files(("squad/squad11_train_subset.jsonl.zst",), distractors=WIKI, train=True),
    "nq": _Files(("nq_oracle/dev.jsonl.zst",), distractors=WIKI),
    "clapnq": _Files(("clapnq/dev.jsonl.zst",), distractors=WIKI),
    "policyqa": _Files(("policyqa/dev.jsonl.zst",)),
    "tweetqa": _Files(("tweetqa/dev.jsonl.zst",)),
    "ropes": _Files(("ropes/dev.jsonl.zst",)),
    "covidqa": _Files(("covidqa/qa.jsonl.zst",), documents=("covidqa/docs.jsonl.zst",), train=True),
    "multispanqa": _Files(("multispanqa/dev.jsonl.zst",), train=True),  # to fit on: the reader learns nothing from it
    "selqa": _Files(("selqa/dev_test.jsonl.zst",), distractors=WIKI, train=True),  # as that
    "boolq": _Files(("boolq/dev.jsonl.zst",), part="evaluation"),
    "notices": _Files(notices=120, part="evaluation", alone=True),
    "notices-valid": _Files(notices=40, part="validation", train=True, alone=True),
    # long documents, one at a time
    "cuad": _Files(_CUAD, documents=_CONTRACTS, part="evaluation", alone=True),
    "contracts": _Files(_CUAD, documents=_CONTRACTS, part="evaluation", plain=True, alone=True),
    "contracts-valid": _Files(_CUAD, documents=_CONTRACTS, part="validation", train=True, plain=True, alone=True),
    "timeqa": _Files(("timeqa/qa_train.jsonl.zst",), documents=("timeqa/docs.jsonl.zst",), part="evaluation"),
    "timeqa-valid": _Files(
        ("timeqa/qa_train.jsonl.zst",), documents=("timeqa/docs.jsonl.zst",), part="validation", train=True
    ),
    "fairytaleqa": _Files(("fairytaleqa/dev.jsonl.zst",), documents=("fairytaleqa/stories.jsonl.zst",)),
    "hotpotqa": _Files(("hotpotqa/distractor_500.jsonl.zst",)),
}

SUITES = {
    "default": ("xquad", "squad2", "nq", "policyqa", "tweetqa", "ropes"),
    "long": ("cuad", "timeqa", "fairytaleqa", "hotpotqa"),
}
"""Sets that are measured together: short passages, and long documents that are searched one at a time."""


def part_of(document: str) -> str:
    """Give the part that a document of timeqa or cuad belongs to, by its id alone; one of boolq by its text.

    It is "train" for four in five; the others are "evaluation" and "validation" in turn.
    """
    number = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 10
    return {0: "evaluation", 5: "validation"}.get(number, "train")


def data_folder(given: Path | None = None) -> Path:
    """Give the folder of the data sets: the one given, `$L2M_DATA`, or `shared/data` beside the working folder.

    Raises:
        UsageError: there is no such folder.
    """
    named = given or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    places = [named] if named else [Path.cwd() / "shared/data", Path.cwd().parent / "shared/data"]
    for place in places:
        if place.is_dir():
            return place
    raise UsageError(f"there are no data sets in {places[-1]}; give their folder with --data DIR or {DATA}")


def load_set(name: str, data: Path | None = None) -> TaskSet:
    """Read one of `SETS`.

    Args:
        name: of the set.
        data: folder of the data sets (`data_folder`), which a set that is made here does without.

    Raises:
        UsageError: there is no such set, no such folder, or a file of it is missing.
    """
    if name not in SETS:
        raise UsageError(f"no question set named {name!r}; known: {', '.join(SETS)}")
    files = SETS[name]
    documents: dict[str, str] = {}
    names: dict[str, str] = {}  # id by text, so that a passage that stands in two files is one document
    for file in files.documents:
        for row in rows(data_folder(data) / file):
            text = row.get("text") or row.get("context") or "\n\n".join(row["sections"])
            documents[f"{row['doc_id']}.txt"] = str(text)
    tasks = []
    for number, (paper, question, answer) in enumerate(notices(random.Random(name), files.notices, files.part)):
        told = (answer,) if answer else ()
        tasks.append(Task(str(number), question, told, _document(paper, names, documents), bool(answer)))
    for file in files.questions:
        for row in rows(data_folder(data) / file):
            if files.part and part_of(str(row.get("doc_id") or row["context"])) != files.part:
                continue
            document = f"{row['doc_id']}.txt" if files.documents else _document(row["context"], names, documents)
            if files.plain:
                tasks += [
                    Task(f"{row['id']} {number}", question, (answer,) if answer else (), document, bool(answer))
                    for number, (question, answer) in enumerate(plain(row))
                ]
            else:
                tasks.append(_task(row, document))
    if files.documents:  # of those only what is asked about
        asked = {task.document for task in tasks}
        documents = {name: text for name, text in documents.items() if name in asked}
    for file in files.distractors:
        for row in rows(data_folder(data) / file):
            _document(row.get("context") or row["text"], names, documents)
    return TaskSet(name, documents, tasks, alone=files.alone)


def load_file(path: Path) -> TaskSet:
    """Read a user's own questions: lines of {"question", "answers", "document" or "context", "answerable"}.

    Raises:
        UsageError: a line cannot be used; the text names it.
    """
    documents: dict[str, str] = {}
    names: dict[str, str] = {}
    tasks = []
    for number, row in enumerate(rows(path), 1):
        if not isinstance(row.get("question", row.get("text")), str):
            raise UsageError(f'{path}, line {number}: must be an object with a string "question"')
        document = str(row.get("document") or "")
        if row.get("context"):
            document = _document(row["context"], names, documents)
        tasks.append(_task({"id": number, **row}, document))
    if not tasks:
        raise UsageError(f"{path} holds no question")
    return TaskSet(path.stem, documents, tasks)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Give the objects of a file of JSON lines, zstd-compressed when its name ends so.

    Raises:
        UsageError: the file is not there, or a line is no JSON object.
    """
    try:
        stream: io.TextIOBase = _decompressed(path) if path.suffix == ".zst" else path.open(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}: must be a JSON object")
            yield row


def _decompressed(path: Path) -> io.TextIOBase:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "eval") from error
    return zstandard.open(path, "rt", encoding="utf-8", newline="\n")  # type: ignore[no-any-return]


def _task(row: dict[str, Any], document: str) -> Task:
    answers = [answer["text"] if isinstance(answer, dict) else str(answer) for answer in row.get("answers") or []]
    answerable = not row["is_impossible"] if "is_impossible" in row else bool(row.get("answerable", True))
    return Task(
        id=str(row.get("id")),
        question=str(row.get("question", row.get("text"))),
        answers=tuple(dict.fromkeys(answers)) if answerable else (),
        document=document,
        answerable=answerable,
    )


def _document(text: object, names: dict[str, str], documents: dict[str, str]) -> str:
    """Give the id of a passage, which becomes a document when it is new."""
    key = str(text)
    if key not in names:
        names[key] = f"{len(names):05d}.txt"
        documents[names[key]] = key
    return names[key]
