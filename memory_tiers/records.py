"""The plain frozen values that pass between loaders, tier, model and caller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

Scalar = str | int | float | bool | None
HOUR = 3600.0
"""Seconds for which versions of the tables are kept, for those who read them."""


@dataclass(frozen=True, slots=True)
class Section:
    """A place in a document's text where something new begins.

    Args:
        start: character offset into the text.
        heading: heading in force from here on ("" for none).
        hard: whether a chunk must not run over this border (a record, a sheet, a slide, a message).
    """

    start: int
    heading: str = ""
    hard: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    """The text of one file, and where its pages and sections begin.

    Args:
        text: the extracted text; offsets everywhere are characters (code points) of this string. It holds no
            lone surrogates. For plain text files it is the decoded file, unchanged.
        mime: media type of the file.
        title: title found in the file, or None.
        pages: offset at which each page begins, ascending, `pages[0] == 0`; empty when the format has no pages.
        sections: where sections begin, ascending by start.
        metadata: what the format tells of the document (author, date, encoding, ...).
    """

    text: str
    mime: str
    title: str | None = None
    pages: tuple[int, ...] = ()
    sections: tuple[Section, ...] = ()
    metadata: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: a record of the long-term tier.

    Args:
        id: sha256 over document, start and text, 32 hexadecimal digits.
        document: the path as given at ingest, relative to its root.
        ordinal: number of the chunk in its document, from 0.
        page: page on which the chunk starts, from 1; None when the format has no pages.
        heading: heading in force where the chunk starts.
        start: character offset of the chunk in the document's text.
        end: offset just behind it; `document_text[start:end] == text`.
        text: the characters themselves.
        metadata: the document's metadata.
    """

    id: str
    document: str
    ordinal: int
    page: int | None
    heading: str
    start: int
    end: int
    text: str
    metadata: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One row of the documents table.

    Args:
        id: the path as given at ingest, relative to its root; names the document everywhere.
        uri: absolute path that was read.
        root: the folder it was found under.
        title: title of the document, or the file's name.
        mime: media type.
        sha256: of the file's bytes, hexadecimal.
        bytes: size of the file.
        mtime_ns: its modification time when it was read, nanoseconds.
        pages: number of pages; 0 when the format has none.
        chunks: number of its chunks.
        settings: fingerprint of what made the chunks (format version, chunk size, overlap).
        ingested_at: seconds since 1970.
        error: reason why it could not be read, or "".
    """

    id: str
    uri: str
    root: str
    title: str
    mime: str
    sha256: str
    bytes: int
    mtime_ns: int
    pages: int
    chunks: int
    settings: str
    ingested_at: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk with its score.

    Args:
        chunk: the chunk.
        score: fused score, higher is better; comparable within one search only.
        dense: cosine of question and chunk in [-1, 1], or None when the chunk was not found that way.
        lexical: BM25 score (>= 0), or None when the chunk was not found that way.
    """

    chunk: Chunk
    score: float
    dense: float | None = None
    lexical: float | None = None


def merged(found: Sequence[Passage], other: Sequence[Passage]) -> list[Passage]:
    """Put passages of another search between those of one: each before the first whose cosine is lower.

    Scores of two searches cannot be compared; those that are put in get the score of the one they stand before.
    """
    whole = list(found)
    for passage in other:
        at = next((n for n, one in enumerate(whole) if (one.dense or 0.0) < (passage.dense or 0.0)), len(whole))
        beside = whole[min(at, len(whole) - 1)].score if whole else passage.score
        whole.insert(at, replace(passage, score=beside))
    return whole


def hits(passages: Iterable[Passage]) -> list[dict[str, object]]:
    """Give passages as the contract of the command line words them, best first."""
    return [
        {
            "rank": rank,
            "chunk_id": passage.chunk.id,
            "document": passage.chunk.document,
            "page": passage.chunk.page,
            "start": passage.chunk.start,
            "end": passage.chunk.end,
            "score": passage.score,
            "text": passage.chunk.text,
        }
        for rank, passage in enumerate(passages, start=1)
    ]
