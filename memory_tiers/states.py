"""The states of the long-term tier: what the working memory of a memory model evicted, found again by a learned key.

The Lance table `states` is the truth. Keys and what else a search needs are in RAM, one array per stream, so that a
search reads no file; values are fetched on demand, and those fetched last stay in a hot set bounded in bytes. Without
a folder nothing is stored: the NumPy reference of the same contract.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from l2m_rag.errors import CorruptError, IncompatibleError, UsageError
from l2m_rag.memory_tiers import lance_store as lance
from l2m_rag.memory_tiers.disk import Ledger, write_json
from l2m_rag.memory_tiers.lance_store import RowIds, Scores, Vector, Vectors

Array = np.ndarray[Any, np.dtype[Any]]
RowMatrix = np.ndarray[tuple[int, int], np.dtype[np.int64]]

SCHEMA = 1
GROUP = 1024  # rows in one commit
_PART = 1 << 24  # scores held at once
_IN_LIST = 500  # rows that a filter may list
_UNIT = 0.01  # by which the length of a key may differ from 1; float16 rounds by far less
_OBJECTS = 1024  # bytes that Python needs for a record beside its arrays, and for each of its tokens
_TOKEN = 36
_ARRAYS = ("steps", "positions", "lengths", "keys", "values", "scales")
_READ = ["row", "stream", "step", "position", "length", "key", "values", "scales", "tokens", "crc"]
_REMEDY = "Delete that folder to have the states made again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFormat:
    """What all rows of one table share.

    Args:
        key_dim: width of a key.
        dim: width of a state vector.
        vectors: most vectors that a record has.
        ratio: tokens that a vector stands for.
        dtype: of the values.
        backbone: fingerprint of the model that made the states.
        depth: layers below the states.
        key_version: fingerprint of what makes the keys.
    """

    key_dim: int
    dim: int
    vectors: int
    ratio: int
    dtype: Literal["int8", "float16"]
    backbone: str
    depth: int
    key_version: str

    def __post_init__(self) -> None:
        for name in ("key_dim", "dim", "vectors", "ratio"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.dtype not in ("int8", "float16"):
            raise UsageError(f"dtype ({self.dtype}) must be int8 or float16")


@dataclass(frozen=True, slots=True, eq=False)
class StateRows:
    """A batch of N records.

    Args:
        streams: N names, each of a document or a conversation.
        steps: (N,) int64, the step of the model that evicted the record.
        positions: (N,) int64, place of the first token in its stream.
        lengths: (N,) int32, tokens; >= 1.
        keys: (N, key_dim) float16, unit length.
        values: (N, vectors, dim) int8 or float16; those of a shorter record are filled up with zeros.
        scales: (N, vectors) float32, what int8 values are multiplied by; ones for float16.
        tokens: N times the ids of the record's tokens or (), or () where none are kept.
    """

    streams: tuple[str, ...]
    steps: RowIds
    positions: RowIds
    lengths: np.ndarray[tuple[int], np.dtype[np.int32]]
    keys: np.ndarray[tuple[int, int], np.dtype[np.float16]]
    values: Array
    scales: Vectors
    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def nbytes(self) -> int:
        """Bytes in RAM, at most."""
        arrays: list[Array] = [getattr(self, name) for name in _ARRAYS]
        return _OBJECTS + _TOKEN * sum(map(len, self.tokens)) + sum(array.nbytes for array in arrays)

    def take(self, which: list[int]) -> StateRows:
        """Give a copy of some records."""
        arrays: dict[str, Any] = {name: getattr(self, name)[which] for name in _ARRAYS}
        tokens = tuple(self.tokens[at] for at in which) if self.tokens else ((),) * len(which)
        return StateRows(streams=tuple(self.streams[at] for at in which), tokens=tokens, **arrays)


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

    Raises:
        IncompatibleError: the folder was made with another format.
        CorruptError: the folder cannot be read, or holds states but no `states.json`.
    """

    def __init__(
        self, form: StateFormat, folder: Path | None = None, *, namespace: str = "default", hot_bytes: int = 256 << 20
    ) -> None:
        _check_name("namespace", namespace)
        self.form = form
        self.folder = folder
        self.namespace = namespace
        self.lookups = 0  # searches so far
        self._streams: dict[str, _Stream] = {}
        self._numbers: dict[str, int] = {}  # row of each id
        self._places: dict[int, tuple[str, str]] = {}  # id and stream of each row
        self._fresh: dict[int, StateRows] = {}  # records that are not committed; without a folder all
        self._lance: dict[int, int] = {}  # Lance's row id of each committed row
        self._hot = _HotSet(hot_bytes)
        self._next = 0
        self._table: Any = None
        self._ledger = Ledger(folder or Path())
        if folder is not None:
            self._open(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, with those of other namespaces; without a folder, of the arrays."""
        if self.folder is not None:
            return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        keys = sum(stream.rows.nbytes + stream.ends.nbytes + stream.keys.nbytes for stream in self._streams.values())
        return keys + sum(record.nbytes for record in self._fresh.values())

    @property
    def hot_nbytes(self) -> int:
        """Bytes of the hot set; 0 without a folder."""
        return self._hot.nbytes

    # -- writing -----------------------------------------------------------------------------------------------------
    def add(self, rows: StateRows) -> RowIds:
        """Add records and give the numbers of their rows, (N,) int64, which ever grow.

        A record whose stream, position, length and key are there already keeps its row, and what is stored in it.
        """
        _check_rows(rows, self.form)
        numbers = np.empty(len(rows), dtype=np.int64)
        added: dict[str, list[int]] = {}  # of each stream, which of the batch are new
        for at, stream in enumerate(rows.streams):
            facts = json.dumps([self.namespace, stream, int(rows.positions[at]), int(rows.lengths[at])]).encode()
            identity = hashlib.sha256(facts + rows.keys[at].tobytes()).hexdigest()[:32]
            if identity not in self._numbers:
                self._fresh[self._next] = rows.take([at])
                self._numbers[identity] = self._next
                self._places[self._next] = identity, stream
                self._next += 1
                added.setdefault(stream, []).append(at)
            numbers[at] = self._numbers[identity]
        for stream, which in added.items():
            ends = rows.positions[which] + rows.lengths[which]
            self._stream(stream).append(numbers[which], ends, rows.keys[which])
        if len(self._fresh) >= GROUP:
            self.flush()
        return numbers

    def flush(self) -> None:
        """Commit what was added, and wait until it has reached the disk."""
        if self.folder is None or not self._fresh:
            return
        with lance.committing(self._ledger, self._table):
            self._table.merge_insert("id").when_not_matched_insert_all().execute(self._to_arrow(self._fresh))
        found = self._scan(["row"], f"row >= {min(self._fresh)}")
        self._lance.update(zip(found["row"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
        for row, record in self._fresh.items():
            self._hot.put(row, record)
        self._fresh.clear()

    def close(self) -> None:
        """Commit what was added."""
        self.flush()

    def forget(self, stream: str) -> int:
        """Delete the records of a stream; give how many there were."""
        if stream not in self._streams:
            return 0
        held = self._streams[stream]
        return self._delete({stream: held.rows[: held.count].tolist()}, [f"stream IN ({_quoted(stream)})"])

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
        if self.folder is not None and gone:
            pinned = _read_pin(self.folder)
            pinned["next"][self.namespace] = self._next  # or the number of a deleted row would be given out again
            _write_pin(self.folder, pinned)
            with lance.committing(self._ledger, self._table):
                for condition in conditions:
                    self._table.delete(f"namespace IN ({_quoted(self.namespace)}) AND {condition}")
        for stream, rows in gone.items():
            self._streams[stream] = self._streams[stream].without(np.array(rows))
            if not self._streams[stream].count:
                del self._streams[stream]
            for row in rows:
                del self._numbers[self._places.pop(row)[0]]
                self._fresh.pop(row, None)
                self._lance.pop(row, None)
                self._hot.drop(row)
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
        if stored:
            read = self._read(stored)
            for row, record in read.items():
                self._hot.put(row, record)
            found |= read
        return _join([found[row] for row in rows.tolist()], self.form)

    def _read(self, rows: list[int]) -> dict[int, StateRows]:
        """Read rows of the table, and check each against its checksum."""
        form = self.form
        found: dict[int, StateRows] = {}
        with lance.reading(self._files, _REMEDY):
            table = self._table.take_row_ids([self._lance[row] for row in rows]).select(_READ).to_arrow()
            batch = StateRows(
                streams=tuple(table["stream"].to_pylist()),
                steps=table["step"].to_numpy(),
                positions=table["position"].to_numpy(),
                lengths=table["length"].to_numpy(),
                keys=_flat(table["key"]).reshape(-1, form.key_dim),
                values=_flat(table["values"]).reshape(-1, form.vectors, form.dim),
                scales=_flat(table["scales"]).reshape(-1, form.vectors),
                tokens=tuple(map(tuple, table["tokens"].to_pylist())),
            )
            for at, (row, crc) in enumerate(zip(table["row"].to_pylist(), table["crc"].to_pylist(), strict=True)):
                found[row] = batch.take([at])
                if crc != _crc(self.namespace, row, found[row]):
                    raise CorruptError(f"row {row} of {self._files} is damaged: its checksum differs. {_REMEDY}")
        for row in rows:
            if row not in found:
                raise CorruptError(f"row {row} is gone from {self._files}, or its number is damaged. {_REMEDY}")
        return found

    # -- the table ---------------------------------------------------------------------------------------------------
    @property
    def _files(self) -> Path:
        return (self.folder or Path()) / "states.lance"

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        database = lance.connect(folder)
        if not (folder / "states.json").exists():
            if any(self._files.glob("data/*.lance")):
                raise CorruptError(
                    f"{folder} holds states but no states.json, so nothing is written over them; "
                    f"restore that file or move the folder away"
                )
            shutil.rmtree(self._files, ignore_errors=True)  # a creation that was interrupted
            with lance.committing(self._ledger):
                database.create_table("states", schema=_schema(self.form)).set_unenforced_primary_key("id")
            _write_pin(folder, {"form": {"schema": SCHEMA, **asdict(self.form)}, "next": {}})
        pinned = _read_pin(folder)
        for name, ours in {"schema": SCHEMA, **asdict(self.form)}.items():
            if (stored := pinned["form"].get(name)) != ours:
                raise IncompatibleError(
                    f"the states in {folder} were made with {name} {stored!r}; this run has {ours!r}. "
                    f"Go back to {stored!r}, or delete that folder to have the states made again"
                )
        lance.heal(self._files, self._ledger)
        try:
            self._table = database.open_table("states")
        except (ValueError, RuntimeError, OSError) as error:
            text = f"the states in {folder} cannot be opened ({lance.first_line(error)}). {_REMEDY}"
            raise CorruptError(text) from error
        if self._table.schema != _schema(self.form):
            raise CorruptError(f"the columns of {self._files} are not those that states.json speaks of. {_REMEDY}")
        found = self._scan(["row", "id", "stream", "position", "length", "key"])
        self._load(found.take(np.argsort(found["row"].to_numpy(), kind="stable")))
        self._next = max([*self._places, pinned["next"].get(self.namespace, 0) - 1], default=-1) + 1

    def _load(self, table: pa.Table) -> None:
        """Bring into RAM what a search needs of rows, ascending."""
        rows, ids, streams = table["row"].to_numpy(), table["id"].to_pylist(), table["stream"].to_pylist()
        self._places = dict(zip(rows.tolist(), zip(ids, streams, strict=True), strict=True))
        self._numbers = {identity: row for row, (identity, _) in self._places.items()}
        self._lance = dict(zip(rows.tolist(), table["_rowid"].to_pylist(), strict=True))
        ends = table["position"].to_numpy() + table["length"].to_numpy()
        keys = _flat(table["key"]).reshape(len(rows), self.form.key_dim)
        held: dict[str, list[int]] = {}
        for at, stream in enumerate(streams):
            held.setdefault(stream, []).append(at)
        for stream, which in held.items():
            self._stream(stream).append(rows[which], ends[which], keys[which])

    def _stream(self, name: str) -> _Stream:
        return self._streams.setdefault(name, _Stream(self.form.key_dim))

    def _scan(self, columns: list[str], condition: str = "true") -> pa.Table:
        where = f"namespace IN ({_quoted(self.namespace)}) AND {condition}"
        with lance.reading(self._files, _REMEDY):
            return self._table.search().select(columns).with_row_id(True).where(where).limit(None).to_arrow()

    def _to_arrow(self, records: dict[int, StateRows]) -> pa.Table:
        batch = _join(list(records.values()), self.form)
        columns = {
            "id": [self._places[row][0] for row in records],
            "row": list(records),
            "namespace": [self.namespace] * len(batch),
            "stream": batch.streams,
            "step": batch.steps,
            "position": batch.positions,
            "length": batch.lengths,
            "resolution": [self.form.ratio] * len(batch),
            "created": [time.time()] * len(batch),
            "key": _lists(batch.keys),
            "values": _lists(batch.values),
            "scales": _lists(batch.scales),
            "tokens": batch.tokens,
            "crc": [_crc(self.namespace, row, record) for row, record in records.items()],
        }
        return pa.table(columns, schema=_schema(self.form))


def _schema(form: StateFormat) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            ("row", pa.int64()),
            ("namespace", pa.string()),
            ("stream", pa.string()),
            ("step", pa.int64()),
            ("position", pa.int64()),
            ("length", pa.int32()),
            ("resolution", pa.int32()),
            ("created", pa.float64()),
            ("key", pa.list_(pa.float16(), form.key_dim)),
            ("values", pa.list_(pa.from_numpy_dtype(form.dtype), form.vectors * form.dim)),
            ("scales", pa.list_(pa.float32(), form.vectors)),
            ("tokens", pa.list_(pa.int32())),
            ("crc", pa.uint32()),
        ]
    )


def _lists(array: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)


def _flat(column: pa.ChunkedArray) -> Array:
    flat: Array = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat


def _layout(form: StateFormat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give the dtype of each array of a batch, and its shape behind N."""
    shapes = [(), (), (), (form.key_dim,), (form.vectors, form.dim), (form.vectors,)]
    dtypes = ["int64", "int64", "int32", "float16", form.dtype, "float32"]
    return dict(zip(_ARRAYS, zip(dtypes, shapes, strict=True), strict=True))


def _join(parts: list[StateRows], form: StateFormat) -> StateRows:
    """Put batches of one format behind one another; there may be none."""
    arrays: dict[str, Any] = {
        name: np.concatenate([np.empty((0, *shape), dtype), *(getattr(part, name) for part in parts)])
        for name, (dtype, shape) in _layout(form).items()
    }
    streams, tokens = (tuple(chain(*(getattr(part, name) for part in parts))) for name in ("streams", "tokens"))
    return StateRows(streams=streams, tokens=tokens, **arrays)


def _crc(namespace: str, row: int, record: StateRows) -> int:
    """Sum up a row: everything that is stored of it but the time."""
    crc = zlib.crc32(json.dumps([namespace, row, record.streams, record.tokens]).encode())
    for name in _ARRAYS:
        crc = zlib.crc32(getattr(record, name).tobytes(), crc)
    return crc


def _quoted(name: str) -> str:
    return next(lance.sql_lists([name]))


def _read_pin(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        pinned = json.loads((folder / "states.json").read_text())
        if isinstance(pinned["form"], dict) and isinstance(pinned["next"], dict):
            return {"form": pinned["form"], "next": pinned["next"]}
        raise ValueError("its entries are not those of a table of states")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / 'states.json'} cannot be read ({error}). {_REMEDY}") from error


def _write_pin(folder: Path, pinned: dict[str, dict[str, Any]]) -> None:
    write_json(folder / "states.json", pinned)


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
    for name, (dtype, shape) in _layout(form).items():
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
