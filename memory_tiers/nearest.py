"""What finds the vectors nearest to one: over all rows, on the threads of a CPU or on a GPU, or by inverted lists.

Each gives candidates, among which the k best are; the hot index scores those again. Only this file imports faiss.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
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
_PER_LIST = 1_000  # rows that a thread scans at a time
_MOST_LISTS = 64
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
    """All rows in FAISS with fp16 codes, shared out among its threads.

    FAISS scans a flat index for one query with one thread, and the inverted lists of one query with many. So the rows
    lie in lists of equal length, in the order in which they come, and every list is looked into.

    Args:
        vectors: (N, E) float16.
    """

    exact = True

    def __init__(self, vectors: Halves) -> None:
        count, dimension = vectors.shape
        lists = max(1, min(count // _PER_LIST, _MOST_LISTS))
        coarse = faiss.IndexFlatIP(dimension)
        coarse.add(np.zeros((lists, dimension), np.float32))
        self.index = faiss.IndexIVFScalarQuantizer(coarse, dimension, lists, HALF, faiss.METRIC_INNER_PRODUCT)
        self.index.is_trained, self.index.by_residual = True, False
        self.index.parallel_mode = 1
        for number in range(lists):
            rows = np.arange(count * number // lists, count * (number + 1) // lists)
            if len(rows):
                codes = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1]).view(np.uint8)  # fp16 is its own code
                where = faiss.swig_ptr(rows), faiss.swig_ptr(codes)
                self.index.invlists.add_entries(number, len(rows), *where)
        self.index.ntotal = count

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give the k best, and so many more that none is equal to the last of those left out; see `Nearest`."""
        count = len(self) if kept is None else int(kept.sum())
        wanted = k + 1
        while wanted < count:
            rows, scores = _ask(self.index, query, wanted, self.index.nlist, kept)
            if scores[k - 1] - scores[-1] >= TIE:
                return rows
            wanted *= 8
        return np.arange(len(self)) if kept is None else np.flatnonzero(kept)


class Lists:
    """Rows in FAISS by inverted lists, with 8-bit codes (IVF,SQ8).

    Args:
        index: an IVF index, filled.
    """

    exact = False

    def __init__(self, index: Any) -> None:
        self.index = index
        self.index.parallel_mode = 1

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def candidates(self, query: Vector, k: int, kept: Mask | None) -> RowIds:
        """Give the best rows of the lists that are nearest; see `Nearest`."""
        count = len(self) if kept is None else int(kept.sum())
        # 8 bits err little, so twice as many hold the k best; those that a filter leaves may lie far off
        wanted = min((2 if kept is None else 4) * k, count)
        # as many lists as hold the candidates twice over; a filter that leaves few rows spreads them over more lists
        lists = max(PROBES, 2 * wanted * self.index.nlist // len(self)) * len(self) // max(count, 1)
        rows, _ = _ask(self.index, query, wanted, min(lists, self.index.nlist), kept)
        if len(rows) < wanted:  # those that are left lie far from the query
            rows, _ = _ask(self.index, query, wanted, self.index.nlist, kept)
        return rows

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


def _ask(index: Any, query: Vector, wanted: int, lists: int, kept: Mask | None) -> tuple[RowIds, Scores]:
    """Give the best rows of the nearest lists, and their scores, best first."""
    if not wanted:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    if kept is None:
        how = _lists_looked_into(lists)
    else:
        only = faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little"))
        how = faiss.SearchParametersIVF(nprobe=lists, sel=only)
    (scores,), (rows,) = index.search(query[None], wanted, params=how)
    there = rows >= 0  # FAISS fills up with -1
    return (rows, scores) if there.all() else (rows[there], scores[there])


@lru_cache(maxsize=256)
def _lists_looked_into(lists: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=lists)
