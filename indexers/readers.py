"""From files to chunks and from texts to vectors: what an ingest has done for it, in this process or on many machines.

`Workforce` is what the pipeline asks for; `Alone` does it all here, `ray_ingest.RayWorkers` on a Ray cluster.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from l2m_rag.errors import LoadError
from l2m_rag.indexers.chunking import Tokenizer, split
from l2m_rag.indexers.scan import Found, printable
from l2m_rag.indexers.workers import ParserPool
from l2m_rag.memory_tiers.lance_store import Vectors
from l2m_rag.memory_tiers.records import Chunk, DocumentRow, Parsed

logger = logging.getLogger(__name__)

PARSER = 1
"""Raise it when the loaders or the chunker give other text for the same bytes."""

UNKNOWN = -1
"""As a modification time, with no hash: whatever the file is, the row does not stand for it."""


class Embedder(Tokenizer, Protocol):
    """What the pipeline asks of an embedder."""

    @property
    def max_tokens(self) -> int:
        """Tokens that the model sees of a text."""
        ...

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Vectors:
        """Give (N, E) float32 vectors of unit length."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How files are parsed and cut.

    Args:
        chunk_size: tokens a chunk.
        chunk_overlap: tokens that neighbours share.
        workers: parsing processes.
        timeout: seconds a file.
        memory: bytes a parsing process.
        max_bytes: size of a file.
    """

    chunk_size: int = 256
    chunk_overlap: int = 32
    workers: int = 1
    timeout: float = 30.0
    memory: int = 1 << 30
    max_bytes: int = 256 << 20

    @property
    def fingerprint(self) -> str:
        """What the chunks depend on besides the file."""
        return f"{PARSER}:{self.chunk_size}:{self.chunk_overlap}"

    def pool(self) -> ParserPool:
        """Give the processes that parse under these limits."""
        return ParserPool(workers=self.workers, timeout=self.timeout, memory=self.memory, max_bytes=self.max_bytes)


@dataclass(frozen=True, slots=True)
class Read:
    """A file that was looked at.

    Args:
        file: the file.
        error: why it could not be read, or None.
        chunks: of its text, in order.
        row: gives the row that stands for it, told the number of chunks; to be called when all of them were taken.
    """

    file: Found
    error: LoadError | None
    chunks: Iterator[Chunk]
    row: Callable[[int], DocumentRow]


class Workforce(Protocol):
    """Who reads files and embeds texts."""

    @property
    def ahead(self) -> int:
        """Batches of texts that may be on their way while the next one is put together."""
        ...

    def read(self, files: Sequence[Found]) -> Iterator[Read]:
        """Read files; they come back in their order, those too that cannot be read."""
        ...

    def encode(self, texts: list[str], progress: Callable[[int], None]) -> Callable[[], Vectors]:
        """Have texts embedded; what is given waits for the (N, E) float32 vectors."""
        ...


class Alone:
    """This process, with its parsers.

    Args:
        embedder: or a function that loads it; it is not called when there is nothing to embed.
        limits: of parsing and cutting.
    """

    ahead = 0

    def __init__(self, embedder: Embedder | Callable[[], Embedder], limits: Limits) -> None:
        self._embedder = embedder
        self._limits = limits

    def model(self) -> Embedder:
        """Give the embedder, loaded on first use."""
        if callable(self._embedder):
            self._embedder = self._embedder()
        return self._embedder

    def read(self, files: Sequence[Found]) -> Iterator[Read]:
        """Read files in their order."""
        with self._limits.pool() as pool:
            yield from read_files(files, pool, self._limits, self.model)

    def encode(self, texts: list[str], progress: Callable[[int], None]) -> Callable[[], Vectors]:
        """Embed texts once their vectors are asked for."""
        return lambda: self.model().encode(texts, progress=progress)


def read_files(
    files: Sequence[Found], pool: ParserPool, limits: Limits, model: Callable[[], Embedder]
) -> Iterator[Read]:
    """Parse and cut files in their order; those of which the scan said that they cannot be read keep their place.

    Args:
        files: the files.
        pool: that parses them.
        limits: of cutting.
        model: gives the embedder, whose tokens are counted; not called when no file can be read.
    """
    readable = [file.path for file in files if file.error is None]
    parsed = pool.parse(readable) if readable else iter(())
    for file in files:
        result = file.error or next(parsed)[1]
        if isinstance(result, LoadError):
            yield Read(file, result, iter(()), partial(row_of, file, None, result, limits))
            continue
        embedder = model()
        size = min(limits.chunk_size, embedder.max_tokens)
        chunks = split(result, file.id, embedder, size=size, overlap=min(limits.chunk_overlap, size - 1))
        yield Read(file, None, chunks, partial(row_of, file, result, None, limits))


def row_of(file: Found, parsed: Parsed | None, error: LoadError | None, limits: Limits, chunks: int) -> DocumentRow:
    """Give the row that stands for a file; its hash is taken now, so after the file was parsed."""
    sha256 = "" if file.error else sha256_of(file.path)
    steady = bool(sha256) and _is_as_found(file)
    return DocumentRow(
        id=file.id,
        uri=file.uri,
        root=printable(str(file.root)),
        title=(parsed.title if parsed else None) or Path(file.id).name,
        mime=parsed.mime if parsed else "",
        sha256=sha256 if steady else "",
        bytes=file.bytes,
        mtime_ns=file.mtime_ns if steady else UNKNOWN,
        pages=len(parsed.pages) if parsed else 0,
        chunks=chunks,
        settings=limits.fingerprint,
        ingested_at=time.time(),
        error=str(error) if error else "",
    )


def _is_as_found(file: Found) -> bool:
    """Say whether a file is still what the scan saw; else nobody knows which of its states was parsed."""
    try:
        status = os.stat(file.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.bytes, file.mtime_ns)


def sha256_of(path: Path) -> str:
    """Hash a file; one that has just vanished or is closed to us gives ""."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        logger.info("%s cannot be hashed: %s", path, error)
        return ""
