"""The tables of one collection in LanceDB: the only truth of the long-term tier.

Nothing outside this file imports lancedb. Lance writes whole new files and then one manifest, so a killed process
leaves the last commit; upserts go through `merge_insert` on a declared primary key, without which two racing writers
leave duplicate rows. Lance never calls fsync: here a commit is not over before its files are on the disk, and a newest
manifest that a power cut left without its content is set aside when the tables are opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

os.environ.setdefault("LANCEDB_LOG", "error")  # Lance warns on stderr of its own deprecations otherwise

import lancedb
import pyarrow as pa
from lancedb.index import FTS
from lancedb.query import MatchQuery

from l2m_rag.errors import CorruptError, DiskFullError, L2MError, UsageError
from l2m_rag.memory_tiers.disk import CutShortError, Ledger, Unlisted
from l2m_rag.memory_tiers.places import Where, place_of
from l2m_rag.memory_tiers.records import HOUR, Chunk, DocumentRow, Scalar

logger = logging.getLogger(__name__)

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Vector = np.ndarray[Any, np.dtype[np.float32]]
RowIds = np.ndarray[tuple[int], np.dtype[np.int64]]
Scores = np.ndarray[tuple[int], np.dtype[np.float32]]

T = TypeVar("T")

_DOCUMENTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        ("uri", pa.string()),
        ("root", pa.string()),
        ("title", pa.string()),
        ("mime", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("pages", pa.int32()),
        ("chunks", pa.int32()),
        ("settings", pa.string()),
        ("ingested_at", pa.float64()),
        ("error", pa.string()),
        ("crc", pa.uint32()),
    ]
)
_TABLES = ("documents", "chunks")
_CHUNK_COLUMNS = ["id", "document", "ordinal", "page", "heading", "start", "end", "text", "metadata"]
_WHOLE = [*_CHUNK_COLUMNS, "embedding", "crc"]  # what the checksum of a row is of, and the checksum
FOR_EVER = timedelta(days=36_500)
_IN_LIST = 500  # names a filter may list: DataFusion plans long lists slowly


_columns = attrgetter(*(name for name in _CHUNK_COLUMNS if name != "metadata"))


def _chunks_schema(dimension: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            ("document", pa.string()),
            ("ordinal", pa.int32()),
            ("page", pa.int32()),
            ("heading", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("text", pa.string()),
            ("metadata", pa.json_()),
            ("embedding", pa.list_(pa.float32(), dimension)),
            ("crc", pa.uint32()),
        ]
    )


class LanceStore:
    """Documents and chunks of one collection.

    Args:
        folder: where the tables lie.
        dimension: of the embeddings.
        create: make the tables; they must not be there yet.

    Raises:
        CorruptError: the tables are not there or cannot be opened.
    """

    def __init__(self, folder: Where, dimension: int, *, create: bool = False) -> None:
        self.folder = folder
        self.place = place_of(folder)
        self._manifests: list[list[str]] | None = None  # names, as of the last refresh
        self.dimension = dimension
        self._database = connect(folder)
        self._ledger: Ledger | Unlisted = self.place.ledger()
        if create:
            with committing(self._ledger):
                for name, schema in zip(_TABLES, (_DOCUMENTS, _chunks_schema(dimension)), strict=True):
                    table = self._database.create_table(name, schema=schema)
                    table.set_unenforced_primary_key("id")
                _index_words(table)
        if isinstance(self._ledger, Ledger):  # an object is there whole or not at all
            for name in _TABLES:
                heal(Path(self.place.uri) / f"{name}.lance", self._ledger)
        try:
            with self.place.reaching():
                self._documents: Any = self._database.open_table("documents")
                self._chunks: Any = self._database.open_table("chunks")
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptError(
                f"the tables in {folder} cannot be opened ({first_line(error)}). "
                f"Delete the collection and ingest again, or import an export"
            ) from error
        stored = self._chunks.schema.field("embedding").type.list_size
        if stored != dimension:
            raise CorruptError(
                f"the manifest speaks of {dimension}-d embeddings; the tables in {folder} hold {stored}-d"
            )

    # -- documents ---------------------------------------------------------------------------------------------------
    def documents(self) -> dict[str, DocumentRow]:
        """Give every document row by its id."""
        with self._reading():
            rows = self._documents.to_arrow().select([field.name for field in fields(DocumentRow)]).to_pylist()
        return {row["id"]: DocumentRow(**row) for row in rows}

    def count_documents(self) -> int:
        """Give the number of document rows."""
        with self.place.reaching():
            return int(self._documents.count_rows())

    def put_documents(self, rows: Sequence[DocumentRow]) -> None:
        """Insert or replace document rows."""
        if rows:
            table = pa.Table.from_pylist([{**asdict(row), "crc": _row_crc(row)} for row in rows], schema=_DOCUMENTS)
            with self._committing():
                _upsert(self._documents, table)

    def remove_documents(self, ids: Sequence[str]) -> None:
        """Delete documents and their chunks; the chunks first, so that a crash leaves the row that names them."""
        if ids:
            with self._committing():
                for names in sql_lists(ids):
                    self._chunks.delete(f"document IN ({names})")
                    self._documents.delete(f"id IN ({names})")

    # -- chunks ------------------------------------------------------------------------------------------------------
    def add_chunks(self, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Insert chunks with their embeddings; one whose id is there is replaced (its ordinal may differ)."""
        if not chunks:
            return
        last = sorted({chunk.id: row for row, chunk in enumerate(chunks)}.values())
        if len(last) < len(chunks):  # a merge tells rows from those of the table only, not from one another
            chunks, vectors = [chunks[row] for row in last], vectors[last]
        flat = np.ascontiguousarray(vectors, dtype=np.float32)
        facts = [
            json.dumps(_storable(chunk.metadata), ensure_ascii=False) if chunk.metadata else "{}" for chunk in chunks
        ]
        columns = {
            **{name: [getattr(chunk, name) for chunk in chunks] for name in _CHUNK_COLUMNS if name != "metadata"},
            "metadata": pa.ExtensionArray.from_storage(pa.json_(), pa.array(facts, pa.string())),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), self.dimension),
            "crc": [_crc(chunk, vector) for chunk, vector in zip(chunks, flat, strict=True)],
        }
        table = pa.table(columns, schema=_chunks_schema(self.dimension))
        with self._committing():
            _upsert(self._chunks, table)

    def drop_stale_chunks(self, kept: Mapping[str, set[str]]) -> int:
        """Delete the chunks of documents that are not among the ids kept of each; give how many there were."""
        ids = set().union(*kept.values())
        stale = [chunk for chunk in self.chunk_ids(list(kept)) if chunk not in ids]
        self.delete_chunks(stale)
        return len(stale)

    def chunk_ids(self, documents: Sequence[str]) -> list[str]:
        """Give the ids of the chunks that the named documents have."""
        found: list[str] = []
        for names in sql_lists(documents):
            found += self._scan(["id"], f"document IN ({names})")["id"].to_pylist()
        return found

    def present(self, ids: Sequence[str]) -> list[str]:
        """Give those ids that are there."""
        return [one for names in sql_lists(ids) for one in self._scan(["id"], f"id IN ({names})")["id"].to_pylist()]

    def chunks_named(self, ids: Sequence[str]) -> list[Chunk]:
        """Give the chunks of those ids that are there, in any order."""
        tables = [self._scan(_WHOLE, f"id IN ({names})") for names in sql_lists(ids)]
        return [chunk for table in tables for chunk in self._as_written(table).values()]

    def chunks_of(self, document: str) -> list[Chunk]:
        """Give the chunks of a document in the order of its text."""
        table = self._scan(_WHOLE, f"document IN ({next(sql_lists([document]))})")
        return sorted(self._as_written(table).values(), key=lambda chunk: chunk.start)

    def embeddings(self, document: str) -> dict[str, Vector]:
        """Give the embedding of each text that a chunk of a document has."""
        table = self._scan(["text", "embedding"], f"document IN ({next(sql_lists([document]))})")
        return dict(zip(table["text"].to_pylist(), _matrix(table["embedding"], self.dimension), strict=True))

    def vectors_named(self, ids: Sequence[str]) -> dict[str, Vector]:
        """Give the embeddings of those ids that are there."""
        tables = [self._scan(["id", "embedding"], f"id IN ({names})") for names in sql_lists(ids)]
        return {
            one: vector
            for table in tables
            for one, vector in zip(table["id"].to_pylist(), _matrix(table["embedding"], self.dimension), strict=True)
        }

    def chunks_per_document(self) -> dict[str, int]:
        """Give the number of chunks of every document that has any."""
        counted = self._scan(["document"])["document"].value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in counted}

    def count_chunks(self) -> int:
        """Give the number of chunks."""
        with self.place.reaching():
            return int(self._chunks.count_rows())

    def row_ids(self, where: str | None = None) -> RowIds:
        """Give the row ids of all chunks, or of those that a filter of the user keeps, ascending."""
        return self._filtered(self._scan_ids, where)

    def changed_since(self, version: int) -> tuple[RowIds, list[str]]:
        """Give the row ids, ascending, and the ids of the chunks that were written after a version."""
        table = self._scan(["id"], f"_row_last_updated_at_version > {version}", row_ids=True)
        rows, names = table["_rowid"].to_numpy().astype(np.int64), table["id"].to_pylist()
        order = np.argsort(rows)
        return rows[order], [names[at] for at in order.tolist()]

    def vectors(self, row_ids: RowIds) -> Vectors:
        """Give the embeddings of rows, (N, dimension) float32, in the order asked for."""
        if not len(row_ids):
            return np.empty((0, self.dimension), np.float32)
        with self._reading():
            query = self._chunks.take_row_ids(row_ids.tolist()).with_row_id().select(["embedding"])
            table = query.to_arrow()
        order = np.argsort(table["_rowid"].to_numpy(), kind="stable")
        where = np.searchsorted(table["_rowid"].to_numpy(), row_ids, sorter=order)
        return _matrix(table["embedding"], self.dimension)[order[where]]

    def all_vectors(self) -> Iterator[tuple[RowIds, Vectors]]:
        """Give (row ids, embeddings) of all chunks in batches, from files that are what was written.

        Raises:
            CorruptError: a file of the table has been altered.
        """
        query = self._chunks.search().with_row_id(True).select(["embedding"])
        with self._reading():
            if altered := self.altered_files("chunks"):
                raise ValueError(f"{altered[0]} has been altered")
            for batch in query.to_batches(8192):
                ids = batch.column("_rowid").to_numpy().astype(np.int64)
                yield ids, _matrix(batch.column("embedding"), self.dimension)

    def all_chunks(self) -> Iterator[pa.RecordBatch]:
        """Give all chunks with their row ids (`_rowid`), without embeddings, in batches; none for an empty table."""
        query = self._chunks.search().with_row_id(True).select(_CHUNK_COLUMNS)
        with self._reading():
            yield from query.to_batches(8192)

    def fetch(self, row_ids: Sequence[int]) -> list[Chunk]:
        """Give the chunks of rows, in the order asked for."""
        if not len(row_ids):
            return []
        with self._reading():
            table = self._chunks.take_row_ids(list(row_ids)).with_row_id().select(_WHOLE).to_arrow()
        found = dict(zip(table["_rowid"].to_pylist(), self._as_written(table).values(), strict=True))
        return [found[row] for row in row_ids if row in found]

    def full_text(self, text: str, k: int, where: str | None = None) -> tuple[RowIds, Scores]:
        """Give the row ids and BM25 scores of the k best chunks for the words of a text, best first."""
        words = text.encode("utf-8", "replace").decode()  # what was typed may hold lone surrogates

        def best(condition: str | None) -> pa.Table:
            query = self._chunks.search(MatchQuery(words, "text"), query_type="fts").select(["_score"])
            if condition:
                query = query.where(condition, prefilter=True)
            with self._reading():
                return query.with_row_id(True).limit(k).to_arrow()

        table = self._filtered(best, where)
        return table["_rowid"].to_numpy().astype(np.int64), table["_score"].to_numpy().astype(np.float32)

    # -- care --------------------------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """Version of the chunks table; each commit raises it."""
        return int(self._chunks.version)

    def stamp(self, version: int) -> str | None:
        """Give a hash that no other state of the chunks table has, or None when that version was cleaned up.

        A version number alone can come back with other content: after a power cut, or from a restored copy.
        """
        try:
            return hashlib.sha256(self.place.read(f"chunks.lance/_versions/{_manifest(version)}")).hexdigest()
        except OSError:
            return None

    @property
    def commits_lost(self) -> int:
        """How many commits were cut short so far; the numbers of their versions and rows were given out again."""
        names = self._manifests[0] if self._manifests else self.place.manifests("chunks")
        return sum(".manifest." in name for name in names)

    def cut_short(self) -> list[str]:
        """Give the manifests that were set aside when the tables were opened, and that no commit has stood in for."""
        if not isinstance(self.folder, Path):
            return []
        return [str(path.relative_to(self.folder)) for path in cut_short(self.folder)]

    def refresh(self) -> None:
        """Look at the newest version, which another process may have written.

        Each commit adds a manifest of its own, so the names in two folders tell (0.1 ms) whether Lance need be asked.
        """
        try:
            manifests = [self.place.manifests(table) for table in ("chunks", "documents")]
        except OSError:
            manifests = None
        if manifests is not None and manifests == self._manifests:
            return
        with self._reading():
            self._chunks.checkout_latest()
            self._documents.checkout_latest()
        self._manifests = manifests

    def optimize(self, older_than: float = HOUR) -> None:
        """Merge small files, drop versions older than some seconds, and bring the full-text index up to date.

        Raises:
            DiskFullError: the disk has no room for it; nothing was changed.
        """
        with self.place.reaching():
            live = sum(live_bytes(table) for table in (self._documents, self._chunks))
        self.place.check_room(live)
        # nothing goes before what stands for it has reached the disk
        for kept in (FOR_EVER, timedelta(seconds=max(older_than, 1e-3))):  # Lance warns of less
            with self._committing():
                for table in (self._documents, self._chunks):
                    table.optimize(cleanup_older_than=kept)

    def index_text(self, unindexed: int = 100) -> None:
        """Bring the full-text index up to date when over `unindexed` rows are outside it (29 us each a query)."""
        with self.place.reaching():
            statistics = self._chunks.index_stats("text_idx")
        if statistics is None or statistics.num_unindexed_rows > unindexed:
            try:
                self.optimize()
            except DiskFullError as error:  # what was written is there, and found; by words a little later
                logger.warning("%s", error)

    def rebuild_text_index(self) -> None:
        """Make the full-text index anew."""
        with self._committing():
            _index_words(self._chunks)

    def damaged(self) -> list[str]:
        """Give the ids of chunks whose checksum does not fit their text and embedding."""
        bad: list[str] = []
        query = self._chunks.search().select(_WHOLE)
        with self._reading():
            for batch in query.to_batches(4096):
                bad += [one for one, chunk in self._summed(batch).items() if chunk is None]
        return bad

    def damaged_documents(self) -> list[str]:
        """Give the ids of document rows whose checksum does not fit; those of the first format have none."""
        with self._reading():
            rows = self._documents.to_arrow().to_pylist()
        crcs = [row.pop("crc", None) for row in rows]
        return [
            row["id"]
            for row, crc in zip(rows, crcs, strict=True)
            if crc is not None and _row_crc(DocumentRow(**row)) != crc
        ]

    def altered_files(self, table: str = "") -> list[str]:
        """Give the files that are not what was written, by path; of one table, or of all."""
        return self._ledger.altered(f"{table}.lance/" if table else "")

    def sum_documents(self) -> None:
        """Give document rows their checksums, which the first format lacks."""
        if "crc" not in self._documents.schema.names:
            with self._committing():
                self._documents.add_columns(pa.field("crc", pa.uint32()))
        self.put_documents(list(self.documents().values()))

    def rewrite(self) -> None:
        """Write both tables and the text index anew from what can be read of them, and drop all files from before."""
        tables = self.to_arrow()
        with self._committing():
            for name, table in tables.items():
                self._database.create_table(name, table, mode="overwrite")  # the rows' schema holds the primary key
            self._documents, self._chunks = (self._database.open_table(name) for name in _TABLES)
            _index_words(self._chunks)
        with self._committing():
            for one in (self._documents, self._chunks):
                one.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
        for path in self.cut_short():
            (Path(self.place.uri) / path).unlink()

    def delete_chunks(self, ids: Sequence[str]) -> None:
        """Delete chunks by id."""
        if ids:
            with self._committing():
                for names in sql_lists(ids):
                    self._chunks.delete(f"id IN ({names})")

    def to_arrow(self) -> dict[str, pa.Table]:
        """Give both tables whole, for an export."""
        with self._reading():
            return {"documents": self._documents.to_arrow(), "chunks": self._chunks.to_arrow()}

    def add_arrow(self, documents: pa.Table, chunks: pa.Table) -> None:
        """Insert the rows of an export; documents of the first format have no checksums and get some.

        Raises:
            CorruptError: they are not rows of these tables.
        """
        if "crc" not in documents.column_names:
            crcs = [_row_crc(DocumentRow(**row)) for row in documents.to_pylist()]
            documents = documents.append_column("crc", pa.array(crcs, pa.uint32()))
        fitting = _chunks_schema(self.dimension), _DOCUMENTS
        for rows, schema in zip((chunks, documents), fitting, strict=True):
            rows.validate(full=True)
            if not rows.schema.equals(schema) or len(rows["id"].unique()) < len(rows):
                raise CorruptError("its tables are not those of a collection")
        with self._committing():
            _upsert(self._chunks, chunks)
            _upsert(self._documents, documents)

    def _as_written(self, table: pa.Table) -> dict[str, Chunk]:
        """Give the chunks of whole rows by id.

        Raises:
            CorruptError: one is not what was written.
        """
        with self._reading():
            found: dict[str, Chunk] = {}
            for one, chunk in self._summed(table).items():
                if chunk is None:
                    raise ValueError(f"chunk {one} has been altered")
                found[one] = chunk
            return found

    def _summed(self, rows: pa.Table | pa.RecordBatch) -> dict[str, Chunk | None]:
        """Give the chunks of whole rows by id, None for one whose checksum differs."""
        vectors = _matrix(rows.column("embedding"), self.dimension)
        found: dict[str, Chunk | None] = {}
        for row, vector in zip(rows.select([*_CHUNK_COLUMNS, "crc"]).to_pylist(), vectors, strict=True):
            crc = row.pop("crc")
            chunk = chunk_of(row) if _reads(row) else None
            found[row["id"]] = chunk if chunk and _crc(chunk, vector) == crc else None
        return found

    def _scan_ids(self, where: str | None) -> RowIds:
        return np.sort(self._scan(["id"], where, row_ids=True)["_rowid"].to_numpy().astype(np.int64))

    def _scan(self, columns: list[str], where: str | None = None, *, row_ids: bool = False) -> pa.Table:
        query = self._chunks.search().select(columns).with_row_id(row_ids)
        if where:
            query = query.where(where)
        with self._reading():
            return query.limit(None).to_arrow()

    def _committing(self) -> AbstractContextManager[None]:
        return committing(self._ledger, self._documents, self._chunks)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        remedy = "delete the collection and ingest again, or import an export"
        whole = f"Run: l2m collections repair; if that does not help, {remedy}"
        with reading(self.folder, whole), self.place.reaching():
            yield

    def _filtered(self, read: Callable[[str | None], T], where: str | None) -> T:
        """Read with a filter of the user; one that cannot be used is told from tables that fail without it too."""
        try:
            return read(to_sql(where) if where else None)
        except CorruptError as error:
            if not where:
                raise
            read(None)
            cause = error.__cause__ or error
            raise UsageError(f"--where {where!r} cannot be used: {first_line(cause)}") from cause


def _upsert(table: Any, rows: pa.Table) -> None:
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def live_bytes(table: Any) -> int:
    """Give the bytes of the files of a table's present version."""
    return int(table.stats()["total_bytes"])


def connect(folder: Where) -> Any:
    """Open a folder of tables; the row ids of those made in it survive compaction, so that others can refer to rows."""
    place = place_of(folder)
    options = {"new_table_enable_stable_row_ids": "true", **place.options}
    with place.ledger().telling():  # it makes the folder
        return lancedb.connect(place.uri, storage_options=options)


@contextmanager
def reading(folder: Where, remedy: str) -> Iterator[None]:
    """Turn what Lance throws at unreadable files into an error that says what to do."""
    try:
        yield
    except Exception as error:  # damaged files make Lance throw almost anything, also panics of its libraries
        if isinstance(error, L2MError | MemoryError) or "(os error" in str(error):  # these are no damage
            raise
        raise CorruptError(f"the tables in {folder} cannot be read ({first_line(error)}). {remedy}") from error


def _manifest(version: int) -> str:
    """Give the name of the file that makes a version of a table: Lance counts down, so the newest comes first."""
    return f"{(1 << 64) - 1 - version:020d}.manifest"


@contextmanager
def committing(ledger: Ledger | Unlisted, *tables: Any) -> Iterator[None]:
    """Keep watch over commits: they are on the disk when the block ends, or taken back.

    Args:
        ledger: of the folder of the tables.
        tables: Lance's handles, which are brought to what is then the newest version.

    Raises:
        DiskFullError: there was no room.
        ReadOnlyError: the disk takes nothing.
        OSError: it did not take all, for another reason.
    """
    with ledger.telling():
        ledger.begin()
        try:
            yield
        except BaseException:
            ledger.failed()
            with suppress(OSError):
                _settle(ledger, tables)
            raise
        _settle(ledger, tables)


def _settle(ledger: Ledger | Unlisted, tables: Sequence[Any]) -> None:
    """Wait until what was committed has reached the disk; take it back when a file of it lacks its end."""
    try:
        ledger.settle()
    except CutShortError as error:
        for path in error.new:
            if path.suffix == ".manifest":
                path.replace(path.with_name(f"{path.name}.undone"))
        for table in tables:
            table.checkout_latest()
        raise


def heal(table: Path, ledger: Ledger) -> None:
    """Set the newest manifests aside when they have no content, so that the table opens at the version before them.

    A power cut can leave them: Lance moves a manifest into place before its content has reached the disk.
    """
    with suppress(OSError):  # what is wrong beyond that is told by opening the table
        manifests = sorted((table / "_versions").glob("*.manifest"))
        hollow = list(takewhile(_is_hollow, manifests))
        if not hollow or len(hollow) == len(manifests):
            return
        for path in hollow:
            path.replace(path.with_name(f"{path.name}.damaged"))
        ledger.forget(hollow)  # the next commit takes the name
        logger.warning(
            "%s was cut short, as by a power cut: its last %d commits are lost, and it is back at the one before. "
            "Ingest again to bring back what is missing",
            table,
            len(hollow),
        )


def cut_short(folder: Path) -> list[Path]:
    """Give the manifests of a folder's tables that `heal` has set aside, and that no commit has stood in for."""
    aside = folder.glob("*/_versions/*.damaged")
    return sorted(path for path in aside if not path.with_suffix("").exists())


def _is_hollow(manifest: Path) -> bool:
    """Say whether a manifest lacks the magic bytes that it ends with."""
    with manifest.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(-min(4, stream.tell()), os.SEEK_END)
        return stream.read() != b"LANC"


def _index_words(table: Any) -> None:
    words = FTS(with_position=False, stem=True, remove_stop_words=True, language="English")
    table.create_index("text", config=words, replace=True)


# A quoted string stays as it is; metadata.KEY becomes a JSON look-up, of the type of the literal behind its operator.
_METADATA = re.compile(
    r"(?P<quoted>'(?:[^']|'')*'|\"[^\"]*\")"
    r"|\bmetadata\.(?P<key>\w+)(?P<operator>\s*(?:=|!=|<>|<=|>=|<|>|\bIS\b|(?:\bNOT\s+)?\b(?:I?LIKE|IN|BETWEEN)\b)\s*\(?\s*"
    r"(?:(?P<number>[-+]?\.?\d[\w.]*)|(?P<boolean>(?:NOT\s+)?(?:true|false))\b)?)?",
    re.IGNORECASE,
)


_BORDER = re.compile(
    r"(?P<foreign>\w'|--|/\*|[;$`\\#])|(?P<quoted>'(?:[^']|'')*'|\"[^\"]*\")|[()]"
)  # strings with escapes of their own, comments, and other quotes


def to_sql(where: str) -> str:
    """Turn a filter of the user into Lance's SQL.

    Columns stand as they are (`document LIKE 'reports/%' AND page >= 3`); `metadata.KEY` looks into what the format
    told of the document, compared as text, number or truth value after the literal behind it
    (`metadata.author = 'Ada'`); by itself it is a truth value. A value of another type fits no comparison.

    Raises:
        UsageError: it is more than one condition, of which Lance would read the first and pass over the rest.
    """
    _check_condition(where)

    def look_up(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match["quoted"]
        text = f"json_get_string(metadata, '{match['key']}')"
        if match["operator"] is None or match["boolean"]:
            return f"TRY_CAST({text} AS BOOLEAN){match['operator'] or ''}"
        return (f"TRY_CAST({text} AS DOUBLE)" if match["number"] else text) + match["operator"]

    return f"({_METADATA.sub(look_up, where)})"  # in brackets, or Lance reads up to where it could end


def _check_condition(where: str) -> None:
    """Refuse what could end the brackets around a filter, or hide from us where they end."""
    depth = 0
    for match in _BORDER.finditer(where):
        if match["quoted"]:
            continue
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if match["foreign"] or depth < 0:
            raise UsageError(f"--where {where!r} cannot be used: it must be one condition, and {match[0]!r} ends it")


def chunk_of(row: dict[str, Any]) -> Chunk:
    """Make a chunk of the columns that are stored of it."""
    return Chunk(**{**row, "metadata": json.loads(row["metadata"] or "{}")})


def _reads(row: dict[str, Any]) -> bool:
    try:
        return isinstance(json.loads(row["metadata"]), dict)
    except (ValueError, TypeError):
        return False


def _matrix(column: Any, dimension: int) -> Vectors:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    matrix: Vectors = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    return matrix


def _crc(chunk: Chunk, vector: Vector) -> int:
    """Sum up a row: everything that is stored of a chunk, and its embedding."""
    facts = sorted(_storable(chunk.metadata).items())
    numbers = [[key, float(value) if type(value) is int else value] for key, value in facts]
    return zlib.crc32(vector, zlib.crc32(json.dumps([*_columns(chunk), numbers]).encode()))  # type: ignore[arg-type]


def _row_crc(row: DocumentRow) -> int:
    return zlib.crc32(json.dumps(list(asdict(row).values())).encode())


def _storable(metadata: dict[str, Scalar]) -> dict[str, Scalar]:
    """Give metadata as JSON keeps them: without numbers that are none, or that no float can hold."""

    def kept(value: Scalar) -> Scalar:
        try:
            return value if not isinstance(value, int | float) or math.isfinite(value) else None
        except OverflowError:
            return None

    return {key: kept(value) for key, value in metadata.items()}


def sql_lists(names: Sequence[str]) -> Iterator[str]:
    """Give SQL lists of quoted names, `_IN_LIST` at a time."""
    for start in range(0, len(names), _IN_LIST):
        yield ", ".join("'" + name.replace("'", "''") + "'" for name in names[start : start + _IN_LIST])


def first_line(error: BaseException) -> str:
    """Give what an error of Lance says, without the places in its source."""
    return str(error).strip().split("\n")[0].split(", /")[0]
