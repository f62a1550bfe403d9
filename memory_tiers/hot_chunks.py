"""The chunks of the hot cache: one Arrow file, mapped into memory, so that a hit costs no look-up on the disk's format.

Part of the disposable cache that `hot_index` keeps and checks: a row that is not here, or was written again since, is
fetched from Lance.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from io import BufferedReader
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, chunk_of
from l2m_rag.memory_tiers.records import Chunk


class HotChunks:
    """Chunks by row id.

    Args:
        stream: an Arrow file that `write_chunks` made; the mapping outlives it.
    """

    def __init__(self, stream: BufferedReader) -> None:
        mapped = np.memmap(stream, dtype=np.uint8, mode="r")
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))) as reader:
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        ids = [batch.column("_rowid").to_numpy().astype(np.int64) for batch in self._batches]
        rows = np.concatenate(ids) if ids else np.empty(0, np.int64)
        self._order = np.argsort(rows, kind="stable")
        self._rows: RowIds = rows[self._order]
        self._stale: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self, rows: Iterable[int]) -> None:
        """Pass over rows that were written again since the file was made."""
        self._stale.update(rows)

    def fetch(self, rows: Iterable[int]) -> dict[int, Chunk]:
        """Give the chunks of those rows that are here."""
        found = {}
        for row in rows:
            at = int(np.searchsorted(self._rows, row))
            if at == len(self._rows) or self._rows[at] != row or row in self._stale:
                continue
            place = int(self._order[at])
            number = bisect_right(self._starts, place) - 1
            (values,) = self._batches[number].slice(place - self._starts[number], 1).to_pylist()
            values.pop("_rowid")
            found[row] = chunk_of(values)
        return found


def write_chunks(path: Path, store: LanceStore) -> None:
    """Write all chunks of a store's present version into one Arrow file."""
    batches = store.all_chunks()
    first = next(batches, None)
    if first is None:
        first = pa.RecordBatch.from_pylist([], schema=pa.schema([("_rowid", pa.uint64())]))
    with pa.ipc.new_file(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
