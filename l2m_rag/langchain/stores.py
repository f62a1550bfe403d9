"""Bytes by key, for the caches and the parent documents of LangChain."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

from langchain_core.stores import ByteStore

from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain.keyed import NO_WORDS, key_of, named, open_keyed
from l2m_rag.memory_tiers.texts import PREFIX, Text

_KIND = "bytes"


class L2MByteStore(ByteStore):
    """Bytes by key in a collection, where other programs and later runs find them.

    Nothing is embedded. The collection is one of keys: one made with an embedder is refused.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        collection: name of the collection, or a `Collection`; it is made when something is first set.
        settings: of the library; None reads them as the command line does.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MByteStore

            store = L2MByteStore("cache")

    Set and get:
        .. code-block:: python

            store.mset([("lease", b"ends in May"), ("rent", b"900")])
            store.mget(["lease", "none"])  # [b"ends in May", None]

    List keys:
        .. code-block:: python

            list(store.yield_keys(prefix="le"))  # ["lease"]

    Delete:
        .. code-block:: python

            store.mdelete(["lease"])

    Async:
        .. code-block:: python

            await store.amget(["rent"])

    Use as a cache of embeddings:
        .. code-block:: python

            from langchain_classic.embeddings import CacheBackedEmbeddings

            CacheBackedEmbeddings.from_bytes_store(embeddings, store, namespace="minilm", key_encoder="sha256")
    """

    def __init__(self, collection: str | Collection = "bytes", *, settings: Settings | None = None) -> None:
        self.collection = open_keyed(collection, settings)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Give the values of keys, None for each that is not there.

        Raises:
            UsageError: a key is no string, or empty.
        """
        ids = [named(_KIND, key) for key in keys]
        values = {text.id: base64.b64decode(text.metadata["value"][0]) for text in self.collection.get(ids)}
        return [values.get(one) for one in ids]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Set values, all or none, on the disk when this is over; of a key that comes twice the later value.

        Raises:
            UsageError: a key is no string, or empty, or a value is not bytes; nothing was written.
            LockedError: another process is writing to the collection, and went on for half a minute.
        """
        texts = {}
        for key, value in key_value_pairs:
            if not isinstance(value, bytes):
                raise UsageError(f"the value of the key {key!r} must be bytes; it is a {type(value).__name__}")
            # in a list, as a value by itself would be stored once more, to be filtered by
            facts = {"value": [base64.b64encode(value).decode()]}
            texts[key] = Text(named(_KIND, key), NO_WORDS, facts)
        self.collection.put(list(texts.values()))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys and their values; those that are not there are passed over.

        Raises:
            UsageError: a key is no string, or empty.
        """
        self.collection.drop([named(_KIND, key) for key in keys])

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Give the keys that begin with a prefix, in no order to rely on; no value is read for it."""
        rows = self.collection.documents() if self.collection.exists() else []
        for row in rows:
            key = key_of(_KIND, row.id.removeprefix(PREFIX))
            if key is not None and key.startswith(prefix or ""):
                yield key
