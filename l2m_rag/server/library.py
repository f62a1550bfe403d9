"""What every server offers of the collections in a home: list, search, ask, read, embed.

What uses a model or an opened collection may not be called from two threads at once: a `Worker` keeps to that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import l2m_rag.collection
import l2m_rag.models
from l2m_rag.config import COLLECTION_NAME, Settings
from l2m_rag.conversation import PRIVATE
from l2m_rag.errors import CollectionNotFound, L2MError
from l2m_rag.memory_tiers.long_term import Mode, read_manifest
from l2m_rag.memory_tiers.places import Where, place_of
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.qa import Answer

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.indexers.embedding import Embedder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a document.

    Args:
        document: id of the document.
        start: character offset in the document's text.
        end: offset just behind it.
        text: the characters, as `Collection.text` gives them.
        next: where the document goes on, or None at its end.
    """

    document: str
    start: int
    end: int
    text: str
    next: int | None


class Library:
    """The collections of a home, each opened on first use and kept.

    Args:
        settings: how they are read and asked; `settings.collection` is meant when none is named.
        only: the one collection that is shown; None shows all.
    """

    def __init__(self, settings: Settings, *, only: str | None = None) -> None:
        self.settings = settings
        self._only = only
        self._opened: dict[str, tuple[str | None, Collection]] = {}

    def names(self) -> list[str]:
        """Give the names of the collections; damaged ones are among them, those of what people said are not."""
        names = place_of(self.settings.home / "collections").holding("manifest.json")
        return sorted(name for name in names if COLLECTION_NAME.fullmatch(name) and self._shows(name))

    def _shows(self, name: str) -> bool:
        return name not in PRIVATE if self._only is None else name == self._only

    def made_at(self, name: str) -> int:
        """Give when a collection was made, in seconds since 1970; 0 when that cannot be read."""
        try:
            return int(read_manifest(self._folder(name)).created_at)
        except L2MError:
            return 0

    def entries(self) -> list[dict[str, object]]:
        """Say of every collection what it holds, of a damaged one what is wrong with it; from any thread."""
        return [self._entry(name) for name in self.names()]

    def _entry(self, name: str) -> dict[str, object]:
        try:
            # What is only listed needs no embedder, so whichever made the collection will do.
            settings = replace(self.settings, embedder=read_manifest(self._folder(name)).embedder)
            entry = asdict(l2m_rag.collection.open(name, settings=settings).info())
        except L2MError as error:
            return {"name": name, "error": str(error)}
        del entry["path"]  # where it lies on this machine is nobody else's business
        return entry

    def search(
        self, query: str, *, collection: str | None = None, k: int = 10, mode: Mode = "hybrid", where: str | None = None
    ) -> list[Passage]:
        """Give the k passages that fit a text best, as `Collection.search` does."""
        return self._collection(collection).search(query.strip(), k, mode=mode, where=where)

    def ask(
        self,
        question: str,
        *,
        collection: str | None = None,
        free: bool = False,
        history: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], object] | None = None,
    ) -> Answer:
        """Answer a question, as `Collection.ask` does."""
        found = self._collection(collection)
        return found.ask(question.strip(), free=free, history=history, on_text=on_text)

    def read(self, document: str, *, collection: str | None = None, start: int = 0, length: int = 8000) -> Stretch:
        """Give a stretch of a document's text from the chunks that are stored of it; no file is opened.

        Args:
            document: id of the document.
            collection: where it is.
            start: character offset, >= 0.
            length: characters, at most.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: there is no such document in it.
        """
        text = self._collection(collection).text(document)
        end = min(start + length, max(start, len(text)))
        return Stretch(document, start, end, text[start:end], end if end < len(text) else None)

    def embedder(self) -> Embedder:
        """Give the embedder of the settings."""
        return l2m_rag.models.load_embedder(self.settings)

    def warm(self) -> None:
        """Load the models, so that the first question need not wait for them; what fails is logged."""
        try:
            l2m_rag.models.load_embedder(self.settings)
            l2m_rag.models.load_language_model(self.settings)
        except L2MError as error:
            logger.warning("%s", error)

    def _collection(self, name: str | None) -> Collection:
        """Give a collection, opened before if it is still the same one."""
        folder = self._found(name)
        stamp = place_of(folder).stamp("manifest.json")
        known = self._opened.get(folder.name)
        if known is None or known[0] != stamp:
            known = stamp, l2m_rag.collection.open(folder.name, settings=self.settings)
            self._opened[folder.name] = known
        return known[1]

    def _found(self, name: str | None) -> Where:
        name = self.settings.collection if name is None else name
        collection = l2m_rag.collection.open(name, settings=self.settings)  # checks the name
        if not self._shows(name) or not collection.exists():
            here = ", ".join(self.names()[:20]) or "none"
            raise CollectionNotFound(f"there is no collection {name!r}; there are: {here}")
        return collection.path

    def _folder(self, name: str) -> Where:
        return l2m_rag.collection.open(name, settings=self.settings).path
