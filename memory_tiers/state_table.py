"""The table of states in LanceDB, of all namespaces: the truth that `StateTier` looks at."""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from l2m_rag.errors import CorruptError, IncompatibleError, UsageError
from l2m_rag.memory_tiers import lance_store as lance
from l2m_rag.memory_tiers.disk import Ledger, check_room, digest, write_json
from l2m_rag.memory_tiers.lance_store import RowIds, Vectors

Array = np.ndarray[Any, np.dtype[Any]]

SCHEMA = 1
REMEDY = "Run: l2m collections repair. Delete that folder to have the states made again"
_OBJECTS = 1024  # bytes that Python needs for a record beside its arrays, and for each of its tokens
_TOKEN = 36
FRAGMENTS = 64
"""Files of a table of states from which on it is compacted; or when a tenth of its rows is deleted."""
_ROW = 512  # bytes of the small columns of a row on the disk, and of its share in manifests
_ARRAYS = ("steps", "positions", "lengths", "keys", "values", "scales")
_STORED = ("step", "position", "length", "key", "values", "scales")  # the columns that hold them


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

    @property
    def row_bytes(self) -> int:
        """Bytes that a record takes on the disk, at most: its arrays, its tokens, and what tells it from others."""
        values = self.vectors * self.dim * np.dtype(self.dtype).itemsize
        return values + 2 * self.key_dim + 4 * self.vectors * (1 + self.ratio) + _ROW


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


class StateTable:
    """The table `states` of a folder, with `states.json` beside it, where its format is pinned.

    Args:
        folder: of both; made when a format is given.
        form: what the rows share; None takes what is pinned.

    Raises:
        IncompatibleError: the folder was made with another format.
        CorruptError: the folder cannot be read, or holds states but no `states.json`.
    """

    def __init__(self, folder: Path, form: StateFormat | None = None) -> None:
        self.folder = folder
        self.path = folder / "states.lance"
        self._ledger = Ledger(folder)
        self._reads = Lock()  # held by who reads, and by who deletes files that a reader may be at
        self._database = lance.connect(folder)
        if form is not None and not (folder / "states.json").exists():
            self._create(form)
        self._pinned = _read_pin(folder)
        self.form = form_of(self._pinned["form"], folder)
        if form is not None and form != self.form:
            named = next(name for name, ours in asdict(form).items() if getattr(self.form, name) != ours)
            stored, ours = getattr(self.form, named), getattr(form, named)
            raise IncompatibleError(
                f"the states in {folder} were made with {named} {stored!r}; this run has {ours!r}. "
                f"Go back to {stored!r}, or delete that folder to have the states made again"
            )
        lance.heal(self.path, self._ledger)
        try:
            self._table: Any = self._database.open_table("states")
        except (ValueError, RuntimeError, OSError) as error:
            text = f"the states in {folder} cannot be opened ({lance.first_line(error)}). {REMEDY}"
            raise CorruptError(text) from error
        if self._table.schema != _schema(self.form):
            raise CorruptError(f"the columns of {self.path} are not those that states.json speaks of. {REMEDY}")

    def _create(self, form: StateFormat) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.path.glob("data/*.lance")):
            raise CorruptError(
                f"{self.folder} holds states but no states.json, so nothing is written over them; "
                f"restore that file or move the folder away"
            )
        shutil.rmtree(self.path, ignore_errors=True)  # a creation that was interrupted
        with lance.committing(self._ledger):
            self._database.create_table("states", schema=_schema(form)).set_unenforced_primary_key("id")
        _write_pin(self.folder, {"form": {"schema": SCHEMA, **asdict(form)}, "next": {}})

    @property
    def version(self) -> int:
        """Number of the last commit."""
        return int(self._table.version)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, with those of older versions."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def next_row(self, namespace: str) -> int:
        """Give the number from which on rows of a namespace were never given out."""
        return int(self._pinned["next"].get(namespace, 0))

    def keep_next_row(self, namespace: str, row: int) -> None:
        """Keep it, or the number of a deleted row would be given out again."""
        self._pinned = _read_pin(self.folder)
        self._pinned["next"][namespace] = row
        _write_pin(self.folder, self._pinned)

    def add(self, rows: pa.Table) -> None:
        """Insert rows; those whose id is there are passed over."""
        with self._committing():
            self._table.merge_insert("id").when_not_matched_insert_all().execute(rows)

    def delete(self, conditions: Sequence[str]) -> None:
        """Delete the rows that fit one of some conditions in SQL."""
        with self._committing():
            for condition in conditions:
                self._table.delete(condition)

    def scan(self, columns: list[str], condition: str) -> pa.Table:
        """Give columns, and Lance's row ids (`_rowid`), of the rows that fit a condition in SQL."""
        with self.reading():
            return self._table.search().select(columns).with_row_id(True).where(condition).limit(None).to_arrow()

    def take(self, row_ids: list[int], columns: list[str]) -> pa.Table:
        """Give columns of rows by Lance's row ids, in any order."""
        with self._reads:
            return self._table.take_row_ids(row_ids).select(columns).to_arrow()

    def to_arrow(self) -> pa.Table:
        """Give the table whole, for an export."""
        with self.reading():
            return self._table.to_arrow()

    def put_arrow(self, rows: pa.Table) -> None:
        """Insert the rows of an export.

        Raises:
            CorruptError: they are not rows of this table, or not what was written.
        """
        rows.validate(full=True)
        if not rows.schema.equals(_schema(self.form)) or len(rows["id"].unique()) < len(rows):
            raise CorruptError("its states are not those of a collection")
        for name, row, _, intact in rows_of(rows, self.form):
            if not intact:
                raise CorruptError(f"row {row} of the states of {name!r} has been altered")
            if row >= self.next_row(name):
                self._pinned["next"][name] = row + 1
        self.add(rows)
        _write_pin(self.folder, self._pinned)

    @property
    def pin(self) -> dict[str, Any]:
        """What `states.json` says, for an export."""
        return self._pinned

    def reading(self) -> Any:
        """Turn what Lance throws at unreadable files into an error that says what to do."""
        return lance.reading(self.path, REMEDY)

    # -- care --------------------------------------------------------------------------------------------------------
    def verify(self) -> list[str]:
        """Check every file and row; give what is wrong.

        Raises:
            CorruptError: the table cannot be read at all.
        """
        altered = [f"{path}: the file has been altered" for path in self._ledger.altered()]
        short = [f"{path.name}: a commit was cut short, and is lost" for path in lance.cut_short(self.folder)]
        return altered + short + [f"states: row {row} of {name!r} has been altered" for name, row in self._damaged()]

    def repair(self) -> list[str]:
        """Remove what `verify` finds wrong; say what was done."""
        done = []
        damaged = self._damaged()
        if damaged:
            self.delete([f"namespace IN ({quoted(name)}) AND row = {row}" for name, row in damaged])
            done.append(f"removed {len(damaged)} damaged states")
        if self._ledger.altered() or lance.cut_short(self.folder):
            rows = self.to_arrow()
            with self._committing():
                self._table = self._database.create_table("states", rows, mode="overwrite")
            self.compact(timedelta(milliseconds=1))
            for path in lance.cut_short(self.folder):
                path.unlink()
            done.append("wrote the states anew, as files of theirs had been altered or cut short")
        return done

    def compact(self, keep: timedelta = timedelta(hours=1)) -> None:
        """Merge small files, and drop versions older than `keep`; row ids stay as they are.

        Raises:
            DiskFullError: the disk has no room for it; nothing was changed.
        """
        check_room(self.folder, lance.live_bytes(self._table))
        with self._committing():
            self._table.optimize(cleanup_older_than=lance.FOR_EVER)
        with self._reads, self._committing():  # nothing goes before what stands for it has reached the disk
            self._table.optimize(cleanup_older_than=keep, delete_unverified=keep < timedelta(hours=1))

    def scattered(self) -> bool:
        """Say whether the files are so many, or so much of them is deleted, that a compaction is worth its while."""
        stats = self._table.stats()
        files = stats["fragment_stats"]
        written = files["num_fragments"] * files["lengths"]["mean"]  # with the rows that are deleted
        return bool(files["num_fragments"] > FRAGMENTS or 0.9 * written > stats["num_rows"])

    def _damaged(self) -> list[tuple[str, int]]:
        """Give namespace and number of the rows whose checksum does not fit."""
        found: list[tuple[str, int]] = []
        with self.reading():
            for batch in self._table.search().to_batches(256):
                rows = rows_of(pa.Table.from_batches([batch]), self.form)
                found += [(name, row) for name, row, _, intact in rows if not intact]
        return found

    def _committing(self) -> Any:
        return lance.committing(self._ledger, self._table)


def rows_of(rows: pa.Table, form: StateFormat) -> Iterator[tuple[str, int, StateRows, bool]]:
    """Give namespace, number and record of each row of whole columns, and whether they are what was written."""
    facts = [rows[name].to_pylist() for name in ("namespace", "row", "crc")]
    batch = from_arrow(rows, form)
    for at, (name, row, crc) in enumerate(zip(*facts, strict=True)):
        record = batch.take([at])
        yield name, row, record, crc_of(name, row, record) == crc


def from_arrow(rows: pa.Table, form: StateFormat) -> StateRows:
    """Make a batch of the columns `stream`, `tokens` and those of its arrays."""
    arrays = {
        name: flat(rows[column]).reshape(-1, *shape) if shape else rows[column].to_numpy()
        for (name, (_, shape)), column in zip(layout(form).items(), _STORED, strict=True)
    }
    tokens = tuple(map(tuple, rows["tokens"].to_pylist()))
    return StateRows(streams=tuple(rows["stream"].to_pylist()), tokens=tokens, **arrays)


def to_arrow(namespace: str, ids: list[str], records: dict[int, StateRows], form: StateFormat) -> pa.Table:
    """Make rows of the table from records by their numbers."""
    batch = join(list(records.values()), form)
    columns = {
        "id": ids,
        "row": list(records),
        "namespace": [namespace] * len(batch),
        "stream": batch.streams,
        "step": batch.steps,
        "position": batch.positions,
        "length": batch.lengths,
        "resolution": [form.ratio] * len(batch),
        "created": [time.time()] * len(batch),
        "key": _lists(batch.keys),
        "values": _lists(batch.values),
        "scales": _lists(batch.scales),
        "tokens": batch.tokens,
        "crc": [crc_of(namespace, row, record) for row, record in records.items()],
    }
    return pa.table(columns, schema=_schema(form))


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


def flat(column: pa.ChunkedArray) -> Array:
    """Give the numbers of a column of lists behind one another."""
    flat: Array = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat


def layout(form: StateFormat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give the dtype of each array of a batch, and its shape behind N."""
    shapes = [(), (), (), (form.key_dim,), (form.vectors, form.dim), (form.vectors,)]
    dtypes = ["int64", "int64", "int32", "float16", form.dtype, "float32"]
    return dict(zip(_ARRAYS, zip(dtypes, shapes, strict=True), strict=True))


def join(parts: list[StateRows], form: StateFormat) -> StateRows:
    """Put batches of one format behind one another; there may be none."""
    arrays: dict[str, Any] = {
        name: np.concatenate([np.empty((0, *shape), dtype), *(getattr(part, name) for part in parts)])
        for name, (dtype, shape) in layout(form).items()
    }
    streams, tokens = (tuple(chain(*(getattr(part, name) for part in parts))) for name in ("streams", "tokens"))
    return StateRows(streams=streams, tokens=tokens, **arrays)


def crc_of(namespace: str, row: int, record: StateRows) -> int:
    """Sum up a row: everything that is stored of it but the time."""
    crc = zlib.crc32(json.dumps([namespace, row, record.streams, record.tokens]).encode())
    for name in _ARRAYS:
        crc = zlib.crc32(getattr(record, name).tobytes(), crc)
    return crc


def quoted(name: str) -> str:
    """Give a name as SQL has it."""
    return next(lance.sql_lists([name]))


def form_of(pinned: dict[str, Any], folder: Path) -> StateFormat:
    """Give the format that is pinned.

    Raises:
        IncompatibleError: another version of the library made it.
        CorruptError: it is none.
    """
    facts = dict(pinned)
    stored = facts.pop("schema", None)
    if not isinstance(stored, int):
        raise CorruptError(f"{folder} does not say of which schema its states are. {REMEDY}")
    if stored != SCHEMA:
        raise IncompatibleError(
            f"the states in {folder} were made with schema {stored!r}; this run has {SCHEMA!r}. "
            f"Delete that folder to have the states made again"
        )
    try:
        return StateFormat(**facts)
    except (TypeError, UsageError) as error:
        raise CorruptError(f"{folder / 'states.json'} cannot be read ({error}). {REMEDY}") from error


def _read_pin(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        pinned = json.loads((folder / "states.json").read_text())
        told = pinned.pop("digest", None)  # the first ones had none
        if told not in (None, digest(pinned)):
            raise ValueError("it has been altered")
        if set(pinned) == {"form", "next"} and all(isinstance(part, dict) for part in pinned.values()):
            return dict(pinned)
        raise ValueError("its entries are not those of a table of states")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / 'states.json'} cannot be read ({error}). {REMEDY}") from error


def _write_pin(folder: Path, pinned: dict[str, dict[str, Any]]) -> None:
    write_json(folder / "states.json", {**pinned, "digest": digest(pinned)})
