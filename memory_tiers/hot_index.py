"""The hot index: dense search in memory over the embeddings of a collection.

It is a disposable cache of the Lance table, keyed by table version and embedder, and never trusted over the
table: its files carry checksums, and one that does not fit is built again. Up to 50,000 rows the search is exact
(FAISS, fp16 flat); above, FAISS IVF with 8-bit codes finds candidates that are scored again from fp16. Rows written
since the index was built are searched exactly, rows deleted since are passed over, until so many have changed that
it is built anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Scores, Vector, Vectors

faiss: Any = _faiss  # its stubs lack the keyword arguments of its search parameters
logger = logging.getLogger(__name__)

EXACT_BELOW = 50_000  # rows: an exact fp16 scan takes at most about 1.4 ms up to here
_PROBES = 32
_TRAIN_PER_LIST = 64  # FAISS asks for at least 39 training vectors a list
_FORMAT = 1
_LIMITS = {"set_deserialization_vector_byte_limit": 1 << 36, "set_deserialization_loop_limit": 1 << 24}


@dataclass(slots=True)
class HotIndex:
    """Row ids, their vectors, and what FAISS has made of the first of them.

    Args:
        row_ids: (N,) int64, row i of `vectors` is this row of the Lance table; the first `indexed` ascend.
        vectors: (N, E) float16, unit length.
        index: FAISS index over the first `indexed` rows.
        indexed: number of rows inside `index`; those behind are searched exactly.
        alive: (N,) bool, False for rows that were deleted.
    """

    row_ids: RowIds
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float16]]
    index: Any
    indexed: int
    alive: np.ndarray[tuple[int], np.dtype[np.bool_]]

    def __len__(self) -> int:
        return int(self.alive.sum())

    def search(self, query: Vector, k: int, allowed: RowIds | None = None) -> tuple[RowIds, Scores]:
        """Give the row ids and cosines of the k nearest rows, best first.

        Args:
            query: (E,) float32, unit length.
            k: at most this many; >= 1.
            allowed: ascending row ids to which the search is confined, or None for all.
        """
        keep = self.alive if allowed is None else self.alive & np.isin(self.row_ids, allowed, assume_unique=True)
        every = allowed is None and bool(keep.all())
        wanted = min(k if self._exact() else 4 * k, self.indexed)
        rows = np.arange(self.indexed, len(self.row_ids))
        if wanted:
            parameters = self._parameters(keep[: self.indexed], every)
            _, found = self.index.search(query.reshape(1, -1).astype(np.float32), wanted, params=parameters)
            rows = np.concatenate([found[0][found[0] >= 0], rows])
        if not every:
            rows = rows[keep[rows]]
        scores = self._score(rows, query)
        best = np.argsort(-scores, kind="stable")[:k]
        return self.row_ids[rows[best]], scores[best]

    def cosines(self, row_ids: RowIds, query: Vector) -> Scores:
        """Give the cosine of a query with each of some rows; NaN for a row that is not here."""
        order = np.argsort(self.row_ids, kind="stable") if len(self.row_ids) > self.indexed else None
        at = np.searchsorted(self.row_ids, row_ids, sorter=order)
        at = np.minimum(at, max(len(self.row_ids) - 1, 0))
        rows = at if order is None else order[at]
        scores = np.full(len(row_ids), np.nan, dtype=np.float32)
        if len(self.row_ids):
            here = self.row_ids[rows] == row_ids
            scores[here] = self._score(rows[here], query)
        return scores

    def _exact(self) -> bool:
        return not hasattr(self.index, "nprobe")

    def _parameters(self, keep: np.ndarray[Any, np.dtype[np.bool_]], every: bool) -> Any:
        if every:
            return None if self._exact() else faiss.SearchParametersIVF(nprobe=_PROBES)
        selector = faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little"))
        if self._exact():
            return faiss.SearchParameters(sel=selector)
        # a filter may leave only rows far from the query: the fewer it keeps, the more lists are looked at
        share = max(float(keep.mean()), 1e-6)
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(self.index.nlist, int(_PROBES / share) + 1))

    def _score(self, rows: Any, query: Vector) -> Scores:
        return np.asarray(self.vectors[rows].astype(np.float32) @ query, dtype=np.float32)


def open_hot_index(folder: Path, store: LanceStore, embedder: str) -> HotIndex:
    """Give the hot index of a store's present version, from the cache in `folder` as far as that fits.

    Args:
        folder: of the cache; it may be missing, unreadable or unwritable.
        store: the truth.
        embedder: fingerprint of the embedder, part of the key.
    """
    version = store.version
    cached = _load(folder, embedder, store.dimension)
    if cached is not None and cached[1] == version:
        return cached[0]
    if cached is not None:
        index = _catch_up(cached[0], store.row_ids(), store)
        if index is not None:
            return index
    index = _build(store)
    _save(index, folder, embedder, version)
    return index


def _catch_up(index: HotIndex, now: RowIds, store: LanceStore) -> HotIndex | None:
    """Add the rows written and mark the rows deleted since the cache was made; None when too many have changed."""
    added = np.setdiff1d(now, index.row_ids, assume_unique=True)
    alive = np.isin(index.row_ids, now, assume_unique=True)
    changed = len(added) + int((~alive).sum())
    if changed > max(1000, len(index.row_ids) // 10):
        return None
    vectors = index.vectors
    if len(added):
        vectors = np.concatenate([vectors, store.vectors(added).astype(np.float16)])
    return HotIndex(
        row_ids=np.concatenate([index.row_ids, added]),
        vectors=vectors,
        index=index.index,
        indexed=index.indexed,
        alive=np.concatenate([alive, np.ones(len(added), dtype=np.bool_)]),
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


def _save(index: HotIndex, folder: Path, embedder: str, version: int) -> None:
    """Write the cache beside its place and move it in; a disk that cannot be written leaves no cache, and no error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        logger.info("no hot index is kept in %s: %s", folder, error)
        return
    try:
        index.row_ids.tofile(scratch / "rows.i64")
        index.vectors.tofile(scratch / "vectors.f16")
        if hasattr(index.index, "nprobe"):
            faiss.write_index(index.index, str(scratch / "ivf.faiss"))
        files = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
        sidecar = {
            "format": _FORMAT,
            "embedder": embedder,
            "version": version,
            "rows": len(index.row_ids),
            "files": files,
        }
        (scratch / "cache.json").write_text(json.dumps(sidecar))
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        logger.info("no hot index is kept in %s: %s", folder, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load(folder: Path, embedder: str, dimension: int) -> tuple[HotIndex, int] | None:
    """Read the cache and the table version it was made from; None when missing, damaged or another embedder's."""
    try:
        sidecar = json.loads((folder / "cache.json").read_text())
        if sidecar["format"] != _FORMAT or sidecar["embedder"] != embedder:
            return None
        if any(_sha256(folder / name) != digest for name, digest in sidecar["files"].items()):
            logger.warning("the hot index in %s is damaged and is built again", folder)
            return None
        row_ids = np.fromfile(folder / "rows.i64", dtype=np.int64)
        count = len(row_ids)
        vectors: Any = np.zeros((0, dimension), dtype=np.float16)
        if count:
            vectors = np.memmap(folder / "vectors.f16", dtype=np.float16, mode="r", shape=(count, dimension))
        if "ivf.faiss" in sidecar["files"]:
            for limit, value in _LIMITS.items():
                getattr(faiss, limit)(value)
            index = faiss.read_index(str(folder / "ivf.faiss"))
        else:
            index = _faiss_index(vectors)
        if index.ntotal != count or index.d != dimension:
            return None
        return HotIndex(row_ids, vectors, index, count, np.ones(count, dtype=np.bool_)), int(sidecar["version"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if folder.exists():
            logger.warning("the hot index in %s cannot be read and is built again: %s", folder, error)
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def loaded_faiss() -> str:
    """Say which FAISS is loaded, its version and whether it has a GPU."""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return f"faiss {faiss.__version__} ({f'{gpus} GPU' if gpus else 'CPU'}, {os.path.dirname(faiss.__file__)})"
