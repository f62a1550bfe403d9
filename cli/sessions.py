"""The turns of a conversation, one JSON line each, in the home's `sessions` folder."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from l2m_rag.config import check_name

logger = logging.getLogger(__name__)


def read_turns(home: Path, name: str) -> list[tuple[str, str]]:
    """Give the (question, answer) pairs of a session, oldest first; of a new one none.

    A line that a crash cut short is left out with a warning.

    Raises:
        UsageError: a session cannot have this name.
    """
    file = _file(home, name)
    if not file.is_file():
        return []
    turns = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            turn = json.loads(line)
            turns.append((str(turn["question"]), str(turn["answer"])))
        except (ValueError, KeyError, TypeError):
            logger.warning("%s, line %d is damaged and is left out", file, number)
    return turns


def append_turn(home: Path, name: str, question: str, answer: str) -> None:
    """Add a turn to a session and returns when it is on disk.

    Raises:
        UsageError: a session cannot have this name.
    """
    file = _file(home, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"question": question, "answer": answer}) + "\n"
    with file.open("a+b") as turns:
        # A crash may have left half a line; what is added must not become part of it.
        if turns.tell():
            turns.seek(-1, os.SEEK_END)
            line = line if turns.read() == b"\n" else "\n" + line
        turns.write(line.encode())
        turns.flush()
        os.fsync(turns.fileno())


def _file(home: Path, name: str) -> Path:
    return home / "sessions" / f"{check_name(name, 'session')}.jsonl"
