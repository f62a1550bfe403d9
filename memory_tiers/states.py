"""The states of the long-term tier: what the working memory of a memory model evicted, found again by a learned key.

The Lance table `states` is the truth. Keys and what else a search needs are in RAM, one array per stream, so that a
search reads no file; values are fetched on demand, and those fetched last stay in a hot set bounded in bytes. Without
a folder nothing is stored: the NumPy reference of the same contract.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Self

import numpy as np

from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.memory_tiers.lance_store import RowIds, Scores, Vector, Vectors
from l2m_rag.memory_tiers.state_table import (
    REMEDY,
    Array,
    StateFormat,
    StateRows,
    StateTable,
    flat,
    join,
    layout,
    quoted,
    rows_of,
    to_arrow,
)
from l2m_rag.memory_tiers.usage import DISK_POLICIES, DiskPolicy, Usage

logger = logging.getLogger(__name__)

RowMatrix = np.ndarray[tuple[int, int], np.dtype[np.int64]]

GROUP = 1024  # rows in one commit
HOT_BYTES = 256 << 20
"""Of the states that are kept in RAM, at most, where nothing else is said."""
_PART = 1 << 24  # scores held at once
_IN_LIST = 500  # rows that a filter may list
_UNIT = 0.01  # by which the length of a key may differ from 1; float16 rounds by far less
_READ = ["namespace", "row", "stream", "step", "position", "length", "key", "values", "scales", "tokens", "crc"]


class _Stream:
    """Keys of one stream by ascending row, in arrays that double when they are full."""

    def __init__(self, key_dim: int) -> None:
        self.count = 0
        self.rows = np.empty(0, dtype=np.int64)  # of these and the others the first `count` are in use
        self.ends = np.empty(0, dtype=np.int64)
        self.keys = np.empty((0, key_dim), dtype=np.float32)  # widening float16 at a search takes 40 ms at 100k

    def append(self, rows: RowIds, ends: RowIds, keys: Array) -> None:
        """Add rows with the place behind their last token, (n,) int64 each, and their keys, (n, key_dim)."""
        old, self.count = self.count, self.count + len(rows)
        for name, added in (("rows", rows), ("ends", ends), ("keys", keys)):
            array = getattr(self, name)
            if self.count > len(array):
                wider = np.empty((max(self.count, 2 * old), *array.shape[1:]), dtype=array.dtype)
                wider[:old] = array[:old]
                setattr(self, name, wider)
            getattr(self, name)[old : self.count] = added

    def without(self, rows: RowIds) -> _Stream:
        """Give the stream without some of its rows."""
        kept = np.flatnonzero(np.isin(self.rows[: self.count], rows, invert=True))
        left = _Stream(self.keys.shape[1])
        left.append(self.rows[kept], self.ends[kept], self.keys[kept])
        return left

    def best(self, query: Vector, rough: Vector, before: int, k: int) -> tuple[RowIds, Scores]:
        """Give the k best rows that end by `before`; rows with equal keys have equal scores, in any batch.

        Args:
            query: (key_dim,).
            rough: (count,) the scores as a matrix product gives them.
            before: place in the stream.
            k: most rows.
        """
        visible = self.ends[: self.count] <= before
        if np.count_nonzero(visible) > k:  # the product errs by the order of its sums: the best are scored again
            rough = np.where(visible, rough, -np.inf)
            slack = 2 * len(query) * np.finfo(np.float32).eps * np.linalg.norm(query)
            visible = rough >= np.partition(rough, -k)[-k] - slack
        at = np.flatnonzero(visible)
        scores = np.einsum("ij,j->i", self.keys[at], query)
        order = np.lexsort((self.rows[at], -scores))[:k]
        return self.rows[at[order]], scores[order]


class _HotSet:
    """Records by row, those used last, within a number of bytes."""

    def __init__(self, budget: int) -> None:
        self.nbytes = 0
        self._budget = budget
        self._records: OrderedDict[int, StateRows] = OrderedDict()

    def get(self, row: int) -> StateRows | None:
        if row in self._records:
            self._records.move_to_end(row)
        return self._records.get(row)

    def put(self, row: int, record: StateRows) -> None:
        self.drop(row)
        if record.nbytes <= self._budget:
            while self.nbytes + record.nbytes > self._budget:
                self.drop(next(iter(self._records)))
            self._records[row] = record
            self.nbytes += record.nbytes

    def drop(self, row: int) -> None:
        if row in self._records:
            self.nbytes -= self._records.pop(row).nbytes


class StateTier:
    """The states of one namespace, for one thread of one process at a time.

    Rows are visible once they are added, and committed in groups of `GROUP`; **a crash loses those that were added
    since the last commit**, `flush` or `close`. Until then they are in RAM beside the hot set. Nothing here keeps a
    second process from writing: hold the lock of the collection.

    Args:
        form: what the rows share; pinned in `states.json` of the folder.
        folder: where the table lies or is made; None keeps everything in memory.
        namespace: whose states; those of others are never seen.
        hot_bytes: most bytes of the hot set.
        disk_bytes: most bytes that the rows of the namespace may take on the disk, where files are for a while larger:
            when there would be more, rows go, down to nine tenths. None for no limit.
        policy: which go, see `Usage.first_to_go`; adding counts as use.

    Raises:
        IncompatibleError: the folder was made with another format.
        CorruptError: the folder cannot be read, or holds states but no `states.json`.
    """

    def __init__(
        self,
        form: StateFormat,
        folder: Path | None = None,
        *,
        namespace: str = "default",
        hot_bytes: int = HOT_BYTES,
        disk_bytes: int | None = None,
        policy: DiskPolicy = "lru",
    ) -> None:
        _check_name("namespace", namespace)
        if policy not in DISK_POLICIES:
            raise UsageError(f"policy ({policy}) must be {' or '.join(DISK_POLICIES)}")
        if disk_bytes is not None and disk_bytes < form.row_bytes:
            raise UsageError(f"disk_bytes ({disk_bytes:,}) is less than one record takes ({form.row_bytes:,})")
        self.form = form
        self.folder = folder
        self.namespace = namespace
        self.policy = policy
        self.lookups = 0  # searches so far
        self.displaced = 0  # rows that went for want of room
        self._streams: dict[str, _Stream] = {}
        self._numbers: dict[str, int] = {}  # row of each id
        self._places: dict[int, tuple[str, str]] = {}  # id and stream of each row
        self._fresh: dict[int, StateRows] = {}  # records that are not committed; without a folder all
        self._lance: dict[int, int] = {}  # Lance's row id of each committed row
        self._hot = _HotSet(hot_bytes)
        self._next = 0
        self._usage = None if disk_bytes is None else Usage(folder, namespace)
        self.disk_bytes = disk_bytes
        self._compaction: Thread | None = None
        self._table = None if folder is None else StateTable(folder, form)
        if self._table is not None:
            self._load(self._table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, with those of other namespaces; without a folder, of the arrays."""
        if self._table is not None:
            return self._table.nbytes
        keys = sum(stream.rows.nbytes + stream.ends.nbytes + stream.keys.nbytes for stream in self._streams.values())
        return keys + sum(record.nbytes for record in self._fresh.values())

    @property
    def hot_nbytes(self) -> int:
        """Bytes of the hot set; 0 without a folder."""
        return self._hot.nbytes

    # -- writing -----------------------------------------------------------------------------------------------------
    def add(self, rows: StateRows, keep: Scores | None = None) -> RowIds:
        """Add records and give the numbers of their rows, (N,) int64, which ever grow.

        A record whose stream, position, length and key are there already keeps its row, and what is stored in it.

        Args:
            rows: N records.
            keep: the router's scores by which they are kept, (N,) float32, for the policy "learned".
        """
        _check_rows(rows, self.form)
        if keep is not None:
            _check_array("keep", keep, "float32", (len(rows),))
        numbers = np.empty(len(rows), dtype=np.int64)
        added: dict[str, list[int]] = {}  # of each stream, which of the batch are new
        for at, stream in enumerate(rows.streams):
            facts = json.dumps([self.namespace, stream, int(rows.positions[at]), int(rows.lengths[at])]).encode()
            identity = hashlib.sha256(facts + rows.keys[at].tobytes()).hexdigest()[:32]
            if identity not in self._numbers:
                self._fresh[self._next] = rows.take([at])
                self._numbers[identity] = self._next
                self._places[self._next] = identity, stream
                if self._usage:
                    self._usage.added(self._next, None if keep is None else float(keep[at]))
                self._next += 1
                added.setdefault(stream, []).append(at)
            numbers[at] = self._numbers[identity]
        for stream, which in added.items():
            ends = rows.positions[which] + rows.lengths[which]
            self._stream(stream).append(numbers[which], ends, rows.keys[which])
        full = len(self._fresh) >= GROUP or self._surplus() > 0
        if full and not self.compacting:  # until then they stay in RAM: nobody waits for a compaction while decoding
            self.flush()
        return numbers

    @property
    def compacting(self) -> bool:
        """Whether the files are being made smaller, in a thread of its own."""
        return self._compaction is not None and self._compaction.is_alive()

    def flush(self) -> None:
        """Commit what was added, and wait until it has reached the disk; then let go of what has no room."""
        self._settled()
        self._commit()
        crowded = self._surplus() > 0
        if self._usage:
            if crowded:
                gone = self._usage.first_to_go(self._places, self.policy)[: self._surplus(9)]
                self.displaced += self.evict(np.array(gone, dtype=np.int64))
            self._usage.save()
        if self._table is not None and (crowded or self._table.scattered()):
            # a budget does not wait for those who began to read an hour ago
            keep = timedelta(hours=1) if self.disk_bytes is None else timedelta(milliseconds=1)
            self._compaction = Thread(target=_compact, args=(self._table, keep), name="l2m-compaction")
            self._compaction.start()

    def _surplus(self, tenths: int = 10) -> int:
        """Give by how many rows there are more than fit into some tenths of the budget."""
        return 0 if self.disk_bytes is None else len(self) - self.disk_bytes // self.form.row_bytes * tenths // 10

    def _settled(self) -> None:
        """Wait for the compaction."""
        if self._compaction is not None:
            self._compaction.join()
            self._compaction = None

    def _commit(self) -> None:
        if self._table is None or not self._fresh:
            return
        ids = [self._places[row][0] for row in self._fresh]
        self._table.add(to_arrow(self.namespace, ids, self._fresh, self.form))
        found = self._table.scan(["row"], f"{self._mine} AND row >= {min(self._fresh)}")
        self._lance.update(zip(found["row"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
        for row, record in self._fresh.items():
            self._hot.put(row, record)
        self._fresh.clear()

    def close(self) -> None:
        """Commit what was added, and wait until the files are in order."""
        self.flush()
        self._settled()

    def forget(self, stream: str) -> int:
        """Delete the records of a stream; give how many there were."""
        if stream not in self._streams:
            return 0
        held = self._streams[stream]
        return self._delete({stream: held.rows[: held.count].tolist()}, [f"stream IN ({quoted(stream)})"])

    def evict(self, rows: RowIds) -> int:
        """Delete rows, (N,) int64; give how many there were. Rows that are not there are passed over."""
        _check_array("rows", rows, "int64", (None,))
        numbers = sorted(set(rows.tolist()) & self._places.keys())
        lists = [numbers[start : start + _IN_LIST] for start in range(0, len(numbers), _IN_LIST)]
        gone: dict[str, list[int]] = {}
        for row in numbers:
            gone.setdefault(self._places[row][1], []).append(row)
        return self._delete(gone, [f"row IN ({', '.join(map(str, part))})" for part in lists])

    def _delete(self, gone: dict[str, list[int]], conditions: list[str]) -> int:
        """Delete rows of streams, on the disk first; after an error it can be tried again."""
        self._settled()
        if self._table is not None and gone:
            self._table.keep_next_row(self.namespace, self._next)
            self._table.delete([f"{self._mine} AND {condition}" for condition in conditions])
        for stream, rows in gone.items():
            self._streams[stream] = self._streams[stream].without(np.array(rows))
            if not self._streams[stream].count:
                del self._streams[stream]
            for row in rows:
                del self._numbers[self._places.pop(row)[0]]
                self._fresh.pop(row, None)
                self._lance.pop(row, None)
                self._hot.drop(row)
            if self._usage:
                self._usage.drop(rows)
        return sum(map(len, gone.values()))

    # -- reading -----------------------------------------------------------------------------------------------------
    def search(self, queries: Vectors, streams: Sequence[str], before: RowIds, k: int) -> tuple[RowMatrix, Vectors]:
        """Give the k records of a stream whose keys have the largest inner products with a query, best first.

        Args:
            queries: (B, key_dim) float32.
            streams: B names; a query sees no other stream.
            before: (B,) int64; a query sees only records whose last token lies before this place of the stream.
            k: most records a query; >= 1.

        Returns:
            Rows (B, k) int64 and scores (B, k) float32, equal scores by row; -1 and -inf where there are fewer.
        """
        _check_array("queries", queries, "float32", (len(streams), self.form.key_dim))
        _check_array("before", before, "int64", (len(streams),))
        if k < 1:
            raise UsageError(f"k ({k}) must be at least 1")
        if not np.isfinite(queries).all():
            raise UsageError("the queries to search for have entries that are not numbers")
        self.lookups += 1
        rows = np.full((len(streams), k), -1, dtype=np.int64)
        scores = np.full((len(streams), k), -np.inf, dtype=np.float32)
        asked: dict[str, list[int]] = {}
        for at, name in enumerate(streams):
            if name in self._streams:
                asked.setdefault(name, []).append(at)
        for name, which in asked.items():
            stream = self._streams[name]
            size = max(1, _PART // stream.count)
            for part in (which[start : start + size] for start in range(0, len(which), size)):
                for at, rough in zip(part, queries[part] @ stream.keys[: stream.count].T, strict=True):
                    found, score = stream.best(queries[at], rough, int(before[at]), k)
                    rows[at, : len(found)], scores[at, : len(found)] = found, score
        return rows, scores

    def fetch(self, rows: RowIds) -> StateRows:
        """Give the records of rows, (N,) int64, in the order asked for.

        Raises:
            UsageError: a row is not there.
            CorruptError: what is stored of a row is not what was written.
        """
        _check_array("rows", rows, "int64", (None,))
        found: dict[int, StateRows] = {}
        stored: list[int] = []
        for row in dict.fromkeys(rows.tolist()):
            record = self._fresh.get(row, self._hot.get(row))
            if record is not None:
                found[row] = record
            elif row in self._lance:
                stored.append(row)
            else:
                raise UsageError(
                    f"row {row} is not among the states of {self.namespace!r}; fetch rows that search gives"
                )
        if stored and self._table is not None:
            read = self._read(self._table, stored)
            for row, record in read.items():
                self._hot.put(row, record)
            found |= read
        if self._usage:
            self._usage.read(found)
        return join([found[row] for row in rows.tolist()], self.form)

    def _read(self, table: StateTable, rows: list[int]) -> dict[int, StateRows]:
        """Read rows of the table, and check each against its checksum."""
        found: dict[int, StateRows] = {}
        with table.reading():
            read = table.take([self._lance[row] for row in rows], _READ)
            for _, row, record, intact in rows_of(read, self.form):
                if not intact:
                    raise CorruptError(f"row {row} of {table.path} is damaged: its checksum differs. {REMEDY}")
                found[row] = record
        for row in rows:
            if row not in found:
                raise CorruptError(f"row {row} is gone from {table.path}, or its number is damaged. {REMEDY}")
        return found

    @property
    def _mine(self) -> str:
        return f"namespace IN ({quoted(self.namespace)})"

    def _load(self, table: StateTable) -> None:
        """Bring into RAM what a search needs of the rows of the namespace, ascending."""
        found = table.scan(["row", "id", "stream", "position", "length", "key"], self._mine)
        found = found.take(np.argsort(found["row"].to_numpy(), kind="stable"))
        rows, ids, streams = found["row"].to_numpy(), found["id"].to_pylist(), found["stream"].to_pylist()
        self._places = dict(zip(rows.tolist(), zip(ids, streams, strict=True), strict=True))
        self._numbers = {identity: row for row, (identity, _) in self._places.items()}
        self._lance = dict(zip(rows.tolist(), found["_rowid"].to_pylist(), strict=True))
        ends = found["position"].to_numpy() + found["length"].to_numpy()
        keys = flat(found["key"]).reshape(len(rows), self.form.key_dim)
        held: dict[str, list[int]] = {}
        for at, stream in enumerate(streams):
            held.setdefault(stream, []).append(at)
        for stream, which in held.items():
            self._stream(stream).append(rows[which], ends[which], keys[which])
        self._next = max([*self._places, table.next_row(self.namespace) - 1], default=-1) + 1

    def _stream(self, name: str) -> _Stream:
        return self._streams.setdefault(name, _Stream(self.form.key_dim))


def _compact(table: StateTable, keep: timedelta) -> None:
    """Make the files of a table smaller; one that cannot be made so is left as it is, with a warning."""
    try:
        table.compact(keep)
    except Exception as error:  # whatever it is, nothing is lost, and no one waits for it
        logger.warning("the states in %s were not compacted: %s", table.folder, error)


def _check_name(kind: str, name: str) -> None:
    try:
        name.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise UsageError(f"{kind} ({name!r}) must be text that UTF-8 can encode") from error


def _check_array(name: str, array: Array, dtype: str, shape: tuple[int | None, ...]) -> None:
    """Refuse another dtype or shape; None fits any size."""
    found = array.shape if isinstance(array, np.ndarray) else ()
    fits = len(found) == len(shape) and array.dtype == dtype
    if not fits or any(want not in (None, size) for want, size in zip(shape, found, strict=True)):
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        given = f"{array.dtype} {found}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UsageError(f"{name} must be {dtype} ({wanted}); it is {given}")


def _check_rows(rows: StateRows, form: StateFormat) -> None:
    """Refuse what cannot be stored, before anything is."""
    count = len(rows)
    for name, (dtype, shape) in layout(form).items():
        _check_array(name, getattr(rows, name), dtype, (count, *shape))
    if rows.tokens and len(rows.tokens) != count:
        raise UsageError(f"tokens must have {count} entries, one a record; it has {len(rows.tokens)}")
    norms = np.linalg.norm(rows.keys.astype(np.float32), axis=1)
    ends = rows.positions + rows.lengths
    for at, stream in enumerate(rows.streams):
        _check_name("stream", stream)
        tokens, length = rows.tokens[at] if rows.tokens else (), rows.lengths[at]
        where = f"of record {at} (stream {stream!r}, position {rows.positions[at]})"
        if rows.positions[at] < 0 or length < 1 or ends[at] < rows.positions[at]:
            raise UsageError(f"the length ({length}) {where} must be at least 1, and the position at least 0")
        for name in ("keys", "values", "scales"):
            if not np.isfinite(getattr(rows, name)[at]).all():
                raise UsageError(f"the {name} {where} have entries that are not numbers; nothing was added")
        if abs(norms[at] - 1) > _UNIT:
            raise UsageError(f"the key {where} has length {norms[at]:.4g}; keys must have length 1")
        if len(tokens) not in (0, length):
            raise UsageError(f"{len(tokens)} tokens {where} do not fit its length ({length})")
        if any(not 0 <= token < 1 << 31 for token in tokens):
            raise UsageError(f"the tokens {where} must be ids from 0 to 2**31 - 1")
