"""Ingest: files -> text -> chunks -> vectors -> tier, in one loop; documents stream through it and memory stays flat.

A document's row is written after its last chunk, so a run that was killed is found by counting: chunks that no row
accounts for belong to a document that must be done again. Before the chunks of a document are replaced, its row is
marked, so that it is done again also when its old file comes back. Chunks are named by their content, so doing it
again changes nothing that was right.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from l2m_rag.errors import Reason
from l2m_rag.indexers.readers import UNKNOWN, Alone, Embedder, Workforce, sha256_of
from l2m_rag.indexers.readers import Limits as Limits
from l2m_rag.indexers.scan import Found, Scan, fits, is_gone, path_of, printable, scan
from l2m_rag.memory_tiers.lance_store import LanceStore, Vector, Vectors
from l2m_rag.memory_tiers.long_term import LongTermTier
from l2m_rag.memory_tiers.records import Chunk, DocumentRow

_BATCH = 512  # chunks a commit: a few seconds of embedding, against about 0.1 s for the commit itself
_TRY_AGAIN: tuple[Reason, ...] = ("timeout", "unreadable")


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
        elif row.sha256 and row.bytes == file.bytes and sha256_of(file.path) == row.sha256:
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
    *,
    workforce: Workforce | None = None,
) -> IngestReport:
    """Read the planned files into a tier.

    Args:
        name: of the collection, for the report.
        work: from `plan`.
        tier: that the caller has locked for writing.
        embedder: or a function that loads it; it is not called when there is nothing to embed.
        limits: of parsing and cutting.
        progress: called after each file and while vectors are computed.
        workforce: who reads and embeds; default this process, with `embedder`.
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
    workforce = workforce or Alone(embedder, limits)
    batch = _Batch(tier.store, workforce, report, tell)
    tell()
    for read in workforce.read(work.todo):
        file, before = read.file, documents.get(read.file.id)
        replaces = before is not None or file.id in work.unsettled
        if read.error is None:
            count = batch.add(file.id, read.chunks, replaces=replaces, before=before)
            batch.close(read.row(count))
            report.added += before is None or bool(before.error)
            report.updated += before is not None and not before.error
        else:
            report.failed.append(Failure(file.id, read.error.reason, read.error.detail))
            # what may pass by itself does not cost a document that was read well before
            if before is None or before.error or read.error.reason not in _TRY_AGAIN:
                batch.add(file.id, iter(()), replaces=replaces, before=before)
                batch.close(read.row(0))
        done += 1
        tell(file.id)
    batch.finish()
    tier.store.index_text()  # also what a run that was killed has left to do
    if batch.commits or work.gone or work.touched:
        tier.hot_index()
    report.seconds = round(time.monotonic() - began, 3)
    tell()
    return report


@dataclass(slots=True)
class _Commit:
    """What is written together.

    Args:
        marks: rows of documents whose chunks are about to be replaced.
        chunks: to write.
        known: the vector that the store has of the text of each of them, or None.
        computed: waits for the vectors of the others, in their order.
        replaced: ids of the new chunks of each complete document that may have had other ones.
        rows: of the documents that are then complete.
    """

    marks: list[DocumentRow]
    chunks: list[Chunk]
    known: list[Vector | None]
    computed: Callable[[], Vectors]
    replaced: dict[str, set[str]]
    rows: list[DocumentRow]

    def vectors(self) -> Vectors:
        """Give the vectors of the chunks, (N, E) float32."""
        new = iter(self.computed())
        return np.stack([next(new) if vector is None else vector for vector in self.known])


class _Batch:
    """Chunks on their way into the store, and the document rows that follow them."""

    def __init__(
        self, store: LanceStore, workforce: Workforce, report: IngestReport, tell: Callable[[str], None]
    ) -> None:
        self.commits = 0
        self._store = store
        self._workforce = workforce
        self._report = report
        self._tell = tell
        self._waiting: deque[_Commit] = deque()  # for their vectors, oldest first
        self._chunks: list[Chunk] = []
        self._rows: list[DocumentRow] = []
        self._unmarked: list[DocumentRow] = []  # rows of documents whose chunks are about to be replaced
        self._replaced: dict[str, set[str]] = {}  # document -> ids of its new chunks, for those that have old ones
        self._known: dict[str, dict[str, Vector]] = {}  # document -> vectors of the texts it has already

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
                self._pass_on()
        return count

    def close(self, row: DocumentRow) -> None:
        """Note that a document is complete."""
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self._pass_on()

    def finish(self) -> None:
        """Write all that is left."""
        self._pass_on()
        while self._waiting:
            self._write(self._waiting.popleft())

    def _pass_on(self) -> None:
        """Have the vectors of what was collected computed, and write what has waited longest for its own."""
        known = [self._known.get(chunk.document, {}).get(chunk.text) for chunk in self._chunks]
        new = [chunk for chunk, vector in zip(self._chunks, known, strict=True) if vector is None]
        complete = [row.id for row in self._rows if row.id in self._replaced]
        computed = _nothing
        if new:
            first = new[0].document
            computed = self._workforce.encode([chunk.text for chunk in new], lambda _: self._tell(first))
        replaced = {document: self._replaced.pop(document) for document in complete}
        self._waiting.append(_Commit(self._unmarked, self._chunks, known, computed, replaced, self._rows))
        for document in complete:
            self._known.pop(document)
        self._unmarked, self._chunks, self._rows = [], [], []
        while len(self._waiting) > self._workforce.ahead:
            self._write(self._waiting.popleft())

    def _write(self, commit: _Commit) -> None:
        """Write chunks, drop what they replace, and then write the rows of the documents that are complete."""
        self._store.put_documents([replace(row, sha256="", mtime_ns=UNKNOWN) for row in commit.marks])
        if commit.chunks:
            self._store.add_chunks(commit.chunks, commit.vectors())
        self._store.drop_stale_chunks(commit.replaced)
        self._store.put_documents(commit.rows)
        self.commits += bool(commit.chunks or commit.rows)
        self._report.chunks += len(commit.chunks)


def _nothing() -> Vectors:
    """Give the vectors of no texts."""
    return np.empty((0, 0), np.float32)


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
