"""The tables of one collection in LanceDB: the only truth of the long-term tier.

Nothing outside this file imports lancedb. Lance writes whole new files and then one manifest, so a killed process
leaves the last commit; upserts go through `merge_insert` on a declared primary key, without which two racing writers
leave duplicate rows.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("LANCE_LOG", "error")  # Lance warns on stderr of its own deprecations otherwise

import lancedb
import pyarrow as pa
from lancedb.index import FTS
from lancedb.query import MatchQuery

from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.memory_tiers.records import Chunk, DocumentRow

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Vector = np.ndarray[Any, np.dtype[np.float32]]
RowIds = np.ndarray[tuple[int], np.dtype[np.int64]]
Scores = np.ndarray[tuple[int], np.dtype[np.float32]]

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
    ]
)
_CHUNK_COLUMNS = ["id", "document", "ordinal", "page", "heading", "start", "end", "text", "metadata"]
_IN_LIST = 500  # names a filter may list: DataFusion plans long lists slowly


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

    def __init__(self, folder: Path, dimension: int, *, create: bool = False) -> None:
        self.folder = folder
        self.dimension = dimension
        # row ids that survive compaction are what lets the hot index refer to rows
        self._database = lancedb.connect(str(folder), storage_options={"new_table_enable_stable_row_ids": "true"})
        if create:
            for name, schema in (("documents", _DOCUMENTS), ("chunks", _chunks_schema(dimension))):
                table = self._database.create_table(name, schema=schema)
                table.set_unenforced_primary_key("id")
            words = FTS(with_position=False, stem=True, remove_stop_words=True, language="English")
            table.create_index("text", config=words)
        try:
            self._documents: Any = self._database.open_table("documents")
            self._chunks: Any = self._database.open_table("chunks")
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptError(
                f"the tables in {folder} cannot be opened ({_first_line(error)}). "
                f"Delete the collection and ingest again, or import an export"
            ) from error

    # -- documents ---------------------------------------------------------------------------------------------------
    def documents(self) -> dict[str, DocumentRow]:
        """Give every document row by its id."""
        rows = self._documents.to_arrow().select([field.name for field in fields(DocumentRow)]).to_pylist()
        return {row["id"]: DocumentRow(**row) for row in rows}

    def put_documents(self, rows: Sequence[DocumentRow]) -> None:
        """Insert or replace document rows."""
        if rows:
            table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_DOCUMENTS)
            self._documents.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def remove_documents(self, ids: Sequence[str]) -> None:
        """Delete documents and their chunks; the chunks first, so that a crash leaves the row that names them."""
        for names in _lists(ids):
            self._chunks.delete(f"document IN ({names})")
            self._documents.delete(f"id IN ({names})")

    # -- chunks ------------------------------------------------------------------------------------------------------
    def add_chunks(self, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Insert chunks with their embeddings; one whose id is there is replaced (its ordinal may differ)."""
        if not chunks:
            return
        flat = np.ascontiguousarray(vectors, dtype=np.float32)
        columns = {
            **{name: [getattr(chunk, name) for chunk in chunks] for name in _CHUNK_COLUMNS if name != "metadata"},
            "metadata": pa.ExtensionArray.from_storage(
                pa.json_(), pa.array([json.dumps(chunk.metadata, ensure_ascii=False) for chunk in chunks], pa.string())
            ),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), self.dimension),
            "crc": [_crc(chunk.text, vector) for chunk, vector in zip(chunks, flat, strict=True)],
        }
        table = pa.table(columns, schema=_chunks_schema(self.dimension))
        self._chunks.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def drop_stale_chunks(self, document: str, ids: set[str]) -> int:
        """Delete the chunks of a document that are not among `ids`; give how many there were."""
        stale = [chunk for chunk in self.chunk_ids([document]) if chunk not in ids]
        for names in _lists(stale):
            self._chunks.delete(f"id IN ({names})")
        return len(stale)

    def chunk_ids(self, documents: Sequence[str]) -> list[str]:
        """Give the ids of the chunks that the named documents have."""
        found: list[str] = []
        for names in _lists(documents):
            found += self._scan(["id"], f"document IN ({names})")["id"].to_pylist()
        return found

    def embeddings(self, document: str) -> dict[str, Vector]:
        """Give the embedding of each chunk that a document has, by chunk id."""
        table = self._scan(["id", "embedding"], f"document IN ({next(_lists([document]))})")
        return dict(zip(table["id"].to_pylist(), _matrix(table["embedding"], self.dimension), strict=True))

    def chunks_per_document(self) -> dict[str, int]:
        """Give the number of chunks of every document that has any."""
        counted = self._scan(["document"])["document"].value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in counted}

    def count_chunks(self) -> int:
        """Give the number of chunks."""
        return int(self._chunks.count_rows())

    def row_ids(self, where: str | None = None) -> RowIds:
        """Give the row ids of all chunks, or of those that a filter of the user keeps, ascending."""
        try:
            found = self._scan(["id"], to_sql(where) if where else None, row_ids=True)["_rowid"].to_numpy()
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"--where {where!r} cannot be used: {_first_line(error)}") from error
        return np.sort(found.astype(np.int64))

    def vectors(self, row_ids: RowIds) -> Vectors:
        """Give the embeddings of rows, (N, dimension) float32, in the order asked for."""
        table = self._chunks.take_row_ids(row_ids.tolist()).select(["embedding"]).to_arrow()
        return _matrix(table["embedding"], self.dimension)

    def all_vectors(self) -> Iterator[tuple[RowIds, Vectors]]:
        """Give (row ids, embeddings) of all chunks in batches."""
        query = self._chunks.search().with_row_id(True).select(["embedding"])
        for batch in query.to_batches(8192):
            ids = batch.column("_rowid").to_numpy().astype(np.int64)
            yield ids, _matrix(batch.column("embedding"), self.dimension)

    def fetch(self, row_ids: Sequence[int]) -> list[Chunk]:
        """Give the chunks of rows, in the order asked for."""
        if not len(row_ids):
            return []
        table = self._chunks.take_row_ids(list(row_ids)).with_row_id().select(_CHUNK_COLUMNS).to_arrow()
        found = {row.pop("_rowid"): _chunk(row) for row in table.to_pylist()}
        return [found[row] for row in row_ids if row in found]

    def full_text(self, text: str, k: int, where: str | None = None) -> tuple[RowIds, Scores]:
        """Give the row ids and BM25 scores of the k best chunks for the words of a text, best first."""
        query = self._chunks.search(MatchQuery(text, "text"), query_type="fts").select(["_score"]).with_row_id(True)
        if where:
            query = query.where(to_sql(where), prefilter=True)
        try:
            found = query.limit(k).to_arrow()
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"the text search failed: {_first_line(error)}") from error
        return found["_rowid"].to_numpy().astype(np.int64), found["_score"].to_numpy().astype(np.float32)

    # -- care --------------------------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """Version of the chunks table; each commit raises it."""
        return int(self._chunks.version)

    def refresh(self) -> None:
        """Look at the newest version, which another process may have written."""
        self._chunks.checkout_latest()
        self._documents.checkout_latest()

    def optimize(self) -> None:
        """Merge small files, drop versions older than an hour, and bring the full-text index up to date."""
        for table in (self._documents, self._chunks):
            table.optimize(cleanup_older_than=timedelta(hours=1))

    def index_text(self, unindexed: int = 100) -> None:
        """Bring the full-text index up to date when over `unindexed` rows are outside it (29 us each a query)."""
        statistics = self._chunks.index_stats("text_idx")
        if statistics is None or statistics.num_unindexed_rows > unindexed:
            self.optimize()

    def damaged(self) -> list[str]:
        """Give the ids of chunks whose checksum does not fit their text and embedding."""
        bad: list[str] = []
        query = self._chunks.search().select(["id", "text", "embedding", "crc"])
        for batch in query.to_batches(4096):
            vectors = _matrix(batch.column("embedding"), self.dimension)
            columns = (batch.column(name).to_pylist() for name in ("id", "text", "crc"))
            for identity, text, crc, vector in zip(*columns, vectors, strict=True):
                if _crc(text, vector) != crc:
                    bad.append(identity)
        return bad

    def delete_chunks(self, ids: Sequence[str]) -> None:
        """Delete chunks by id."""
        for names in _lists(ids):
            self._chunks.delete(f"id IN ({names})")

    def to_arrow(self) -> dict[str, pa.Table]:
        """Give both tables whole, for an export."""
        return {"documents": self._documents.to_arrow(), "chunks": self._chunks.to_arrow()}

    def add_arrow(self, documents: pa.Table, chunks: pa.Table) -> None:
        """Insert rows of an export."""
        for table, rows in ((self._chunks, chunks), (self._documents, documents)):
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def _scan(self, columns: list[str], where: str | None = None, *, row_ids: bool = False) -> pa.Table:
        query = self._chunks.search().select(columns).with_row_id(row_ids)
        if where:
            query = query.where(where)
        return query.limit(None).to_arrow()


# A quoted string stays as it is; metadata.KEY OP LITERAL becomes a JSON look-up of the literal's type.
_METADATA = re.compile(
    r"(?P<quoted>'(?:[^']|'')*'|\"[^\"]*\")"
    r"|\bmetadata\.(?P<key>\w+)(?P<rest>\s*(?:=|!=|<>|<=|>=|<|>|\bNOT\s+LIKE\b|\bLIKE\b|\bILIKE\b|\bIN\b|\bIS\b)\s*\(?\s*"
    r"(?:(?P<number>-?\d[\d.]*)|(?P<boolean>true|false)\b)?)",
    re.IGNORECASE,
)


def to_sql(where: str) -> str:
    """Turn a filter of the user into Lance's SQL.

    Columns stand as they are (`document LIKE 'reports/%' AND page >= 3`); `metadata.KEY` looks into what the format
    told of the document, compared as text, number or truth value after the literal beside it
    (`metadata.author = 'Ada'`).
    """

    def look_up(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match["quoted"]
        kind = "float" if match["number"] else "bool" if match["boolean"] else "string"
        return f"json_get_{kind}(metadata, '{match['key']}'){match['rest']}"

    return _METADATA.sub(look_up, where)


def _chunk(row: dict[str, Any]) -> Chunk:
    return Chunk(**{**row, "metadata": json.loads(row["metadata"] or "{}")})


def _matrix(column: Any, dimension: int) -> Vectors:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    matrix: Vectors = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    return matrix


def _crc(text: str, vector: Vector) -> int:
    return zlib.crc32(vector.tobytes(), zlib.crc32(text.encode()))


def _lists(names: Sequence[str]) -> Iterator[str]:
    """Give SQL lists of quoted names, `_IN_LIST` at a time."""
    for start in range(0, len(names), _IN_LIST):
        yield ", ".join("'" + name.replace("'", "''") + "'" for name in names[start : start + _IN_LIST])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(", /")[0]
