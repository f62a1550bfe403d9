"""The long-term tier of one collection: what was ingested, and hybrid search over it.

A search asks two halves, the hot index (dense) and Lance's full-text index (BM25), and fuses what they give. The
default fusion adds the cosine and the BM25 score scaled by the best BM25 score of the question; reciprocal rank fusion
(Cormack et al., SIGIR 2009) is the other choice. Measured: docs/decisions/0003-fusion.md.
"""

from __future__ import annotations

import heapq
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from l2m_rag.errors import CollectionNotFound, CorruptError, IncompatibleError, UsageError
from l2m_rag.memory_tiers.disk import digest
from l2m_rag.memory_tiers.hot_index import HotIndex, catch_up, open_hot_index
from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Scores, Vector, Vectors
from l2m_rag.memory_tiers.places import Place, Where, place_of
from l2m_rag.memory_tiers.records import HOUR, Chunk, DocumentRow, Passage
from l2m_rag.memory_tiers.state_table import StateFormat, StateTable
from l2m_rag.memory_tiers.states import HOT_BYTES, StateTier
from l2m_rag.memory_tiers.usage import DiskPolicy

Mode = Literal["hybrid", "dense", "text"]
Fusion = Literal["scores", "rrf"]

FORMAT = 2
"""Of what is stored: 2 has checksums of the files, of the manifest and of document rows."""
CANDIDATES = 100
"""Rows that each half brings to the fusion."""
_LEXICAL_WEIGHT = 0.5  # of the scaled BM25 score beside the cosine
_RRF_K = 60
_UNIT = 1e-4  # by which a length may differ from 1 and count as 1
_LONGEST_TEXT = 4000  # characters of a question that the full-text half looks at


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a collection was made with; another one at opening is an error, not a wrong answer.

    Args:
        embedder: name of the embedder.
        fingerprint: hash of its weights.
        dimension: of its vectors.
        created_at: seconds since 1970.
        format: version of what is stored.
    """

    embedder: str
    fingerprint: str
    dimension: int
    created_at: float
    format: int = FORMAT


class Tier(Protocol):
    """What every backend of the long-term tier can do with chunks; `tests/test_tier_contract.py` holds them to it."""

    @property
    def dimension(self) -> int:
        """Of the embeddings."""

    @property
    def version(self) -> int:
        """A number that every change raises."""

    def __len__(self) -> int: ...

    def add(self, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Insert chunks, or replace those whose id is there; they are found at once."""

    def evict(self, ids: Sequence[str]) -> int:
        """Delete chunks by id; give how many there were."""

    def fetch(self, ids: Sequence[str]) -> list[Chunk]:
        """Give the chunks of those ids that are there, in the order asked for."""

    def search(
        self,
        text: str,
        vector: Vector | None,
        k: int,
        *,
        mode: Mode = "hybrid",
        where: str | None = None,
        fusion: Fusion = "scores",
    ) -> list[Passage]:
        """Give the k best passages for a question, best first, equal ones in the order in which they came in."""

    def verify(self) -> list[str]:
        """Give what is wrong with what is stored."""

    def repair(self) -> list[str]:
        """Remove what is wrong; say what was done."""

    def compact(self) -> None:
        """Give back the room of what was deleted."""

    def states(
        self,
        form: StateFormat,
        *,
        namespace: str = "default",
        hot_bytes: int = HOT_BYTES,
        disk_bytes: int | None = None,
        policy: DiskPolicy = "lru",
    ) -> StateTier:
        """Give the states of a namespace, searched by key: what a model's working memory let go of."""


class LongTermTier:
    """Documents and chunks on disk or object storage, with the indexes that search them.

    Args:
        folder: where the collection lies; it must hold a manifest.

    Raises:
        CollectionNotFound: there is no manifest.
        CorruptError: the manifest or the tables cannot be read.
        IncompatibleError: a newer version of the library wrote it.
    """

    def __init__(self, folder: Where) -> None:
        self.folder = folder
        self.place = place_of(folder)
        self.manifest = read_manifest(folder)
        self.store = LanceStore(folder / "tables", self.manifest.dimension)
        self._hot: HotIndex | None = None
        self._hot_of = (-1, -1)  # version and commits lost
        self._changing = Lock()  # what is newest may be added to by one thread only

    def hot_index(self, known: Mapping[str, Vector] | None = None) -> HotIndex:
        """Give the hot index of the newest version; vectors known by id are not read again."""
        with self._changing:
            self.store.refresh()
            now, (version, lost) = (self.store.version, self.store.commits_lost), self._hot_of
            if self._hot is not None and now != (version, lost):
                follows = now[0] > version and now[1] == lost
                self._hot = catch_up(self._hot, version, self.store, known) if follows else None
            if self._hot is None:
                self._hot = open_hot_index(self.place.hot, self.store, self.manifest.fingerprint)
            self._hot_of = now
            return self._hot

    def check_writable(self) -> None:
        """Refuse to write into an older format, which can be read as it is.

        Raises:
            IncompatibleError: its format is not the present one.
        """
        if self.manifest.format < FORMAT:
            raise IncompatibleError(
                f"collection {self.folder.name!r} has format {self.manifest.format}; this version reads it and writes "
                f"format {FORMAT}. Run: l2m collections migrate {self.folder.name}"
            )

    @property
    def dimension(self) -> int:
        """Of the embeddings."""
        return self.manifest.dimension

    @property
    def version(self) -> int:
        """Number of the last commit."""
        self.store.refresh()
        return self.store.version

    def __len__(self) -> int:
        self.store.refresh()
        return self.store.count_chunks()

    def add(self, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Insert chunks, or replace those whose id is there; they are found from now on, and on the disk.

        Args:
            chunks: with ids that differ.
            vectors: (N, dimension) float32, finite and not zero; brought to unit length.

        Raises:
            UsageError: ids or vectors cannot be used; nothing was written.
        """
        self.check_writable()
        unit = checked(chunks, vectors, self.dimension)
        self.store.add_chunks(chunks, unit)
        if self._hot is not None:  # takes them in now, so that the next search is as fast as any
            self.hot_index({chunk.id: vector for chunk, vector in zip(chunks, unit, strict=True)})

    def evict(self, ids: Sequence[str]) -> int:
        """Delete chunks by id; give how many there were."""
        self.check_writable()
        self.store.refresh()
        there = self.store.present(ids)
        self.store.delete_chunks(there)
        return len(there)

    def fetch(self, ids: Sequence[str]) -> list[Chunk]:
        """Give the chunks of those ids that are there, in the order asked for."""
        self.store.refresh()
        found = {chunk.id: chunk for chunk in self.store.chunks_named(ids)}
        return [found[one] for one in ids if one in found]

    def states(
        self,
        form: StateFormat,
        *,
        namespace: str = "default",
        hot_bytes: int = HOT_BYTES,
        disk_bytes: int | None = None,
        policy: DiskPolicy = "lru",
    ) -> StateTier:
        """Give the states of a namespace; see `StateTier`, and hold the writer's lock while it is open.

        Raises:
            IncompatibleError: the collection has states of another format.
            CorruptError: they cannot be read.
            UsageError: the collection lies on object storage.
        """
        self.check_writable()
        return StateTier(
            form,
            self._states_folder(),
            namespace=namespace,
            hot_bytes=hot_bytes,
            disk_bytes=disk_bytes,
            policy=policy,
        )

    def put_states(self, form: StateFormat, rows: pa.Table) -> None:
        """Insert the states of an export into a tier that has none.

        Raises:
            CorruptError: they are not what was written.
            UsageError: the collection lies on object storage.
        """
        StateTable(self._states_folder(), form).put_arrow(rows)

    def _states_folder(self) -> Path:
        if not isinstance(self.folder, Path):
            raise UsageError(
                f"states of a model are kept on the disk of the machine that makes them; the collection lies at "
                f"{self.folder}. Use one in a folder"
            )
        return self.folder / "states"

    def state_table(self) -> StateTable | None:
        """Give the table of the states of all namespaces; None when there is none.

        Raises:
            CorruptError: it cannot be read.
        """
        if not isinstance(self.folder, Path):
            return None
        folder = self.folder / "states"
        there = (folder / "states.json").exists() or any(folder.glob("states.lance/data/*.lance"))
        return StateTable(folder) if there else None  # nor where a creation was cut off

    def verify(self) -> list[str]:
        """Check every file and row: checksums, and that documents and chunks add up; give what is wrong.

        Raises:
            CorruptError: the tables cannot be read at all.
        """
        self.store.refresh()
        problems = [f"{path}: the file has been altered" for path in self.store.altered_files()]
        problems += [f"{path}: a commit was cut short, and is lost" for path in self.store.cut_short()]
        rows, counts = self.store.documents(), self.store.chunks_per_document()
        problems += [f"chunk {one}: what is stored of it has been altered" for one in self.store.damaged()]
        problems += [
            f"{one}: what is stored of the document has been altered" for one in self.store.damaged_documents()
        ]
        try:
            states = self.state_table()
            problems += states.verify() if states else []
        except (CorruptError, IncompatibleError) as error:
            problems.append(str(error))
        return problems + [
            f"{name}: {counts.get(name, 0)} chunks are stored, {rows[name].chunks if name in rows else 0} are expected"
            for name in _incomplete(rows, counts)
        ]

    def repair(self) -> list[str]:
        """Remove what `verify` finds wrong, and make the indexes anew; say what was done."""
        self.check_writable()
        self.store.refresh()
        done: list[str] = []
        altered = [*self.store.altered_files(), *self.store.cut_short()]
        damaged = self.store.damaged()
        if damaged:
            self.store.delete_chunks(damaged)
            done.append(f"removed {len(damaged)} damaged chunks")
        wrong = _incomplete(self.store.documents(), self.store.chunks_per_document())
        wrong = sorted({*wrong, *self.store.damaged_documents()})
        if wrong:
            self.store.remove_documents(wrong)
            done.append(
                f"removed {len(wrong)} incomplete documents; ingest again to bring them back: " + ", ".join(wrong[:5])
            )
        if altered:
            self.store.rewrite()
            done.append(f"wrote the tables anew, as {len(altered)} of their files had been altered or cut short")
        else:
            self.store.rebuild_text_index()
        self._index_anew()
        return [*done, "built the search indexes again", *self._repair_states()]

    def _repair_states(self) -> list[str]:
        try:
            states = self.state_table()
            return states.repair() if states else []
        except CorruptError as error:
            folder = self._states_folder()
            aside = folder.rename(folder.with_name(f"states.damaged-{time.time_ns()}"))
            return [f"set the states aside, in {aside}, as they cannot be read ({error})"]

    def compact(self, older_than: float = HOUR) -> None:
        """Merge small files, drop versions older than some seconds, and bring the indexes up to date.

        With 0 nothing is left on the disk of the documents and texts that were deleted; who has an older version open
        must open it again.

        Raises:
            DiskFullError: the disk has no room for it; nothing was changed.
        """
        self.check_writable()
        self.store.refresh()
        self.store.optimize(older_than)
        self.store.rebuild_text_index()  # which else goes on counting the words of rows that were deleted
        if older_than < HOUR:
            self.store.optimize(older_than)  # now that no index stands on them any more
        self._index_anew()
        if states := self.state_table():
            states.compact()

    def _worded(self, text: str, k: int, where: str | None, hot: HotIndex) -> tuple[RowIds, Scores]:
        """Give the rows that the full-text index finds and that are there.

        Once deleted rows have been taken out of the files, Lance's index with stable row ids gives them all the same.
        """
        asked = k
        while True:
            rows, scores = self.store.full_text(text, asked, where)
            there = hot.holds(rows)
            if len(rows) < asked or np.count_nonzero(there) >= k:
                rows, scores = rows[there], scores[there]
                order = np.lexsort((rows, -scores))[:k]  # Lance leaves the order of equals to chance
                return rows[order], scores[order]
            asked *= 2

    def _index_anew(self) -> None:
        shutil.rmtree(self.place.hot, ignore_errors=True)
        self._hot = None
        self.hot_index()

    def search(
        self,
        text: str,
        vector: Vector | None,
        k: int,
        *,
        mode: Mode = "hybrid",
        where: str | None = None,
        fusion: Fusion = "scores",
    ) -> list[Passage]:
        """Give the k best passages for a question, best first.

        Args:
            text: the question; its words are used by the modes hybrid and text.
            vector: (E,) float32, the question's embedding; may be None in mode text.
            k: most passages; >= 1.
            mode: both halves, or one.
            where: filter over columns and `metadata.KEY`, in SQL.
            fusion: how the halves are combined.

        Raises:
            UsageError: k, mode or the filter cannot be used.
        """
        check_query(vector, k, mode, self.manifest.dimension)
        hot = self.hot_index()
        depth = max(k, CANDIDATES) if mode == "hybrid" else k
        dense: tuple[RowIds, Scores] = (np.empty(0, np.int64), np.empty(0, np.float32))
        lexical = dense
        if mode != "text" and vector is not None:
            dense = hot.search(vector, depth, self.store.row_ids(where) if where else None)
        if mode != "dense" and any(letter.isalnum() for letter in text):
            lexical = self._worded(text[:_LONGEST_TEXT], depth, where, hot)
        cosines = hot.cosines(lexical[0], vector) if vector is not None else np.full(len(lexical[0]), np.nan)
        ranked = fuse(dense, lexical, cosines, fusion, k)
        rows = [candidate.row for candidate in ranked]
        chunks = hot.chunks.fetch(rows) if hot.chunks else {}
        missing = [row for row in rows if row not in chunks]  # written since, or no cache could be kept
        chunks |= zip(missing, self.store.fetch(missing), strict=True)
        return [
            Passage(chunks[candidate.row], candidate.score, candidate.dense, candidate.lexical) for candidate in ranked
        ]


def _incomplete(rows: dict[str, DocumentRow], counts: dict[str, int]) -> list[str]:
    """Give the documents of which other chunks are stored than their rows say."""
    names = sorted(rows.keys() | counts.keys())
    return [name for name in names if counts.get(name, 0) != (rows[name].chunks if name in rows else 0)]


def check_query(vector: Vector | None, k: int, mode: str, dimension: int) -> None:
    """Check what is searched for.

    Raises:
        UsageError: k, mode or the vector cannot be used.
    """
    if k < 1:
        raise UsageError(f"k ({k}) must be at least 1")
    if mode not in ("hybrid", "dense", "text"):
        raise UsageError(f"mode ({mode}) must be hybrid, dense or text")
    if vector is not None and vector.shape != (dimension,):
        raise UsageError(f"the vector to search for has the shape {vector.shape}; the tier holds {dimension}-d ones")
    if vector is not None and not np.isfinite(vector).all():
        raise UsageError("the vector to search for has entries that are not numbers")


def checked(chunks: Sequence[Chunk], vectors: Vectors, dimension: int) -> Vectors:
    """Give the vectors of chunks that are to be stored, at unit length.

    Raises:
        UsageError: there are not as many vectors as chunks, one has another dimension, is not finite or zero, or an id
            comes twice.
    """
    flat = np.asarray(vectors, dtype=np.float32)
    if flat.shape != (len(chunks), dimension):
        raise UsageError(f"{len(chunks)} chunks need vectors of the shape {(len(chunks), dimension)}, not {flat.shape}")
    twice = [one for one, often in Counter(chunk.id for chunk in chunks).items() if often > 1]
    if twice:
        raise UsageError(f"the id {twice[0]!r} comes more than once in one batch; give each chunk an id of its own")
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    unusable = ~(np.isfinite(lengths) & (lengths > 0))[:, 0]
    if unusable.any():
        at = int(np.argmax(unusable))
        raise UsageError(f"the vector of chunk {chunks[at].id!r} is zero or has entries that are not numbers")
    return np.where(np.abs(lengths - 1) < _UNIT, flat, flat / lengths)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row on its way to being a passage; see `Passage`."""

    row: int
    score: float
    dense: float | None
    lexical: float | None


def fuse(
    dense: tuple[RowIds, Scores], lexical: tuple[RowIds, Scores], cosines: Scores, fusion: Fusion, k: int
) -> list[Candidate]:
    """Merge the two halves; ties go by row id, so that the order never depends on chance.

    Args:
        dense: row ids and cosines, best first.
        lexical: row ids and BM25 scores, best first.
        cosines: cosine of each lexical row, NaN when there is none.
        fusion: "scores" or "rrf".
        k: how many are given at most.
    """
    close = {int(row): float(score) for row, score in zip(*dense, strict=True)}
    worded = {int(row): float(score) for row, score in zip(*lexical, strict=True)}
    for row, cosine in zip(lexical[0].tolist(), cosines.tolist(), strict=True):
        if not np.isnan(cosine):
            close.setdefault(row, cosine)
    ranks = [{int(row): rank for rank, row in enumerate(half[0].tolist())} for half in (dense, lexical)]
    best = max(worded.values(), default=1.0) or 1.0

    def score(row: int) -> float:
        if not worded or not len(dense[0]):
            return worded[row] if worded else close[row]
        if fusion == "rrf":
            return sum(1 / (_RRF_K + 1 + half[row]) for half in ranks if row in half)
        return close.get(row, 0.0) + _LEXICAL_WEIGHT * worded.get(row, 0.0) / best

    ranked = heapq.nsmallest(k, ((-score(row), row) for row in close.keys() | worded.keys()))
    return [Candidate(row, -below, close.get(row), worded.get(row)) for below, row in ranked]


def create_tier(
    folder: Where, manifest: Manifest, fill: Callable[[LanceStore], None] = lambda store: None
) -> LongTermTier:
    """Make the tables of a new collection, and then the manifest that says it exists.

    Args:
        folder: where it is to lie.
        manifest: what it is made with.
        fill: writes what is to be in the tables from the first.

    Raises:
        CorruptError: the folder holds data but no manifest.
    """
    place = place_of(folder)
    if place.stamp("manifest.json"):
        return LongTermTier(folder)
    if any(place.files("tables")):
        if _has_rows(place, manifest.dimension):
            raise CorruptError(
                f"{folder} holds data but no manifest.json, so nothing is written over it; "
                f"restore the manifest or move the folder away"
            )
        place.clear("tables")  # a creation that was interrupted before its manifest: nothing was stored yet
    fill(LanceStore(folder / "tables", manifest.dimension, create=True))
    _write_manifest(place, manifest)
    return LongTermTier(folder)


def _write_manifest(place: Place, manifest: Manifest) -> None:
    found = asdict(replace(manifest, format=FORMAT))
    place.write_json("manifest.json", {**found, "digest": digest(found)})


def migrate(folder: Where) -> int:
    """Bring a collection that the caller has locked to the present format; give the format it had.

    A run that is killed is done again from the start. Format 1 -> 2: document rows get checksums, all files are listed
    with theirs, and the manifest gets its own.
    """
    manifest = read_manifest(folder)
    if manifest.format < FORMAT:
        LanceStore(folder / "tables", manifest.dimension).sum_documents()
        _write_manifest(place_of(folder), manifest)
    return manifest.format


def _has_rows(place: Place, dimension: int) -> bool:
    try:
        return LanceStore(place.where / "tables", dimension).count_chunks() > 0
    except CorruptError:
        return any("/data/" in path and path.endswith(".lance") for path, _ in place.files("tables"))


def read_manifest(folder: Where) -> Manifest:
    """Read and check the manifest of a collection.

    Raises:
        CollectionNotFound: there is none.
        CorruptError: it cannot be read.
        IncompatibleError: it was written by a newer version.
    """
    try:
        found = json.loads(place_of(folder).read("manifest.json"))
        if int(found["format"]) > FORMAT:
            raise IncompatibleError(
                f"collection {folder.name!r} has format {found['format']}; this version reads up to {FORMAT}. "
                f"Upgrade l2m-rag"
            )
        told = found.pop("digest", None)
        if told != (None if found["format"] == 1 else digest(found)):
            raise ValueError("it has been altered")
        return Manifest(**found)
    except FileNotFoundError:
        raise CollectionNotFound(
            f"there is no collection {folder.name!r}; make it with: l2m ingest PATH -c {folder.name}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / 'manifest.json'} cannot be read ({error}); restore it from an export") from error
