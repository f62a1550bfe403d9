"""Texts that came from a program rather than from files: a document of one chunk each, under an id of the caller.

Metadata may be anything that JSON can hold, and comes back as it was; those of its values that are no lists or tables
can be filtered by.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.lance_store import Vectors
from l2m_rag.memory_tiers.long_term import LongTermTier
from l2m_rag.memory_tiers.records import Chunk, DocumentRow

PREFIX = "text:"
"""What ids begin with in the tables, so that none is taken for the path of a file."""
_WHOLE = "_json"  # key of the metadata as they were
_MARK = "text"  # in place of the fingerprint of how a file was cut


@dataclass(frozen=True, slots=True)
class Text:
    """A text with an id.

    Args:
        id: of the caller, not empty.
        text: any but the empty one.
        metadata: what JSON can hold, by names.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def chunks_of(texts: Sequence[Text]) -> list[Chunk]:
    """Give the chunks that texts become.

    Raises:
        UsageError: an id, a text or metadata cannot be stored.
    """
    return [_chunk(text) for text in texts]


def put(tier: LongTermTier, chunks: Sequence[Chunk], vectors: Vectors) -> None:
    """Insert texts, or replace those whose id is there.

    Args:
        tier: whose writer's lock is held.
        chunks: of texts with ids that differ, from `chunks_of`.
        vectors: (N, dimension) float32, theirs.

    Raises:
        UsageError: an id comes twice, or a vector cannot be used; nothing was written.
    """
    tier.add(chunks, vectors)
    now = time.time()
    tier.store.put_documents([_row(chunk, now) for chunk in chunks])


def get(tier: LongTermTier, ids: Sequence[str]) -> list[Text]:
    """Give the texts of those ids that are there, in the order asked for, each once."""
    return [text_of(chunk) for chunk in tier.fetch([PREFIX + one for one in dict.fromkeys(ids)])]


def fitting(tier: LongTermTier, where: str) -> list[Text]:
    """Give all texts that a filter keeps, in the order in which they came in."""
    chunks = tier.store.fetch(tier.store.row_ids(where).tolist())
    return [text_of(chunk) for chunk in chunks if is_text(chunk)]


def drop(tier: LongTermTier, ids: Sequence[str]) -> list[str]:
    """Delete texts by id; give the ids of those that were there."""
    named = [PREFIX + one for one in dict.fromkeys(ids)]
    stored = set(tier.store.present(named))
    there = [name for name in named if name in stored]
    tier.store.remove_documents(there)
    return [name.removeprefix(PREFIX) for name in there]


def equals(key: str, value: str) -> str:
    """Give the filter that keeps what has a text in its metadata; the key is a name of letters, digits and _."""
    quoted = value.replace("'", "''")
    return f"metadata.{key} = '{quoted}'"


def is_text(chunk: Chunk) -> bool:
    """Say whether a chunk is a text of a program."""
    return chunk.document.startswith(PREFIX) and _WHOLE in chunk.metadata


def text_of(chunk: Chunk) -> Text:
    """Give the text that a chunk was made of."""
    return Text(chunk.id.removeprefix(PREFIX), chunk.text, json.loads(str(chunk.metadata[_WHOLE])))


def _chunk(text: Text) -> Chunk:
    if not isinstance(text.id, str) or not text.id:
        raise UsageError(f"the id of a text ({text.id!r}) must be a string that is not empty")
    if not isinstance(text.text, str) or not text.text:
        raise UsageError(f"text {text.id!r} is empty; leave it out")
    try:
        whole = json.dumps(text.metadata, ensure_ascii=False, allow_nan=False)
        same = json.loads(whole) == text.metadata and isinstance(text.metadata, dict)
        (text.id + text.text + whole).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"text {text.id!r} or its metadata cannot be stored as JSON in UTF-8: {error}") from error
    if not same:
        raise UsageError(f"the metadata of text {text.id!r} would not come back from JSON as they are: {text.metadata}")
    name = PREFIX + text.id
    facts = {key: value for key, value in text.metadata.items() if isinstance(value, str | int | float | bool)}
    return Chunk(name, name, 0, None, "", 0, len(text.text), text.text, {**facts, _WHOLE: whole})


def _row(chunk: Chunk, now: float) -> DocumentRow:
    content = chunk.text.encode()
    return DocumentRow(
        id=chunk.document,
        uri="",
        root="",
        title=chunk.id.removeprefix(PREFIX),
        mime="text/plain",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        mtime_ns=0,
        pages=0,
        chunks=1,
        settings=_MARK,
        ingested_at=now,
    )
