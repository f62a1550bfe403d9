"""The hot index: dense search in memory over the embeddings of a collection.

It is a disposable cache of the Lance table, keyed by table version and embedder, and never trusted over the
table: its files carry checksums, and one that does not fit is built again. What finds candidates is in `nearest`; they
are scored again from fp16. Rows written since the index was built are searched exactly, rows deleted since are passed
over, until so many have changed that it is built anew. Rows of equal score are ordered by row id, so that no chance
decides among copies of a text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers import nearest
from l2m_rag.memory_tiers.disk import digest
from l2m_rag.memory_tiers.hot_chunks import HotChunks, write_chunks
from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Scores, Vector, Vectors
from l2m_rag.memory_tiers.nearest import Halves, Lists, Mask, Nearest

logger = logging.getLogger(__name__)

_FORMAT = 3
_SPARE = 4096  # rows that may be searched beside an index however small it is
_PART = 65_536
ABANDONED = 600.0  # seconds after which a scratch folder is taken for left behind


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the Lance table with their vectors.

    Args:
        ids: (N,) int64, ascending.
        vectors: (N, E) unit length; float16, or float32 with no more than float16 can hold.
        alive: (N,) bool, False for rows that were deleted, or written again with another vector.
    """

    ids: RowIds
    vectors: Halves | Vectors
    alive: Mask
    whole: bool = field(init=False)  # nothing is deleted

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", bool(self.alive.all()))

    def kept(self, allowed: RowIds | None) -> Mask | None:
        """Say which rows are alive and allowed, ascending ids (None: all); None when that is all of them."""
        if allowed is None:
            return None if self.whole else self.alive
        return self.alive & np.isin(self.ids, allowed, assume_unique=True)

    def find(self, ids: RowIds) -> tuple[Mask, RowIds]:
        """Say of each of some row ids whether it is here and alive, and where it is."""
        if not len(self.ids):
            return np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.int64)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return (self.ids[at] == ids) & self.alive[at], at

    def cosines(self, at: RowIds, query: Vector) -> Scores:
        """Give the cosine of rows; equal vectors have equal scores, which a matrix product does not promise."""
        return _products(self.vectors[at], query)

    def best(self, at: RowIds | None, query: Vector, k: int) -> tuple[RowIds, Scores]:
        """Give the row ids and cosines of those of some rows (None: all) among which the k best are."""
        if at is not None and len(at) <= 4 * k + 1:
            return self.ids[at], self.cosines(at, query)
        # many rows of late, or many equals; some at a time, as they may have to be copied and widened
        parts = (
            [self.vectors] if at is None else (self.vectors[part] for part in np.array_split(at, len(at) // _PART + 1))
        )
        scores = np.concatenate([_products(part, query) for part in parts])
        best = np.flatnonzero(scores >= np.partition(scores, -k)[-k]) if len(scores) > k else slice(None)
        return (self.ids if at is None else self.ids[at])[best], scores[best]

    def without(self, ids: RowIds) -> Rows:
        """Give the rows with some of them dead."""
        here, at = self.find(ids)
        if not here.any():
            return self
        alive = self.alive.copy()
        alive[at[here]] = False
        return Rows(self.ids, self.vectors, alive)

    def with_rows(self, ids: RowIds, vectors: Halves) -> Rows:
        """Give the rows with others beside them, whose ids ascend and are not alive here.

        Where all of them come behind, they are written into the spare room behind the arrays, which this object does
        not look at: at each moment only the newest object may be added to.
        """
        old, count = len(self.ids), len(self.ids) + len(ids)
        if old and ids[0] <= self.ids[-1]:
            kept = np.flatnonzero(~np.isin(self.ids, ids))
            order = np.argsort(np.concatenate([self.ids[kept], ids]), kind="stable")
            parts = ((self.ids, ids), (self.vectors, vectors), (self.alive, np.ones(len(ids), dtype=np.bool_)))
            return Rows(*(np.concatenate([before[kept], added])[order] for before, added in parts))
        arrays: list[Any] = []
        for before, added in ((self.ids, ids), (self.vectors, vectors), (self.alive, True)):
            room = before.base
            if room is None or len(room) < count or not before.size:
                room = np.empty((2 * count, *before.shape[1:]), dtype=before.dtype)
                room[:old] = before
            room[old:count] = added
            arrays.append(room[:count])
        return Rows(*arrays)


def _products(vectors: Halves | Vectors, query: Vector) -> Scores:
    products: Scores = np.einsum("ij,j->i", vectors.astype(np.float32, copy=False), query)
    return products


def no_rows(dimension: int) -> Rows:
    """Give no rows, to which others can be added."""
    return Rows(np.empty(0, np.int64), np.empty((0, dimension), np.float32), np.empty(0, np.bool_))


@dataclass(frozen=True, slots=True)
class HotIndex:
    """The rows that were there when the index was built, those that came since, and what searches the first.

    Args:
        rows: that `nearest` numbers through.
        recent: written since; a row that was written again is dead among `rows`.
        nearest: over `rows`.
        chunks: of `rows`, mapped from the cache; None where no cache can be kept.
    """

    rows: Rows
    recent: Rows
    nearest: Nearest
    chunks: HotChunks | None = None

    def __len__(self) -> int:
        return sum(int(part.alive.sum()) for part in (self.rows, self.recent))

    @property
    def exact(self) -> bool:
        """Whether every row is looked at."""
        return self.nearest.exact

    def search(self, query: Vector, k: int, allowed: RowIds | None = None) -> tuple[RowIds, Scores]:
        """Give the row ids and cosines of the k nearest rows, best first.

        Args:
            query: (E,) float32, unit length.
            k: at most this many; >= 1.
            allowed: ascending row ids to which the search is confined, or None for all.
        """
        query = np.ascontiguousarray(query, dtype=np.float32)
        if not np.isfinite(query).all():
            raise UsageError("the vector to search for has entries that are not numbers")
        ids, scores = self.rows.best(self.nearest.candidates(query, k, self.rows.kept(allowed)), query, k)
        if len(self.recent.ids):
            kept = self.recent.kept(allowed)
            more, theirs = self.recent.best(None if kept is None else np.flatnonzero(kept), query, k)
            ids, scores = np.concatenate([ids, more]), np.concatenate([scores, theirs])
        best = np.lexsort((ids, -scores))[:k]
        return ids[best], scores[best]

    def cosines(self, row_ids: RowIds, query: Vector) -> Scores:
        """Give the cosine of a query with each of some rows; NaN for a row that is not here."""
        query = query.astype(np.float32, copy=False)
        scores = np.full(len(row_ids), np.nan, dtype=np.float32)
        for part in (self.rows, self.recent):
            here, at = part.find(row_ids)
            scores[here] = part.cosines(at[here], query)
        return scores

    def holds(self, row_ids: RowIds) -> Mask:
        """Say of each of some rows whether it is here and not deleted."""
        return self.rows.find(row_ids)[0] | self.recent.find(row_ids)[0]

    def changed(self, written: RowIds, vectors: Vectors, gone: RowIds | None = None) -> HotIndex | None:
        """Give the index after a change; None when so much has changed that its lists should be trained anew.

        Args:
            written: (N,) int64 row ids, ascending, inserted or replaced.
            vectors: (N, E) float32, theirs.
            gone: row ids that were deleted.
        """
        halves = vectors.astype(np.float16)
        again, at = self.rows.find(written)  # mostly with another number in its document, and its old embedding
        again[again] = (self.rows.vectors[at[again]] == halves[again]).all(axis=1)
        if self.chunks:
            self.chunks.forget(written.tolist())
        new = written[~again]
        rows, recent = self.rows.without(new), self.recent
        if gone is not None:
            rows, recent = rows.without(gone), recent.without(gone)
        if len(new):
            recent = recent.with_rows(new, halves[~again])
        if len(recent.ids) + int((~rows.alive).sum()) > _spare(rows):
            return self._merged(rows, recent) if self.exact else None
        return HotIndex(rows, recent, self.nearest, self.chunks)

    def _merged(self, rows: Rows, recent: Rows) -> HotIndex:
        """Give an index over both, which costs nothing but a copy where no lists are trained."""
        parts = rows, recent
        ids = np.concatenate([part.ids[part.alive] for part in parts])
        vectors: Halves = np.concatenate([part.vectors[part.alive].astype(np.float16, copy=False) for part in parts])
        if np.any(ids[1:] < ids[:-1]):
            order = np.argsort(ids)
            ids, vectors = ids[order], vectors[order]
        whole = Rows(ids, vectors, np.ones(len(ids), dtype=np.bool_))
        return HotIndex(whole, no_rows(vectors.shape[1]), nearest.engine(vectors), self.chunks)


def open_hot_index(folder: Path, store: LanceStore, embedder: str) -> HotIndex:
    """Give the hot index of a store's present version, from the cache in `folder` as far as that fits.

    Args:
        folder: of the cache; it may be missing, unreadable or unwritable.
        store: the truth.
        embedder: fingerprint of the embedder, part of the key.
    """
    version = store.version
    cached = _load(folder, embedder, store.dimension)
    if cached is not None:
        index, key = cached
        made_of, stamp = int(key["version"]), store.stamp(key["version"])
        if made_of == version and stamp == key["stamp"]:
            return index
        # a version that was cleaned up has no stamp any more
        if made_of < version and stamp in (key["stamp"], None) and key["commits_lost"] == store.commits_lost:
            caught_up = catch_up(index, made_of, store)
            if caught_up is not None:
                return caught_up
    index = _build(store)
    state = {"version": version, "stamp": store.stamp(version), "commits_lost": store.commits_lost}
    chunks = _save(index, folder, store, {"format": _FORMAT, "embedder": embedder, **state})
    return HotIndex(index.rows, index.recent, index.nearest, chunks)


def catch_up(
    index: HotIndex, made_of: int, store: LanceStore, known: Mapping[str, Vector] | None = None
) -> HotIndex | None:
    """Bring an index from an older version to the present one; None when too much has changed.

    Args:
        index: of the older version.
        made_of: that version.
        store: the truth.
        known: vectors by id that need not be read.
    """
    written, names = store.changed_since(made_of)
    if len(written) > _spare(index.rows):
        return None
    fresh = written[~index.holds(written)]
    gone = None
    if len(index) + len(fresh) != store.count_chunks():
        before = np.concatenate([part.ids[part.alive] for part in (index.rows, index.recent)])
        gone = np.setdiff1d(before, store.row_ids(), assume_unique=True)
    if names and known and all(name in known for name in names):
        vectors: Vectors = np.stack([known[name] for name in names])
    else:
        vectors = store.vectors(written)
    return index.changed(written, vectors, gone)


def _spare(rows: Rows) -> int:
    """Give how many rows may be searched beside an index, or passed over in it."""
    return max(_SPARE, len(rows.ids) // 10)


def _build(store: LanceStore) -> HotIndex:
    count = store.count_chunks()
    row_ids = np.empty(count, dtype=np.int64)
    vectors = np.empty((count, store.dimension), dtype=np.float16)
    done = 0
    for ids, batch in store.all_vectors():
        row_ids[done : done + len(ids)] = ids
        vectors[done : done + len(ids)] = batch
        done += len(ids)
    order = np.argsort(row_ids[:done], kind="stable")
    row_ids, vectors = row_ids[order], vectors[order]
    rows = Rows(row_ids, vectors, np.ones(done, dtype=np.bool_))
    return HotIndex(rows, no_rows(store.dimension), nearest.engine(vectors))


def _save(index: HotIndex, folder: Path, store: LanceStore, key: dict[str, Any]) -> HotChunks | None:
    """Write the cache beside its place, move it in, and give the chunks that are now in it.

    A disk that cannot be written leaves no cache, and no error.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        logger.info("no hot index is kept in %s: %s", folder, error)
        return None
    try:
        index.rows.ids.tofile(scratch / "rows.i64")
        index.rows.vectors.tofile(scratch / "vectors.f16")
        if isinstance(index.nearest, Lists):
            index.nearest.save(scratch / "ivf.faiss")
        write_chunks(scratch / "chunks.arrow", store)
        files = {}
        for path in sorted(scratch.iterdir()):
            with path.open("rb") as stream:
                files[path.name] = _sha256(stream)
        key = {**key, "files": files}
        (scratch / "cache.json").write_text(json.dumps({**key, "digest": digest(key)}))
        with (scratch / "chunks.arrow").open("rb") as stream:
            chunks = HotChunks(stream)
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return chunks
    except (OSError, RuntimeError) as error:
        logger.info("no hot index is kept in %s: %s", folder, error)
        return None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while they saved have left."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _load(folder: Path, embedder: str, dimension: int) -> tuple[HotIndex, dict[str, Any]] | None:
    """Read the cache and the state of the table that it was made of; None when there is none that fits."""
    try:
        key = json.loads((folder / "cache.json").read_text())
        intact = key.pop("digest") == digest(key)
        if intact and (key["format"] != _FORMAT or key["embedder"] != embedder):
            return None
        with ExitStack() as stack:  # opened once, so that what was checked is what is read, also if it is replaced
            streams = {name: stack.enter_context((folder / name).open("rb")) for name in key["files"]}
            if not intact or any(_sha256(streams[name]) != told for name, told in key["files"].items()):
                logger.warning("the hot index in %s is damaged and is built again", folder)
                return None
            for stream in streams.values():
                stream.seek(0)
            row_ids = np.fromfile(streams["rows.i64"], dtype=np.int64)
            count = len(row_ids)
            vectors: Any = np.zeros((0, dimension), dtype=np.float16)
            if count:
                mapped = np.memmap(streams["vectors.f16"], dtype=np.float16, mode="r", shape=(count, dimension))
                vectors = mapped.view(np.ndarray)  # the same bytes; the class costs 10 us a look-up
            lists = streams.get("ivf.faiss")
            found = nearest.engine(vectors, lists.read if lists else None)
            chunks = HotChunks(streams["chunks.arrow"])
        if len(found) != count:
            return None
        rows = Rows(row_ids, vectors, np.ones(count, dtype=np.bool_))
        return HotIndex(rows, no_rows(dimension), found, chunks), key
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if folder.exists():
            logger.warning("the hot index in %s cannot be read and is built again: %s", folder, error)
        return None


def _sha256(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()
