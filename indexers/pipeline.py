"""Ingest: files -> text -> chunks -> vectors -> tier, in one loop; documents stream through it and memory stays flat.

A document's row is written after its last chunk, so a run that was killed is found by counting: chunks that no row
accounts for belong to a document that must be done again. Before the chunks of a document are replaced, its row is
marked, so that it is done again also when its old file comes back. Chunks are named by their content, so doing it
again changes nothing that was right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from l2m_rag.errors import LoadError, Reason
from l2m_rag.indexers.chunking import Tokenizer, split
from l2m_rag.indexers.scan import Found, Scan, fits, is_gone, path_of, printable, scan
from l2m_rag.indexers.workers import ParserPool
from l2m_rag.memory_tiers.lance_store import LanceStore, Vector, Vectors
from l2m_rag.memory_tiers.long_term import LongTermTier
from l2m_rag.memory_tiers.records import Chunk, DocumentRow, Parsed

logger = logging.getLogger(__name__)

_PARSER = 1  # raise it when the loaders or the chunker give other text for the same bytes
_BATCH = 512  # chunks a commit: a few seconds of embedding, against about 0.1 s for the commit itself
_UNKNOWN = -1  # as a modification time, with no hash: whatever the file is, the row does not stand for it
_TRY_AGAIN: tuple[Reason, ...] = ("timeout", "unreadable")


class Embedder(Tokenizer, Protocol):
    """What the pipeline asks of an embedder."""

    @property
    def max_tokens(self) -> int:
        """Tokens that the model sees of a text."""
        ...

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Vectors:
        """Give (N, E) float32 vectors of unit length."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that is not in the collection, and why."""

    path: str
    reason: Reason
    detail: str = ""


@dataclass(slots=True)
class IngestReport:
    """What an ingest did.

    Args:
        collection: its name.
        added: documents that are new.
        updated: documents whose text was replaced.
        unchanged: documents that were left alone.
        removed: documents whose file is gone and that were pruned.
        failed: files that could not be read.
        chunks: chunks written.
        seconds: how long it took.
        dry_run: nothing was written.
    """

    collection: str
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[Failure] = field(default_factory=list)
    chunks: int = 0
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an ingest is."""

    files_found: int
    scan_done: bool
    files_done: int
    failed: int
    chunks: int
    current: str
    seconds: float


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
        return f"{_PARSER}:{self.chunk_size}:{self.chunk_overlap}"


@dataclass(slots=True)
class Work:
    """What a scan means for a collection.

    Args:
        todo: files to parse.
        touched: rows whose file has the same bytes, but another time.
        gone: ids of documents to remove.
        known_bad: files that failed before and have not changed.
        unsettled: documents that a run which was killed left half written.
        unchanged: number of documents to leave alone.
        scan: what was found.
    """

    todo: list[Found]
    touched: list[DocumentRow]
    gone: list[str]
    known_bad: list[Failure]
    unsettled: set[str]
    unchanged: int
    scan: Scan


def plan(
    paths: Iterable[str | Path],
    store: LanceStore | None,
    limits: Limits,
    *,
    glob: str | None = None,
    prune: bool = False,
) -> Work:
    """Compare the files below some paths with a collection; an unchanged file costs one stat.

    Raises:
        UsageError: a path does not exist.
    """
    documents = store.documents() if store else {}
    unsettled = _unsettled(store, documents) if store else set()
    found = scan(list(paths), documents, glob=glob)
    work = Work([], [], [], [], unsettled, 0, found)
    for file in found.files:
        row = documents.get(file.id)
        if row is None or file.error or file.id in unsettled or _outdated(row, limits):
            work.todo.append(file)
        elif (row.uri, row.bytes, row.mtime_ns) == (file.uri, file.bytes, file.mtime_ns):
            _keep(work, row)
        elif row.sha256 and row.bytes == file.bytes and _sha256(file.path) == row.sha256:
            work.touched.append(replace(row, uri=file.uri, root=printable(str(file.root)), mtime_ns=file.mtime_ns))
            _keep(work, row)
        else:
            work.todo.append(file)
    here = {file.id for file in found.files}
    work.gone = [name for name in sorted(unsettled - documents.keys()) if name not in here]
    # that a file could not be read is forgotten with the file
    work.gone += [
        row.id
        for row in documents.values()
        if (prune or row.error) and row.id not in here and _has_gone(row, found, glob)
    ]
    return work


def foretell(name: str, work: Work, documents: dict[str, DocumentRow]) -> IngestReport:
    """Say what an ingest of the planned files would do, as far as that can be known without reading them."""
    report = IngestReport(name, unchanged=work.unchanged, failed=list(work.known_bad), dry_run=True)
    report.removed = sum(1 for identity in work.gone if identity in documents and not documents[identity].error)
    for file in work.todo:
        if file.error:
            report.failed.append(Failure(file.id, file.error.reason, file.error.detail))
        elif file.id in documents and not documents[file.id].error:
            report.updated += 1
        else:
            report.added += 1
    return report


def ingest(
    name: str,
    work: Work,
    tier: LongTermTier,
    embedder: Embedder | Callable[[], Embedder],
    limits: Limits,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Read the planned files into a tier.

    Args:
        name: of the collection, for the report.
        work: from `plan`.
        tier: that the caller has locked for writing.
        embedder: or a function that loads it; it is not called when there is nothing to embed.
        limits: of parsing and cutting.
        progress: called after each file and while vectors are computed.
    """
    began = time.monotonic()
    report = IngestReport(name, unchanged=work.unchanged, failed=list(work.known_bad))
    documents = tier.store.documents()
    done = 0

    def tell(current: str = "") -> None:
        if progress:
            seconds = time.monotonic() - began
            progress(Progress(len(work.todo), True, done, len(report.failed), report.chunks, current, seconds))

    tier.store.remove_documents(work.gone)
    report.removed = sum(1 for identity in work.gone if identity in documents and not documents[identity].error)
    tier.store.put_documents(work.touched)
    batch = _Batch(tier.store, embedder, report, tell)
    tell()
    for file, result in _parse(work.todo, limits):
        before = documents.get(file.id)
        replaces = before is not None or file.id in work.unsettled
        if isinstance(result, LoadError):
            report.failed.append(Failure(file.id, result.reason, result.detail))
            # what may pass by itself does not cost a document that was read well before
            if before is None or before.error or result.reason not in _TRY_AGAIN:
                batch.add(file.id, iter(()), replaces=replaces, before=before)
                batch.close(_row(file, None, result, 0, limits))
        else:
            model = batch.model()
            size = min(limits.chunk_size, model.max_tokens)
            chunks = split(result, file.id, model, size=size, overlap=min(limits.chunk_overlap, size - 1))
            count = batch.add(file.id, chunks, replaces=replaces, before=before)
            batch.close(_row(file, result, None, count, limits))
            report.added += before is None or bool(before.error)
            report.updated += before is not None and not before.error
        done += 1
        tell(file.id)
    batch.flush()
    tier.store.index_text()  # also what a run that was killed has left to do
    if batch.commits or work.gone or work.touched:
        tier.hot_index()
    report.seconds = round(time.monotonic() - began, 3)
    tell()
    return report


class _Batch:
    """Chunks on their way into the store, and the document rows that follow them."""

    def __init__(
        self,
        store: LanceStore,
        embedder: Embedder | Callable[[], Embedder],
        report: IngestReport,
        tell: Callable[[str], None],
    ) -> None:
        self.commits = 0
        self._store = store
        self._embedder = embedder
        self._report = report
        self._tell = tell
        self._chunks: list[Chunk] = []
        self._rows: list[DocumentRow] = []
        self._unmarked: list[DocumentRow] = []  # rows of documents whose chunks are about to be replaced
        self._replaced: dict[str, set[str]] = {}  # document -> ids of its new chunks, for those that have old ones
        self._known: dict[str, dict[str, Vector]] = {}  # document -> vectors of the texts it has already

    def model(self) -> Embedder:
        """Give the embedder, loaded on first use."""
        if callable(self._embedder):
            self._embedder = self._embedder()
        return self._embedder

    def add(self, document: str, chunks: Iterator[Chunk], *, replaces: bool, before: DocumentRow | None) -> int:
        """Take a document's chunks, writing whenever a batch is full; give their number.

        Args:
            document: its id.
            chunks: in order.
            replaces: whether the store may have other chunks of it.
            before: its row, when there is one.
        """
        if before is not None and before.chunks:
            self._unmarked.append(before)
        if replaces:
            self._replaced[document] = set()
            self._known[document] = self._store.embeddings(document)
        count = 0
        while part := list(islice(chunks, _BATCH - len(self._chunks))):
            self._chunks += part
            count += len(part)
            if replaces:
                self._replaced[document].update(chunk.id for chunk in part)
            if len(self._chunks) >= _BATCH:
                self.flush()
        return count

    def close(self, row: DocumentRow) -> None:
        """Note that a document is complete."""
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write chunks, drop what they replace, and then write the rows of the documents that are complete."""
        self._store.put_documents([replace(row, sha256="", mtime_ns=_UNKNOWN) for row in self._unmarked])
        self._unmarked = []
        if self._chunks:
            self._store.add_chunks(self._chunks, self._vectors())
        complete = [row.id for row in self._rows if row.id in self._replaced]
        self._store.drop_stale_chunks({document: self._replaced.pop(document) for document in complete})
        for document in complete:
            self._known.pop(document)
        self._store.put_documents(self._rows)
        self.commits += bool(self._chunks or self._rows)
        self._report.chunks += len(self._chunks)
        self._chunks, self._rows = [], []

    def _vectors(self) -> Vectors:
        """Give the vectors of the waiting chunks, computing those that the store does not have."""
        found = [self._known.get(chunk.document, {}).get(chunk.text) for chunk in self._chunks]
        new = [chunk for chunk, vector in zip(self._chunks, found, strict=True) if vector is None]
        if not new:
            return np.stack([vector for vector in found if vector is not None])
        encoded = iter(
            self.model().encode([chunk.text for chunk in new], progress=lambda _: self._tell(new[0].document))
        )
        return np.stack([next(encoded) if vector is None else vector for vector in found])


def _parse(files: list[Found], limits: Limits) -> Iterator[tuple[Found, Parsed | LoadError]]:
    """Parse files in order; those of which the scan said that they cannot be read are passed through in their place."""
    readable = [file for file in files if file.error is None]
    with ParserPool(
        workers=limits.workers, timeout=limits.timeout, memory=limits.memory, max_bytes=limits.max_bytes
    ) as pool:
        parsed = pool.parse(file.path for file in readable) if readable else iter(())
        for file in files:
            yield file, file.error or next(parsed)[1]


def _row(file: Found, parsed: Parsed | None, error: LoadError | None, chunks: int, limits: Limits) -> DocumentRow:
    sha256 = "" if file.error else _sha256(file.path)
    steady = bool(sha256) and _is_as_found(file)
    return DocumentRow(
        id=file.id,
        uri=file.uri,
        root=printable(str(file.root)),
        title=(parsed.title if parsed else None) or Path(file.id).name,
        mime=parsed.mime if parsed else "",
        sha256=sha256 if steady else "",
        bytes=file.bytes,
        mtime_ns=file.mtime_ns if steady else _UNKNOWN,
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


def _outdated(row: DocumentRow, limits: Limits) -> bool:
    """Say whether a file is read again though it has not changed."""
    return row.settings != limits.fingerprint or row.error.split(":")[0] in _TRY_AGAIN


def _keep(work: Work, row: DocumentRow) -> None:
    if row.error:
        reason, _, detail = row.error.partition(": ")
        work.known_bad.append(Failure(row.id, reason, detail))  # type: ignore[arg-type]
    else:
        work.unchanged += 1


def _unsettled(store: LanceStore, documents: dict[str, DocumentRow]) -> set[str]:
    """Give the documents whose chunks do not add up with their row: a run was killed while it wrote them."""
    counts = store.chunks_per_document()
    names = documents.keys() | counts.keys()
    return {name for name in names if counts.get(name, 0) != (documents[name].chunks if name in documents else 0)}


def _has_gone(row: DocumentRow, found: Scan, glob: str | None) -> bool:
    """Say whether a document's file has gone from the folders that were walked."""
    path = Path(path_of(row.uri))
    if any(path.is_relative_to(folder) for folder in found.blind):
        return False
    below = [printable(str(path.relative_to(root))) for root in found.roots if path.is_relative_to(root)]
    return any(not glob or fits(relative, glob) for relative in below) and is_gone(str(path))


def _sha256(path: Path) -> str:
    """Hash a file; one that has just vanished or is closed to us gives ""."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        logger.info("%s cannot be hashed: %s", path, error)
        return ""
