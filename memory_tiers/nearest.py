"""What finds the vectors nearest to one: over all rows, on the threads of a CPU or on a GPU, or by inverted lists.

Each gives candidates, among which the k best are; the hot index scores those again. Only this file imports faiss.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import faiss as _faiss
import numpy as np

from l2m_rag.memory_tiers.lance_store import RowIds, Scores, Vector, Vectors

faiss: Any = _faiss  # its stubs lack the keyword arguments of its search parameters

Halves = np.ndarray[tuple[int, int], np.dtype[np.float16]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

EXACT_UP_TO = 50_000  # rows: FAISS scans so many fp16 vectors in about 1.4 ms a thread
PROBES = 32
HALF = faiss.ScalarQuantizer.QT_fp16
TIE = 1e-5  # scores that differ by less may be those of equal vectors
GPU_SHARE = 0.25  # of the free memory of a GPU, which the vectors may take
_PER_THREAD = 2_000  # rows below which another thread costs more than it saves
_TRAIN_PER_LIST = 64  # FAISS asks for at least 39 training vectors a list
_ROUNDING = 2e-3  # by which two products of unit vectors in fp16 may err together
_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-cuda")
_LIMITS = {"set_deserialization_vector_byte_limit": 1 << 36, "set_deserialization_loop_limit": 1 << 24}


class Nearest(Protocol):
    """Finds the nearest of N rows."""

    exact: bool
    """Whether every row is looked at."""

    def __len__(self) -> int: ...

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give rows among which the k best that are kept are found, equals of the last of them included.

        Args:
            query: (E,) float32, unit length.
            k: at most this many are wanted; >= 1.
            kept: (N,) bool, or None for all.
        """


class Flat:
    """All rows in FAISS with fp16 codes, split over its threads: FAISS answers one query with one thread.

    Args:
        vectors: (N, E) float16.
    """

    exact = True

    def __init__(self, vectors: Halves) -> None:
        count, dimension = vectors.shape
        threads = max(1, min(faiss.omp_get_max_threads(), count // _PER_THREAD))
        self._starts = [count * number // threads for number in range(threads + 1)]
        self._parts = []
        for start, end in zip(self._starts, self._starts[1:], strict=False):
            part = faiss.IndexScalarQuantizer(dimension, HALF, faiss.METRIC_INNER_PRODUCT)
            codes = np.ascontiguousarray(vectors[start:end]).view(np.uint8).reshape(-1)  # fp16 is its own code
            faiss.copy_array_to_vector(codes, part.codes)
            part.ntotal = end - start
            self._parts.append(part)
        self.index = self._parts[0]
        if threads > 1:
            self.index = faiss.IndexShards(dimension, True, True)  # threads of its own; rows are numbered through
            for part in self._parts:
                self.index.add_shard(part)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give the k best, and so many more that none is equal to the last of those left out; see `Nearest`."""
        count = len(self) if kept is None else int(kept.sum())
        wanted = k + 1
        while wanted < count:
            rows, scores = self._ask(query, wanted, kept)
            if scores[k - 1] - scores[-1] >= TIE:
                return rows
            wanted *= 8
        return np.arange(len(self)) if kept is None else np.flatnonzero(kept)

    def _ask(self, query: Vector, wanted: int, kept: Mask | None) -> tuple[RowIds, Scores]:
        if kept is None:
            return _found(self.index.search(query[None], wanted))
        found = []  # one after the other, as one selector cannot serve all parts
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            rows, scores = _found(part.search(query[None], min(wanted, end - start), params=_only(kept[start:end])))
            found.append((start + rows, scores))
        rows, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(-scores, kind="stable")[:wanted]
        return rows[order], scores[order]


class Lists:
    """Rows in FAISS by inverted lists, with 8-bit codes (IVF,SQ8).

    Args:
        index: an IVF index, filled.
    """

    exact = False

    def __init__(self, index: Any) -> None:
        self.index = index
        self.index.parallel_mode = 1  # the lists of one query are shared out among the threads

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give the best rows of the lists that are nearest; see `Nearest`."""
        count = len(self) if kept is None else int(kept.sum())
        # 8 bits err little, so twice as many hold the k best; those that a filter leaves may lie far off
        wanted = min((2 if kept is None else 4) * k, count)
        # as many lists as hold the candidates twice over; a filter that leaves few rows spreads them over more lists
        lists = max(PROBES, 2 * wanted * self.index.nlist // len(self)) * len(self) // max(count, 1)
        rows = self._ask(query, wanted, kept, min(lists, self.index.nlist))
        if len(rows) < wanted:  # those that are left lie far from the query
            rows = self._ask(query, wanted, kept, self.index.nlist)
        return rows

    def _ask(self, query: Vector, wanted: int, kept: Mask | None, lists: int) -> RowIds:
        if not wanted:
            return np.empty(0, dtype=np.int64)
        how = _lists_looked_into(lists) if kept is None else _only(kept, partial(_in_lists, lists))
        return _found(self.index.search(query[None], wanted, params=how))[0]

    def save(self, path: Path) -> None:
        """Write the index to a file."""
        faiss.write_index(self.index, str(path))


class OnDevice:
    """All rows as a matrix of fp16 in torch, on a GPU.

    Args:
        vectors: (N, E) float16.
        device: where they go; "cpu" works too, and is slower there than FAISS.
    """

    exact = True

    def __init__(self, vectors: Halves, device: str = "cuda") -> None:
        import torch

        self._torch = torch
        self._vectors = torch.empty(vectors.shape, dtype=torch.float16, device=device)
        for start in range(0, len(vectors), 65_536):  # the file that they are mapped from cannot be written to
            self._vectors[start : start + 65_536] = torch.tensor(vectors[start : start + 65_536])

    def __len__(self) -> int:
        return int(self._vectors.shape[0])

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give all rows that rounding may hide among the k best; see `Nearest`."""
        torch, device = self._torch, self._vectors.device
        with torch.inference_mode():
            scores = self._vectors @ torch.tensor(query, dtype=torch.float16, device=device)
            if kept is not None:
                scores = scores.masked_fill(~torch.from_numpy(kept).to(device), -torch.inf)
            worst = scores.topk(min(k, len(self))).values[-1:].float()
            least = torch.where(worst.isinf(), torch.finfo(torch.float16).min, worst - _ROUNDING)
            rows: RowIds = (scores.float() >= least).nonzero()[:, 0].cpu().numpy()
        return rows


def engine(vectors: Halves, read: Callable[[int], bytes] | None = None) -> Nearest:
    """Give what searches so many vectors best on this machine.

    Args:
        vectors: (N, E) float16.
        read: gives the next n bytes of what `Lists.save` has written of them; None when there is no such file.

    Raises:
        RuntimeError: the file holds something else.
    """
    if _fits_on_gpu(vectors.nbytes):
        return OnDevice(vectors)
    if read is not None:
        return _read_lists(read)
    return Flat(vectors) if len(vectors) <= EXACT_UP_TO else train_lists(vectors)


def train_lists(vectors: Halves) -> Lists:
    """Put vectors into about 4 sqrt(N) inverted lists."""
    count, dimension = vectors.shape
    lists = 1 << round(np.log2(4 * count**0.5))
    index = faiss.index_factory(dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(count, min(count, lists * _TRAIN_PER_LIST), replace=False)
    index.train(_float32(vectors[np.sort(sample)]))
    for start in range(0, count, 65_536):
        index.add(_float32(vectors[start : start + 65_536]))
    return Lists(index)


def _read_lists(read: Callable[[int], bytes]) -> Lists:
    for limit, value in _LIMITS.items():
        getattr(faiss, limit)(value)
    index = faiss.read_index(faiss.PyCallbackIOReader(read))
    if not hasattr(index, "nprobe"):
        raise RuntimeError("it holds an index of another kind")
    return Lists(index)


def loaded_faiss() -> str:
    """Say which FAISS is loaded, its version and whether it has a GPU."""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    named = " and ".join(installed_faiss()) or "faiss"
    return f"{named} {faiss.__version__} ({f'{gpus} GPU' if gpus else 'CPU'}, {os.path.dirname(faiss.__file__)})"


def installed_faiss() -> list[str]:
    """Give the packages that are installed and bring a module `faiss`; the last one wins over the others' files."""

    def there(package: str) -> bool:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            return False

    return [package for package in _PACKAGES if there(package)]


def _fits_on_gpu(size: int) -> bool:
    if not (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")):  # importing torch takes seconds
        return False
    import torch

    return torch.cuda.is_available() and size <= GPU_SHARE * torch.cuda.mem_get_info()[0]


def _float32(vectors: Halves) -> Vectors:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _found(answer: tuple[Any, Any]) -> tuple[RowIds, Scores]:
    """Give the rows and scores of one query; FAISS fills up with -1."""
    (scores,), (rows,) = answer
    there = rows >= 0
    return (rows, scores) if there.all() else (rows[there], scores[there])


def _only(kept: Mask, kind: Any = faiss.SearchParameters) -> Any:
    return kind(sel=faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little")))


def _in_lists(lists: int, sel: Any) -> Any:
    return faiss.SearchParametersIVF(nprobe=lists, sel=sel)


@lru_cache(maxsize=64)
def _lists_looked_into(lists: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=lists)
