"""The long-term tier of one collection: what was ingested, and hybrid search over it.

A search asks two halves, the hot index (dense) and Lance's full-text index (BM25), and fuses what they give. The
default fusion adds the cosine and the BM25 score scaled by the best BM25 score of the question; reciprocal rank fusion
(Cormack et al., SIGIR 2009) is the other choice. Measured: docs/decisions/0003-fusion.md.
"""

from __future__ import annotations

import heapq
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout

from l2m_rag.errors import CollectionNotFound, CorruptError, IncompatibleError, LockedError, UsageError
from l2m_rag.memory_tiers.hot_index import HotIndex, open_hot_index
from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Scores, Vector
from l2m_rag.memory_tiers.records import Passage

Mode = Literal["hybrid", "dense", "text"]
Fusion = Literal["scores", "rrf"]

FORMAT = 1
_CANDIDATES = 100  # rows that each half brings to the fusion
_LEXICAL_WEIGHT = 0.5  # of the scaled BM25 score beside the cosine
_RRF_K = 60
_LONGEST_TEXT = 4000  # characters of a question that the full-text half looks at


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a collection was made with; another one at opening is an error, not a wrong answer.

    Args:
        embedder: name of the embedder.
        fingerprint: hash of its weights.
        dimension: of its vectors.
        created_at: seconds since 1970.
        format: version of what is stored.
    """

    embedder: str
    fingerprint: str
    dimension: int
    created_at: float
    format: int = FORMAT


class LongTermTier:
    """Documents and chunks on disk, with the indexes that search them.

    Args:
        folder: of the collection; it must hold a manifest.

    Raises:
        CollectionNotFound: there is no manifest.
        CorruptError: the manifest or the tables cannot be read.
        IncompatibleError: a newer version of the library wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.store = LanceStore(folder / "tables", self.manifest.dimension)
        self._hot: HotIndex | None = None
        self._hot_version = -1

    def hot_index(self) -> HotIndex:
        """Give the hot index of the newest version."""
        self.store.refresh()
        version = self.store.version
        if self._hot is None or self._hot_version != version:
            self._hot = open_hot_index(self.folder / "hot", self.store, self.manifest.fingerprint)
            self._hot_version = version
        return self._hot

    def search(
        self,
        text: str,
        vector: Vector | None,
        k: int,
        *,
        mode: Mode = "hybrid",
        where: str | None = None,
        fusion: Fusion = "scores",
    ) -> list[Passage]:
        """Give the k best passages for a question, best first.

        Args:
            text: the question; its words are used by the modes hybrid and text.
            vector: (E,) float32, the question's embedding; may be None in mode text.
            k: most passages; >= 1.
            mode: both halves, or one.
            where: filter over columns and `metadata.KEY`, in SQL.
            fusion: how the halves are combined.

        Raises:
            UsageError: k, mode or the filter cannot be used.
        """
        if k < 1:
            raise UsageError(f"k ({k}) must be at least 1")
        if mode not in ("hybrid", "dense", "text"):
            raise UsageError(f"mode ({mode}) must be hybrid, dense or text")
        hot = self.hot_index()
        depth = max(k, _CANDIDATES) if mode == "hybrid" else k
        dense: tuple[RowIds, Scores] = (np.empty(0, np.int64), np.empty(0, np.float32))
        lexical = dense
        if mode != "text" and vector is not None:
            dense = hot.search(vector, depth, self.store.row_ids(where) if where else None)
        if mode != "dense" and any(letter.isalnum() for letter in text):
            lexical = self.store.full_text(text[:_LONGEST_TEXT], depth, where)
        cosines = hot.cosines(lexical[0], vector) if vector is not None else np.full(len(lexical[0]), np.nan)
        ranked = _fuse(dense, lexical, cosines, fusion, k)
        rows = [candidate.row for candidate in ranked]
        chunks = hot.chunks.fetch(rows) if hot.chunks else {}
        missing = [row for row in rows if row not in chunks]  # written since, or no cache could be kept
        chunks |= zip(missing, self.store.fetch(missing), strict=True)
        return [
            Passage(chunks[candidate.row], candidate.score, candidate.dense, candidate.lexical) for candidate in ranked
        ]


@dataclass(frozen=True, slots=True)
class _Candidate:
    row: int
    score: float
    dense: float | None
    lexical: float | None


def _fuse(
    dense: tuple[RowIds, Scores], lexical: tuple[RowIds, Scores], cosines: Scores, fusion: Fusion, k: int
) -> list[_Candidate]:
    """Merge the two halves; ties go by row id, so that the order never depends on chance.

    Args:
        dense: row ids and cosines, best first.
        lexical: row ids and BM25 scores, best first.
        cosines: cosine of each lexical row, NaN when there is none.
        fusion: "scores" or "rrf".
        k: how many are given at most.
    """
    close = {int(row): float(score) for row, score in zip(*dense, strict=True)}
    worded = {int(row): float(score) for row, score in zip(*lexical, strict=True)}
    for row, cosine in zip(lexical[0].tolist(), cosines.tolist(), strict=True):
        if not np.isnan(cosine):
            close.setdefault(row, cosine)
    ranks = [{int(row): rank for rank, row in enumerate(half[0].tolist())} for half in (dense, lexical)]
    best = max(worded.values(), default=1.0) or 1.0

    def score(row: int) -> float:
        if not worded or not len(dense[0]):
            return worded[row] if worded else close[row]
        if fusion == "rrf":
            return sum(1 / (_RRF_K + 1 + half[row]) for half in ranks if row in half)
        return close.get(row, 0.0) + _LEXICAL_WEIGHT * worded.get(row, 0.0) / best

    ranked = heapq.nsmallest(k, ((-score(row), row) for row in close.keys() | worded.keys()))
    return [_Candidate(row, -below, close.get(row), worded.get(row)) for below, row in ranked]


def create_tier(folder: Path, manifest: Manifest) -> LongTermTier:
    """Make the tables of a new collection, and then the manifest that says it exists.

    Raises:
        CorruptError: the folder holds data but no manifest.
    """
    if (folder / "manifest.json").exists():
        return LongTermTier(folder)
    if (folder / "tables").exists() and any((folder / "tables").iterdir()):
        if _has_rows(folder / "tables", manifest.dimension):
            raise CorruptError(
                f"{folder} holds data but no manifest.json, so nothing is written over it; "
                f"restore the manifest or move the folder away"
            )
        _clear(folder / "tables")  # a creation that was interrupted before its manifest: nothing was stored yet
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    LanceStore(folder / "tables", manifest.dimension, create=True)
    write_json(folder / "manifest.json", asdict(manifest))
    return LongTermTier(folder)


def _has_rows(tables: Path, dimension: int) -> bool:
    try:
        return LanceStore(tables, dimension).count_chunks() > 0
    except CorruptError:
        return any(tables.rglob("data/*.lance"))


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a collection.

    Raises:
        CollectionNotFound: there is none.
        CorruptError: it cannot be read.
        IncompatibleError: it was written by a newer version.
    """
    try:
        found = json.loads((folder / "manifest.json").read_text())
        if int(found["format"]) > FORMAT:
            raise IncompatibleError(
                f"collection {folder.name!r} has format {found['format']}; this version reads up to {FORMAT}. "
                f"Upgrade l2m-rag"
            )
        return Manifest(**found)
    except FileNotFoundError:
        raise CollectionNotFound(
            f"there is no collection {folder.name!r}; make it with: l2m ingest PATH -c {folder.name}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / 'manifest.json'} cannot be read ({error}); restore it from an export") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that it is there whole or not at all, also after a power cut."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w") as stream:
            json.dump(value, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the writer's lock of a collection.

    Raises:
        LockedError: another process holds it; the text names that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "writer.json"
    lock = FileLock(folder / "writer.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"collection {folder.name!r} is being written by {_owner(owner)}; try again when it has finished"
        ) from None
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        since = time.strftime("%H:%M:%S", time.localtime(found["since"]))
        return f"process {found['pid']} on {found['host']} (since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
