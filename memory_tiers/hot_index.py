"""The hot index: dense search in memory over the embeddings of a collection.

It is a disposable cache of the Lance table, keyed by table version and embedder, and never trusted over the
table: its files carry checksums, and one that does not fit is built again. Below 50,000 rows the search is exact
(FAISS, fp16 flat); above, FAISS IVF with 8-bit codes finds candidates that are scored again from fp16. Rows written
since the index was built are searched exactly, rows deleted since are passed over, until so many have changed that
it is built anew. Rows of equal score are ordered by row id, so that no chance decides among copies of a text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.disk import digest
from l2m_rag.memory_tiers.hot_chunks import HotChunks, write_chunks
from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Scores, Vector, Vectors

faiss: Any = _faiss  # its stubs lack the keyword arguments of its search parameters
logger = logging.getLogger(__name__)

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

EXACT_BELOW = 50_000  # rows: an exact fp16 scan takes at most about 1.4 ms up to here
PROBES = 32
_TRAIN_PER_LIST = 64  # FAISS asks for at least 39 training vectors a list
_FORMAT = 3
_TIE = 1e-5  # scores that differ by less may be those of equal vectors
ABANDONED = 600.0  # seconds after which a scratch folder is taken for left behind
_LIMITS = {"set_deserialization_vector_byte_limit": 1 << 36, "set_deserialization_loop_limit": 1 << 24}


@dataclass(slots=True)
class HotIndex:
    """Row ids, their vectors, and what FAISS has made of the first of them.

    Args:
        row_ids: (N,) int64, row i of `vectors` is this row of the Lance table; the first `indexed` ascend,
            and so do those behind.
        vectors: (N, E) float16, unit length.
        index: FAISS index over the first `indexed` rows.
        indexed: number of rows inside `index`; those behind are searched exactly.
        alive: (N,) bool, False for rows that were deleted.
        chunks: of the first rows, mapped from the cache; None where no cache can be kept.
    """

    row_ids: RowIds
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float16]]
    index: Any
    indexed: int
    alive: Mask
    chunks: HotChunks | None = None
    whole: bool = field(init=False)  # nothing is deleted

    def __post_init__(self) -> None:
        self.whole = bool(self.alive.all())

    def __len__(self) -> int:
        return int(self.alive.sum())

    def search(self, query: Vector, k: int, allowed: RowIds | None = None) -> tuple[RowIds, Scores]:
        """Give the row ids and cosines of the k nearest rows, best first.

        Args:
            query: (E,) float32, unit length.
            k: at most this many; >= 1.
            allowed: ascending row ids to which the search is confined, or None for all.
        """
        if not np.isfinite(query).all():
            raise UsageError("the vector to search for has entries that are not numbers")
        if allowed is None and self.whole:  # the usual case: no filter, nothing deleted
            rows = self._candidates(query, k, None)
            if len(self.row_ids) > self.indexed:
                rows = np.concatenate([rows, np.arange(self.indexed, len(self.row_ids))])
        else:
            keep = self.alive if allowed is None else self.alive & np.isin(self.row_ids, allowed, assume_unique=True)
            found = self._candidates(query, k, keep[: self.indexed])
            rows = np.concatenate([found, self.indexed + np.flatnonzero(keep[self.indexed :])])
        if len(rows) > 4 * k + 1:  # many rows of late, or many equals: a rough look leaves few to score
            rough = self.vectors[rows].astype(np.float32) @ query
            rows = rows[rough >= np.partition(rough, -k)[-k] - _TIE]
        scores = self._score(rows, query)
        best = np.lexsort((self.row_ids[rows], -scores))[:k]
        return self.row_ids[rows[best]], scores[best]

    def _candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give the rows of `index` among which the k best that are kept (None: all) are found."""
        count = self.indexed if kept is None else int(kept.sum())
        if self.exact:
            rows, scores = self._ask(query, min(k + 1, count), kept)
            if len(rows) > k and scores[k - 1] - scores[k] < _TIE:  # which of the equals come first is for us to say
                return np.arange(self.indexed) if kept is None else np.flatnonzero(kept)
            return rows
        # 8 bits err little, so twice as many hold the k best; those that a filter leaves may lie far off
        wanted = min((2 if kept is None else 4) * k, count)
        # as many lists as hold the candidates twice over; a filter that leaves few rows spreads them over more lists
        lists = max(PROBES, 2 * wanted * self.index.nlist // self.indexed) * self.indexed // max(count, 1)
        rows, _ = self._ask(query, wanted, kept, min(lists, self.index.nlist))
        if len(rows) < wanted:  # those that are left lie far from the query
            rows, _ = self._ask(query, wanted, kept, self.index.nlist)
        return rows

    def _ask(self, query: Vector, wanted: int, kept: Mask | None, lists: int = 0) -> tuple[RowIds, Scores]:
        """Let FAISS find the nearest rows that are kept, looking into a number of lists."""
        if not wanted:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        if kept is None:
            parameters = None if self.exact else _lists_looked_into(lists)
        else:
            selector = faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little"))
            kind = faiss.SearchParameters if self.exact else partial(faiss.SearchParametersIVF, nprobe=lists)
            parameters = kind(sel=selector)
        scores, rows = self.index.search(query.reshape(1, -1).astype(np.float32), wanted, params=parameters)
        found = rows[0] >= 0
        return (rows[0], scores[0]) if found.all() else (rows[0][found], scores[0][found])

    def cosines(self, row_ids: RowIds, query: Vector) -> Scores:
        """Give the cosine of a query with each of some rows; NaN for a row that is not here."""
        scores = np.full(len(row_ids), np.nan, dtype=np.float32)
        for start, part in ((0, self.row_ids[: self.indexed]), (self.indexed, self.row_ids[self.indexed :])):
            if len(part):
                at = np.minimum(np.searchsorted(part, row_ids), len(part) - 1)
                here = part[at] == row_ids
                scores[here] = self._score(start + at[here], query)
        return scores

    def holds(self, row_ids: RowIds) -> Mask:
        """Say of each of some rows whether it is here and not deleted."""
        here = np.zeros(len(row_ids), dtype=np.bool_)
        for start, part in ((0, self.row_ids[: self.indexed]), (self.indexed, self.row_ids[self.indexed :])):
            if len(part):
                at = np.minimum(np.searchsorted(part, row_ids), len(part) - 1)
                here |= (part[at] == row_ids) & self.alive[start + at]
        return here

    @property
    def exact(self) -> bool:
        """Whether every row is looked at (no inverted lists)."""
        return not hasattr(self.index, "nprobe")

    def _score(self, rows: RowIds, query: Vector) -> Scores:
        """Give the cosine of rows; equal vectors have equal scores, which a matrix product does not promise."""
        scores: Scores = np.einsum("ij,j->i", self.vectors[rows].astype(np.float32), query.astype(np.float32))
        return scores


@lru_cache(maxsize=64)
def _lists_looked_into(lists: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=lists)


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
            caught_up = _catch_up(index, made_of, store)
            if caught_up is not None:
                return caught_up
    index = _build(store)
    state = {"version": version, "stamp": store.stamp(version), "commits_lost": store.commits_lost}
    index.chunks = _save(index, folder, store, {"format": _FORMAT, "embedder": embedder, **state})
    return index


def _catch_up(index: HotIndex, made_of: int, store: LanceStore) -> HotIndex | None:
    """Add the rows written and mark the rows deleted since a version; None when too many have changed."""
    now = store.row_ids()
    added = np.setdiff1d(now, index.row_ids, assume_unique=True)
    alive = np.isin(index.row_ids, now, assume_unique=True)
    written = np.setdiff1d(store.changed_since(made_of), added, assume_unique=True)
    if len(added) + len(written) + int((~alive).sum()) > max(1000, len(index.row_ids) // 10):
        return None
    # a row that was written again has mostly got another number in its document, and its old embedding
    at = np.searchsorted(index.row_ids, written)
    if len(written) and not np.array_equal(store.vectors(written).astype(np.float16), index.vectors[at]):
        return None
    if index.chunks:
        index.chunks.forget(written.tolist())
    vectors = index.vectors
    if len(added):
        vectors = np.concatenate([vectors, store.vectors(added).astype(np.float16)])
    return HotIndex(
        row_ids=np.concatenate([index.row_ids, added]),
        vectors=vectors,
        index=index.index,
        indexed=index.indexed,
        alive=np.concatenate([alive, np.ones(len(added), dtype=np.bool_)]),
        chunks=index.chunks,
    )


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
    return HotIndex(row_ids, vectors, _faiss_index(vectors), done, np.ones(done, dtype=np.bool_))


def _faiss_index(vectors: np.ndarray[tuple[int, int], np.dtype[np.float16]]) -> Any:
    """Give an exact fp16 index; from `EXACT_BELOW` rows on IVF with 8-bit codes (about 4 sqrt(N) lists)."""
    count, dimension = vectors.shape
    if count < EXACT_BELOW:
        index = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = 1 << round(np.log2(4 * count**0.5))
        index = faiss.index_factory(dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(count, min(count, lists * _TRAIN_PER_LIST), replace=False)
        index.train(_float32(vectors[np.sort(sample)]))
    for start in range(0, count, 65_536):
        index.add(_float32(vectors[start : start + 65_536]))
    return index


def _float32(vectors: np.ndarray[Any, np.dtype[np.float16]]) -> Vectors:
    return np.ascontiguousarray(vectors, dtype=np.float32)


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
        index.row_ids.tofile(scratch / "rows.i64")
        index.vectors.tofile(scratch / "vectors.f16")
        if hasattr(index.index, "nprobe"):
            faiss.write_index(index.index, str(scratch / "ivf.faiss"))
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
            if "ivf.faiss" in streams:
                for limit, value in _LIMITS.items():
                    getattr(faiss, limit)(value)
                index = faiss.read_index(faiss.PyCallbackIOReader(streams["ivf.faiss"].read))
            else:
                index = _faiss_index(vectors)
            chunks = HotChunks(streams["chunks.arrow"])
        if index.ntotal != count or index.d != dimension:
            return None
        return HotIndex(row_ids, vectors, index, count, np.ones(count, dtype=np.bool_), chunks), key
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if folder.exists():
            logger.warning("the hot index in %s cannot be read and is built again: %s", folder, error)
        return None


def _sha256(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def loaded_faiss() -> str:
    """Say which FAISS is loaded, its version and whether it has a GPU."""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return f"faiss {faiss.__version__} ({f'{gpus} GPU' if gpus else 'CPU'}, {os.path.dirname(faiss.__file__)})"
