"""Collections whose texts are asked for by key and never searched by meaning, so that writing costs no embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.lance_store import Vectors

NO_WORDS = "-"
"""The text of an entry: a text may not be empty, and this one puts no word into the full-text index."""


class Keys:
    """An encoder that gives every text the same unit vector.

    A collection remembers its name, so that one made with another embedder is refused, and this one by the others.
    """

    name = "keys"
    fingerprint = "keys-1"
    dimension = 8

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Give the vectors of texts, (N, dimension) float32."""
        return np.full((len(texts), self.dimension), self.dimension**-0.5, dtype=np.float32)


def open_keyed(collection: str | Collection, settings: Settings | None = None) -> Collection:
    """Give a collection, by name or as it was opened, with the encoder of keys."""
    opened = open_collection(collection, settings=settings) if isinstance(collection, str) else collection
    return Collection(opened.name, opened.path, opened.settings, Keys())


def named(kind: str, key: object, *within: str) -> str:
    """Give the id under which a key is stored: in ASCII, and such that no two keys share one.

    Args:
        kind: what is stored, as a collection may hold several kinds of entries.
        key: any string that is not empty.
        within: of what the key is one.

    Raises:
        UsageError: the key is no string, or empty.
    """
    if not isinstance(key, str) or not key:
        raise UsageError(f"a key ({key!r}) must be a string that is not empty")
    return f"{kind}:{json.dumps([*within, key])}"


def key_of(kind: str, one: str) -> str | None:
    """Give the key that is stored under an id, or None when the id is not of that kind."""
    return str(json.loads(one.removeprefix(f"{kind}:"))[-1]) if one.startswith(f"{kind}:[") else None
