"""The long-term tier beside the libraries that it stands on, on the same vectors and in the same run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import pyarrow as pa

from l2m_rag.bench import Told, made_texts, made_vectors, query_vectors, take_turns, timed
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers import nearest
from l2m_rag.memory_tiers.disk import fsync
from l2m_rag.memory_tiers.hot_index import HotIndex, Rows, no_rows
from l2m_rag.memory_tiers.lance_store import RowIds, Vectors, connect
from l2m_rag.memory_tiers.long_term import Manifest, create_tier
from l2m_rag.memory_tiers.records import Chunk
from l2m_rag.memory_tiers.state_table import StateFormat, StateRows
from l2m_rag.memory_tiers.states import StateTier

faiss: Any = _faiss  # its stubs lack the keyword arguments of its search parameters

ROWS = (10_000, 50_000, 500_000)
DIMENSION = 384
K = 10
_LANCE_QUESTIONS = 20  # its own search takes up to seconds
_STATES = 1000
_RECALL = 0.99
_GROWTH = 1000  # rows of a commit


def tier(
    rows: Sequence[int] = ROWS,
    *,
    questions: int = 400,
    commits: int = 20,
    told: Told = lambda text: None,
) -> dict[str, Any]:
    """Measure dense search, the fetching of states, how soon a write is found, and commits.

    Each is given as the median in milliseconds, ours and that of the raw library, which take turns question by
    question: FAISS fp16 flat for searches over all rows; above `nearest.EXACT_UP_TO` rows FAISS IVF,SQ8, the index
    that ours uses, with as many lists as find 99 %; LanceDB for states and commits. Vectors are made, see
    `bench.made_vectors`.

    Args:
        rows: of each search.
        questions: to each.
        commits: of 1,000 rows.
        told: called with what is being done.
    """
    if not rows or min(rows) < 1000:
        raise UsageError(f"--rows ({', '.join(map(str, rows))}) must be at least 1,000 each")
    told("reading memory")
    bandwidth = _bandwidth()
    found: dict[str, Any] = {"threads": faiss.omp_get_max_threads(), "memory_gb_per_s": round(bandwidth, 1)}
    with tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch:
        for count in rows:
            name = f"{'exact' if count <= nearest.EXACT_UP_TO else 'ivf'}_{count // 1000}k"
            found[name] = _search(count, questions, bandwidth, Path(scratch) / name, told)
        told("fetching states")
        found["state_fetch"] = _states(Path(scratch), questions)
        told("committing")
        found |= _writes(Path(scratch), commits)
    return found


def _bandwidth() -> float:
    """Give how fast memory is read on all threads, in GB/s: the best of some products of vectors with themselves."""
    threads = faiss.omp_get_max_threads()
    parts = np.ones((threads, 1 << 25), np.float32)  # 128 MiB each
    with ThreadPoolExecutor(threads) as pool:

        def read() -> float:
            began = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            return parts.nbytes / (time.perf_counter() - began) / 1e9

        return max(read() for _ in range(10))


def _search(count: int, questions: int, bandwidth: float, folder: Path, told: Told) -> dict[str, float | None]:
    told(f"making {count:,} vectors")
    vectors = made_vectors(count, DIMENSION)
    queries = query_vectors(count, questions, DIMENSION)
    truth = [set(np.argpartition(vectors @ query, -K)[-K:].tolist()) for query in queries]
    halves = vectors.astype(np.float16)
    told(f"indexing {count:,} vectors")
    began = time.perf_counter()
    engine = nearest.engine(halves)
    built = time.perf_counter() - began
    alive = np.ones(count, dtype=np.bool_)
    hot = HotIndex(Rows(np.arange(count), halves, alive), no_rows(DIMENSION), engine)
    lists = None
    if isinstance(engine, nearest.Lists):
        raw = faiss.clone_index(engine.index)
        raw.parallel_mode = 0  # as it comes: one thread a query
        lists = _lists_for(raw, queries, truth)
        how = faiss.SearchParametersIVF(nprobe=lists)
    else:
        raw, how = faiss.IndexScalarQuantizer(DIMENSION, nearest.HALF, faiss.METRIC_INNER_PRODUCT), None
        raw.add(vectors)
    told(f"searching {count:,} vectors")
    answers: dict[str, list[RowIds]] = {"ours": [], "raw": []}
    times = take_turns(
        {
            "ours": lambda query: answers["ours"].append(hot.search(query, K)[0]),
            "raw": lambda query: answers["raw"].append(raw.search(query[None], K, params=how)[1][0]),
        },
        ((query,) for query in queries),
    )
    recall = {name: _share_found(found, truth) for name, found in answers.items()}
    told(f"searching {count:,} vectors with LanceDB")
    lance_ms, lance_recall = _lance(folder, vectors, queries[:_LANCE_QUESTIONS], truth, indexed=not hot.exact)
    ours, theirs = times["ours"], times["raw"]
    return {
        **_beside(ours, theirs, recall["ours"]),
        "raw_recall": recall["raw"],
        "raw_lists": lists,
        "p99_ms": round(float(np.percentile(ours, 99)), 3),
        "raw_p99_ms": round(float(np.percentile(theirs, 99)), 3),
        "lancedb_ms": round(lance_ms, 3),
        "lancedb_recall": lance_recall,
        "lancedb_to_ours": round(lance_ms / statistics.median(ours), 1),
        "bandwidth_share": round(halves.nbytes / statistics.median(ours) / 1e6 / bandwidth, 2) if hot.exact else None,
        "build_s": round(built, 1),
    }


def _lists_for(index: Any, queries: Vectors, truth: Sequence[set[int]]) -> int:
    """Give into how many lists raw FAISS must look to find 99 % of the nearest; at least as many as we do."""
    for lists in range(nearest.PROBES, 4 * nearest.PROBES + 1, 8):
        _, found = index.search(queries, K, params=faiss.SearchParametersIVF(nprobe=lists))
        if _share_found(found, truth) >= _RECALL:
            break
    return lists


def _share_found(answers: Sequence[RowIds], truth: Sequence[set[int]]) -> float:
    return round(sum(len(set(a.tolist()) & t) for a, t in zip(answers, truth, strict=False)) / (K * len(answers)), 4)


def _lance(
    folder: Path, vectors: Vectors, queries: Vectors, truth: Sequence[set[int]], *, indexed: bool
) -> tuple[float, float]:
    """Give the median time of LanceDB's own search, and its recall: by brute force, or by its index IVF_SQ."""
    from lancedb.index import IvfSq

    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMENSION)
    rows = pa.table({"row": np.arange(len(vectors)), "embedding": flat})
    table = connect(folder).create_table("raw", rows)
    if indexed:
        table.create_index("embedding", config=IvfSq(distance_type="dot"))
    times, answers = [], []
    for query in [queries[0], *queries]:
        began = time.perf_counter()
        search = table.search(query).distance_type("dot").select(["row", "_distance"]).limit(K)
        found = (search.nprobes(16).refine_factor(4) if indexed else search).to_arrow()
        times.append((time.perf_counter() - began) * 1000)
        answers.append(found["row"].to_numpy())
    return statistics.median(times[1:]), _share_found(answers[1:], truth)


# -- states ------------------------------------------------------------------------------------------------------------
def _states(scratch: Path, questions: int) -> dict[str, float | None]:
    """Fetch ten states of 256 tokens: at 4:1 in int8 out of the hot set and from disk, at 1:1 in fp16 when hot."""
    shared = {"key_dim": 192, "dim": 576, "backbone": "bench", "depth": 10, "key_version": "bench"}
    pooled = StateFormat(vectors=64, ratio=4, dtype="int8", **shared)  # type: ignore[arg-type]
    whole = StateFormat(vectors=256, ratio=1, dtype="float16", **shared)  # type: ignore[arg-type]
    draw = np.random.default_rng(0)
    asked = [draw.choice(_STATES, K, replace=False).astype(np.int64) for _ in range(questions)]
    with StateTier(pooled, scratch / "states") as writer:
        writer.add(_made_states(pooled, _STATES))
    with (
        closing(StateTier(pooled, scratch / "states", hot_bytes=1 << 30)) as warm,
        closing(StateTier(pooled, scratch / "states", hot_bytes=0)) as cold,
        closing(StateTier(whole)) as hot,
    ):
        hot.add(_made_states(whole, 100))
        warm.fetch(np.arange(_STATES))
        table = connect(scratch / "states").open_table("states")
        columns = ["row", "key", "values", "scales", "tokens"]
        numbers = table.search().select(["row"]).with_row_id(True).limit(None).to_arrow()
        lance_rows = dict(zip(numbers["row"].to_pylist(), numbers["_rowid"].to_pylist(), strict=True))
        times = take_turns(
            {
                "warm": warm.fetch,
                "cold": cold.fetch,
                "hot": lambda rows: hot.fetch(rows % 100),
                "raw": lambda rows: (
                    table.take_row_ids([lance_rows[row] for row in rows.tolist()]).select(columns).to_arrow()
                ),
            },
            ((rows,) for rows in asked),
        )
    return {
        **_beside(times["warm"], times["raw"], None),
        "cold_ms": round(statistics.median(times["cold"]), 3),
        "cold_to_raw": round(statistics.median(times["cold"]) / statistics.median(times["raw"]), 2),
        "hot_1_to_1_ms": round(statistics.median(times["hot"]), 3),
    }


def _made_states(form: StateFormat, count: int) -> StateRows:
    draw = np.random.default_rng(1)
    keys = draw.standard_normal((count, form.key_dim))
    shape = (count, form.vectors, form.dim)
    return StateRows(
        streams=("bench",) * count,
        steps=np.arange(count),
        positions=np.arange(count) * 256,
        lengths=np.full(count, 256, np.int32),
        keys=(keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16),
        values=draw.integers(-127, 128, shape, dtype=np.int8)
        if form.dtype == "int8"
        else draw.standard_normal(shape, dtype=np.float32).astype(np.float16),
        scales=np.ones((count, form.vectors), np.float32),
        tokens=(),
    )


# -- writes ------------------------------------------------------------------------------------------------------------
def _writes(scratch: Path, commits: int) -> dict[str, dict[str, float | None]]:
    """Commit 1,000 rows again and again, beside LanceDB and its fsyncs, and look for one of them at once.

    `visible` is how long the hot index needs for one more row, beside a raw FAISS index, and the first search behind a
    commit beside a later one.
    """
    made = Manifest(embedder="bench", fingerprint="bench", dimension=DIMENSION, created_at=time.time())
    ours = create_tier(scratch / "tier", made)
    vectors = made_vectors((commits + 11) * _GROWTH, DIMENSION)
    texts = made_texts(_GROWTH)
    parts = [vectors[start : start + _GROWTH] for start in range(0, len(vectors), _GROWTH)]
    for number in range(10):  # so that there is something to search
        ours.add(_chunks(number, texts), parts[number])
    ours.hot_index()
    raw = faiss.IndexScalarQuantizer(DIMENSION, nearest.HALF, faiss.METRIC_INNER_PRODUCT)
    raw.add(np.concatenate(parts[:10]))
    folder = scratch / "raw"
    schema = ours.store.to_arrow()["chunks"].schema
    table = connect(folder).create_table("raw", _as_arrow(schema, parts[0][:0], []))
    times: dict[str, list[float]] = {}
    for number in range(10, 11 + commits):
        chunks, new = _chunks(number, texts), parts[number]
        rows = _as_arrow(schema, new, chunks)
        seen = set(_files(folder))

        def write_raw(rows: pa.Table = rows) -> None:
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)

        def sync(seen: set[Path] = seen) -> None:
            fresh = [path for path in _files(folder) if path not in seen]
            for path in [*fresh, *{path.parent for path in fresh}]:
                fsync(path)

        def look(new: Vectors = new) -> None:
            ours.hot_index().search(new[0], K)

        ways: dict[str, Callable[[], object]] = {
            "ours": partial(ours.add, chunks, new),
            "first": look,
            "later": look,
            "lancedb": write_raw,
            "fsync": sync,
            "added": partial(raw.add, new[-1:]),
        }
        for name, way in ways.items():
            times.setdefault(name, []).append(timed(way))
        row = np.array([1 << 40])  # that no table has
        times.setdefault("visible", []).append(timed(partial(ours.hot_index().changed, row, new[-1:])))
        best = ours.search("", new[0], 1, mode="dense")[0]
        if best.chunk.id != chunks[0].id:
            raise AssertionError("what was added is not found")
    warm = {name: spent[1:] for name, spent in times.items()}
    both = [a + b for a, b in zip(warm["lancedb"], warm["fsync"], strict=True)]
    lance, synced = (statistics.median(warm[name]) for name in ("lancedb", "fsync"))
    return {
        "visible": {
            **_beside(warm["visible"], warm["added"], None),
            "first_search_ms": round(statistics.median(warm["first"]), 3),
            "later_search_ms": round(statistics.median(warm["later"]), 3),
        },
        "commit": {
            **_beside(warm["ours"], both, None),
            "lancedb_ms": round(lance, 3),
            "fsync_ms": round(synced, 3),
            "to_allowed": round(statistics.median(warm["ours"]) / (2 * lance + synced), 2),
        },
    }


def _chunks(number: int, texts: Sequence[str]) -> list[Chunk]:
    return [
        Chunk(f"{number * _GROWTH + at:032x}", f"{number}.txt", at, None, "", 0, len(text), text)
        for at, text in enumerate(texts)
    ]


def _as_arrow(schema: pa.Schema, vectors: Vectors, chunks: Sequence[Chunk]) -> pa.Table:
    """Give the rows as LanceDB takes them, with the columns that ours have."""
    flat = np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1)
    columns = {
        name: pa.array([getattr(chunk, name, None) for chunk in chunks], schema.field(name).type)
        for name in ("id", "document", "ordinal", "page", "heading", "start", "end", "text")
    }
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), DIMENSION)
    fields = [schema.field(name) for name in (*columns, "embedding")]
    return pa.table({**columns, "embedding": embedding}, schema=pa.schema(fields))


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _beside(ours: Sequence[float], raw: Sequence[float], recall: float | None) -> dict[str, float | None]:
    mine, theirs = statistics.median(ours), statistics.median(raw)
    return {"ours_ms": round(mine, 3), "raw_ms": round(theirs, 3), "ratio": round(mine / theirs, 2), "recall": recall}
