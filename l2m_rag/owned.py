"""Texts of a collection that belong to one owner, a conversation or a user; those of others are never seen."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from l2m_rag.memory_tiers.texts import Text, equals

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.memory_tiers.records import Passage


class OwnedTexts:
    """What a collection holds of one owner, with when it was said.

    Args:
        collection: that holds it, and that of others.
        kind: key of the metadata that names the owner.
        owner: any text that is not empty.
    """

    def __init__(self, collection: Collection, kind: str, owner: str) -> None:
        self._collection = collection
        self._mark = {kind: owner}
        self._where = equals(kind, owner)

    def facts(self, now: float) -> dict[str, Any]:
        """Give the metadata that a text of the owner has, said at a time in seconds since 1970."""
        return {**self._mark, "said_at": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")}

    def all(self) -> list[Text]:
        """Give everything, in the order in which it came in."""
        return self._collection.texts(self._where)

    def recall(self, query: str, k: int, **more: str) -> list[Passage]:
        """Give what fits a text best, best first; of that only what has some values in its metadata."""
        if not self._collection.exists():
            return []
        where = " AND ".join([self._where, *(equals(key, value) for key, value in more.items())])
        return self._collection.search(query, k, where=where)

    def forget(self, ids: Sequence[str]) -> list[Text]:
        """Delete by id; give what was there."""
        ours = {text.id: text for text in self._collection.get(ids) if self._mark.items() <= text.metadata.items()}
        return [ours[one] for one in self._collection.drop(list(ours))]
