"""Conversations as texts of a collection: in order for a prompt, and found again by meaning however long ago.

The command line and LangChain's history share them. A turn is one text, `SPEAKER: WHAT WAS SAID`, with the
whole message as JSON beside it; its id orders turns by time, whoever writes.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from l2m_rag.days import day, written_out
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.texts import Text, text_of
from l2m_rag.owned import OwnedTexts

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.memory_tiers.records import Passage

COLLECTION = "conversations"
"""Name of the collection that conversations lie in."""
MEMORIES = "memories"
"""Name of the collection of what agents were told to remember."""
STORE = "store"
"""Name of the collection of what LangGraph's graphs keep."""
PRIVATE = (COLLECTION, MEMORIES, STORE)
"""Collections of what people said, which no server shows unless it is asked for one of them alone."""
WHOLE = "message"
"""Key of the metadata with the message as it was."""
_YEAR_10000 = 253_402_300_800  # seconds since 1970, from where on a date has no four digits for its year


@dataclass(frozen=True, slots=True)
class Said:
    """A message of a conversation.

    Args:
        by: human, ai, system or tool.
        text: what was said.
        name: who said it; "" for none.
        whole: the message as JSON, as LangChain's `message_to_dict` gives it; None makes one of the text.
    """

    by: str
    text: str
    name: str = ""
    whole: Mapping[str, Any] | None = None


class Conversation:
    """The messages of one conversation; those of others are never seen.

    Args:
        session: its name, any text that is not empty.
        collection: that holds conversations.
    """

    def __init__(self, session: str, collection: Collection) -> None:
        if not isinstance(session, str) or not session:
            raise UsageError(f"session ({session!r}) must be a string that is not empty")
        self.session = session
        self._collection = collection
        self._ours = OwnedTexts(collection, "chat", session)

    def add(self, messages: Sequence[Said], at: float | None = None) -> None:
        """Add messages behind those that are there, on the disk when this is over.

        Args:
            messages: who speaks is found with what is said.
            at: when they were said, in seconds since 1970, for a conversation of another time; None for now. Messages
                stand in the order of time, and those of one time in the order in which they were added.

        Raises:
            UsageError: a message holds what JSON cannot, or there is no such time; none was added.
            LockedError: another process is writing to the collection, and went on for half a minute.
        """
        now = time.time_ns()
        if at is not None and not 0 <= at < _YEAR_10000:
            raise UsageError(f"at ({at}) must be a time in seconds since 1970")
        said = now if at is None else int(at * 1e9)
        facts = self._ours.facts(said / 1e9)
        self._collection.put(
            [
                Text(
                    f"chat:{said:020d}:{now:020d}:{number:06d}:{uuid.uuid4().hex}",
                    f"{one.name or one.by}: {one.text}",
                    {**facts, "by": one.by, WHOLE: one.whole or {"type": one.by, "data": {"content": one.text}}},
                )
                for number, one in enumerate(messages)
            ]
        )

    def texts(self) -> list[Text]:
        """Give all messages, oldest first."""
        return sorted(self._ours.all(), key=lambda text: text.id)

    def recall(self, query: str, k: int = 4, around: int = 0) -> list[Text]:
        """Give the messages that fit a text best, best first.

        Args:
            query: what to look for.
            k: most messages that are found.
            around: messages before and behind each that are given with it, a line each as `line_of` writes it; for
                them the whole conversation is read.
        """
        found = [text_of(passage.chunk) for passage in self._ours.recall(query, k)]
        if not found or not around:
            return found
        texts = self.texts()
        place = {text.id: number for number, text in enumerate(texts)}
        found = [one for one in found if one.id in place]  # another program may have deleted some meanwhile
        near = [texts[max(0, place[one.id] - around) : place[one.id] + around + 1] for one in found]
        return [
            replace(one, text="\n".join(line_of(text) for text in beside))
            for one, beside in zip(found, near, strict=True)
        ]

    def statements(self, query: str, k: int) -> list[Passage]:
        """Give what the user once told that fits a text best, as passages to read; questions are left out.

        The day that "yesterday" and its like stand for is written behind them.
        """
        found = []
        for passage in self._ours.recall(query, 3 * k, by="human"):
            text = text_of(passage.chunk)
            _, _, words = text.text.partition(": ")
            if not words.rstrip().endswith("?"):
                on = _day_of(text)
                words = written_out(words, on)
                chunk = replace(passage.chunk, document=f"said on {day(on)}", text=words, end=len(words))
                found.append(replace(passage, chunk=chunk))
        return found[:k]

    def forget(self, ids: Sequence[str]) -> list[Text]:
        """Delete messages by id; give what was there."""
        return self._ours.forget(ids)

    def clear(self) -> list[Text]:
        """Delete all messages; give what was there."""
        return self._ours.forget([text.id for text in self.texts()])


def sessions(collection: Collection) -> dict[str, int]:
    """Give the names of the conversations in a collection, each with how many messages it has."""
    texts = collection.texts("metadata.chat IS NOT NULL")
    return dict(sorted(Counter(str(text.metadata["chat"]) for text in texts).items()))


def line_of(text: Text) -> str:
    """Write a message for a reader who sees nothing else of the conversation: when it was said, by whom, and what.

    Returns:
        "[8 May 2023] human: I met Rosa yesterday [7 May 2023]."; line breaks become spaces.
    """
    on = _day_of(text)
    return f"[{day(on)}] {' '.join(written_out(text.text, on).split())}"


def _day_of(text: Text) -> date:
    """Give the day on which a message was said, where this runs."""
    return datetime.fromisoformat(text.metadata["said_at"]).astimezone().date()
