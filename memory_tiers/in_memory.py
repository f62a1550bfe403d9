"""The reference of the long-term tier: the same contract over Python lists and NumPy arrays, nothing on disk.

It is exact and slow, and short enough to be right by reading; the tests hold every other backend against it.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from l2m_rag.errors import IncompatibleError, UsageError
from l2m_rag.memory_tiers.lance_store import RowIds, Scores, Vector, Vectors, to_sql
from l2m_rag.memory_tiers.long_term import CANDIDATES, Fusion, Mode, check_query, checked, fuse
from l2m_rag.memory_tiers.records import Chunk, Passage
from l2m_rag.memory_tiers.state_table import StateFormat
from l2m_rag.memory_tiers.states import HOT_BYTES, StateTier
from l2m_rag.memory_tiers.usage import DiskPolicy

_K1, _B = 1.2, 0.75  # of BM25, as Lance has them
_WORD = re.compile(r"\w+")
_COLUMNS = ("id", "document", "ordinal", "page", "heading", "start", "end", "text", "metadata")
_TRY_CAST = re.compile(r"TRY_CAST\((json_get_string\(metadata, '\w+'\)) AS (DOUBLE|BOOLEAN)\)")


class InMemoryTier:
    """Chunks in memory. Words are compared as they are, in small letters: no stems, and none is left out.

    Args:
        dimension: of the embeddings.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.version = 1
        self._rows: dict[str, int] = {}  # row of each id; numbers ever grow
        self._chunks: dict[int, Chunk] = {}
        self._vectors: dict[int, Vector] = {}
        self._next = 0
        self._states: dict[str, StateTier] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Insert chunks, or replace those whose id is there; see `Tier.add`."""
        vectors = checked(chunks, vectors, self.dimension)
        for chunk, vector in zip(chunks, vectors, strict=True):
            if chunk.id not in self._rows:
                self._rows[chunk.id] = self._next
                self._next += 1
            self._chunks[self._rows[chunk.id]] = chunk
            self._vectors[self._rows[chunk.id]] = vector
        self.version += bool(len(chunks))

    def evict(self, ids: Sequence[str]) -> int:
        """Delete chunks by id; give how many there were."""
        gone = [self._rows.pop(one) for one in dict.fromkeys(ids) if one in self._rows]
        for row in gone:
            del self._chunks[row], self._vectors[row]
        self.version += bool(gone)
        return len(gone)

    def fetch(self, ids: Sequence[str]) -> list[Chunk]:
        """Give the chunks of those ids that are there, in the order asked for."""
        return [self._chunks[self._rows[one]] for one in ids if one in self._rows]

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
        """Give the k best passages, best first; see `Tier.search`."""
        check_query(vector, k, mode, self.dimension)
        kept = self._kept(where)
        depth = max(k, CANDIDATES) if mode == "hybrid" else k
        cosines = np.array([np.nan if vector is None else self._cosine(row, vector) for row in kept], np.float32)
        worded = self._bm25(text, kept)
        dense = _best(kept, cosines, depth) if mode != "text" and vector is not None else _best([], cosines[:0], 0)
        lexical = _best(kept, worded, depth, above=0.0) if mode != "dense" else _best([], worded[:0], 0)
        at = {row: number for number, row in enumerate(kept)}
        beside = np.array([cosines[at[int(row)]] for row in lexical[0]], np.float32)
        return [
            Passage(self._chunks[one.row], one.score, one.dense, one.lexical)
            for one in fuse(dense, lexical, beside, fusion, k)
        ]

    def verify(self) -> list[str]:
        """Give nothing: what lies in memory is not checked."""
        return []

    def repair(self) -> list[str]:
        """Do nothing."""
        return []

    def compact(self) -> None:
        """Do nothing."""

    def states(
        self,
        form: StateFormat,
        *,
        namespace: str = "default",
        hot_bytes: int = HOT_BYTES,
        disk_bytes: int | None = None,
        policy: DiskPolicy = "lru",
    ) -> StateTier:
        """Give the states of a namespace; see `Tier.states`."""
        tier = self._states.get(namespace)
        if tier is None:
            tier = self._states[namespace] = StateTier(
                form, namespace=namespace, hot_bytes=hot_bytes, disk_bytes=disk_bytes, policy=policy
            )
        if tier.form != form:
            raise IncompatibleError(f"the states of {namespace!r} were made with {tier.form}; this run has {form}")
        return tier

    def _cosine(self, row: int, vector: Vector) -> float:
        half = self._vectors[row].astype(np.float16).astype(np.float32)  # as the hot index keeps it
        return float(np.einsum("i,i->", half, vector.astype(np.float32)))

    def _bm25(self, text: str, kept: list[int]) -> Scores:
        """Score rows by the words of a text (Robertson and Zaragoza, 2009, equation 3.15)."""
        told = {row: Counter(_WORD.findall(chunk.text.lower())) for row, chunk in self._chunks.items()}
        mean = sum(each.total() for each in told.values()) / max(1, len(told))
        scores = np.zeros(len(kept), np.float32)
        for word in set(_WORD.findall(text.lower())):
            holding = sum(1 for each in told.values() if word in each)
            rarity = math.log(1 + (len(told) - holding + 0.5) / (holding + 0.5))
            for at, row in enumerate(kept):
                often = told[row][word]
                length = told[row].total() / (mean or 1)
                scores[at] += rarity * often * (_K1 + 1) / (often + _K1 * (1 - _B + _B * length))
        return scores

    def _kept(self, where: str | None) -> list[int]:
        """Give the rows that a filter keeps, ascending, as SQLite sees them."""
        rows = sorted(self._chunks)
        if not where:
            return rows
        condition = _TRY_CAST.sub(r"try_\2(\1)", to_sql(where))
        with closing(sqlite3.connect(":memory:")) as database:
            database.create_function("json_get_string", 2, _looked_up, deterministic=True)
            database.create_function("try_DOUBLE", 1, _number, deterministic=True)
            database.create_function("try_BOOLEAN", 1, {"true": 1, "false": 0}.get, deterministic=True)
            database.execute("PRAGMA case_sensitive_like = ON")
            names = ", ".join(f'"{name}"' for name in _COLUMNS)
            database.execute(f"CREATE TABLE chunks (row, {names})")
            for row in rows:
                told = [getattr(self._chunks[row], name) for name in _COLUMNS[:-1]]
                told.append(json.dumps(self._chunks[row].metadata))
                database.execute(f"INSERT INTO chunks VALUES (?{', ?' * len(_COLUMNS)})", [row, *told])
            try:
                found = database.execute(f"SELECT row FROM chunks WHERE {condition} ORDER BY row").fetchall()
            except sqlite3.Error as error:
                raise UsageError(f"--where {where!r} cannot be used: {error}") from error
        return [row for (row,) in found]


def _looked_up(metadata: str, key: str) -> str | None:
    value = json.loads(metadata).get(key)
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _best(rows: list[int], scores: Scores, k: int, above: float = -math.inf) -> tuple[RowIds, Scores]:
    """Give the k best rows and their scores, best first, equals by row."""
    ids = np.array(rows, np.int64)
    order = np.lexsort((ids, -scores))[:k]
    order = order[scores[order] > above]
    return ids[order], scores[order]
