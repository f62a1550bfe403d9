"""The dense search against brute force, and its cache on disk against everything that can be wrong with it."""

import json
import logging
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers import hot_index, nearest
from l2m_rag.memory_tiers.hot_index import HotIndex, open_hot_index
from l2m_rag.memory_tiers.lance_store import LanceStore, RowIds, Vector, Vectors
from l2m_rag.memory_tiers.records import Chunk

DIMENSION = 16


def clustered(count: int, seed: int = 0) -> Vectors:
    """Give unit vectors around a few dozen centres, as embeddings of real texts lie."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(40, DIMENSION))
    made = centres[draw.integers(40, size=count)] + 0.5 * draw.normal(size=(count, DIMENSION))
    unit: Vectors = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return unit


def chunk(number: int) -> Chunk:
    return Chunk(f"{number:032x}", f"{number % 3}.txt", number, None, "", 0, 4, "text", {})


def add(store: LanceStore, vectors: Vectors, first: int = 0) -> None:
    store.add_chunks([chunk(first + row) for row in range(len(vectors))], vectors)


def brute_force(store: LanceStore, query: Vector, k: int, allowed: RowIds | None = None) -> list[int]:
    """Give the nearest rows by a product with the stored vectors, as fp16 has them; equals in order of their ids."""
    ids = store.row_ids() if allowed is None else allowed
    # one sum a row, in the precision that is promised: a rounded score calls equal what differs by 5e-8
    scores = np.einsum("ij,j->i", store.vectors(ids).astype(np.float16).astype(np.float32), query)
    return [int(ids[row]) for row in np.lexsort((ids, -scores))[:k]]


def found(index: HotIndex, query: Vector, k: int, allowed: RowIds | None = None) -> list[int]:
    ids, scores = index.search(query, k, allowed)
    assert (np.diff(scores) <= 0).all()
    assert len(set(ids.tolist())) == len(ids)
    return [int(identity) for identity in ids]


def recall(index: HotIndex, store: LanceStore, queries: Vectors, allowed: RowIds | None = None) -> float:
    common = [set(found(index, q, 10, allowed)) & set(brute_force(store, q, 10, allowed)) for q in queries]
    return sum(map(len, common)) / (10 * len(queries))


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    return LanceStore(tmp_path / "tables", DIMENSION, create=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "hot"


# -- the search


@settings(max_examples=10, deadline=None)
@given(count=st.integers(0, 300), k=st.integers(1, 400), seed=st.integers(0, 99), copies=st.booleans())
@example(count=299, k=63, seed=33, copies=False)  # the last two that come into question differ by 5e-8
def test_the_search_is_brute_force_below_the_threshold(
    tmp_path_factory: pytest.TempPathFactory, count: int, k: int, seed: int, copies: bool
) -> None:
    folder = tmp_path_factory.mktemp("hot")
    store = LanceStore(folder / "tables", DIMENSION, create=True)
    vectors = clustered(count, seed)
    if copies:
        vectors[count // 2 :] = vectors[: count - count // 2]
    add(store, vectors)
    index = open_hot_index(folder / "hot", store, "x")
    assert len(index) == count
    for query in clustered(3, seed + 1):
        assert found(index, query, k) == brute_force(store, query, k)


def test_scores_are_cosines(store: LanceStore, folder: Path) -> None:
    vectors = clustered(50)
    add(store, vectors)
    index = open_hot_index(folder, store, "x")
    ids, scores = index.search(vectors[7], 50)
    assert scores[0] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(scores, store.vectors(ids) @ vectors[7], atol=1e-3)
    np.testing.assert_array_equal(index.cosines(ids[::-1], vectors[7]), scores[::-1])
    assert np.isnan(index.cosines(np.array([10**9, -1]), vectors[7])).all()


def test_a_query_that_is_no_vector_is_refused(store: LanceStore, folder: Path) -> None:
    add(store, clustered(5))
    with pytest.raises(UsageError, match="not numbers"):
        open_hot_index(folder, store, "x").search(np.full(DIMENSION, np.nan, dtype=np.float32), 3)


def test_copies_come_in_order_of_their_rows_wherever_the_index_keeps_them(store: LanceStore, folder: Path) -> None:
    vectors = clustered(200)
    vectors[50:150] = vectors[50]
    add(store, vectors)
    open_hot_index(folder, store, "x")
    add(store, np.repeat(vectors[50:51], 30, axis=0), first=200)
    caught_up = open_hot_index(folder, store, "x")
    assert len(caught_up.rows.ids) < len(caught_up)
    shutil.rmtree(folder)
    rebuilt = open_hot_index(folder, store, "x")
    for query in (vectors[50], *clustered(5, seed=1)):
        nearer = int((vectors @ query > vectors[50] @ query + 1e-3).sum())
        for k in (1, nearer + 1, nearer + 30, nearer + 99, nearer + 129, 230):
            here = found(caught_up, query, k)
            assert here == found(rebuilt, query, k) == brute_force(store, query, k)


def test_above_the_threshold_recall_at_10_is_at_least_099(
    store: LanceStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 3000)
    add(store, clustered(6000))
    index = open_hot_index(folder, store, "x")
    assert not index.exact
    queries = clustered(25, seed=0)
    assert recall(index, store, queries) >= 0.99
    assert recall(open_hot_index(folder, store, "x"), store, queries) >= 0.99  # from the cache
    for share in (0.5, 0.05, 0.003):
        allowed = store.row_ids()[np.random.default_rng(1).random(6000) < share]
        assert recall(index, store, queries, allowed) >= 0.99


def test_above_the_threshold_a_filter_still_gives_k_rows(
    store: LanceStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 3000)
    vectors = clustered(6000)
    add(store, vectors)
    index = open_hot_index(folder, store, "x")
    ids, query = store.row_ids(), vectors[0]
    farthest = np.sort(ids[np.argsort(store.vectors(ids) @ query)[:3000]])  # half of all, and none of them near
    assert found(index, query, 10, farthest) == brute_force(store, query, 10, farthest)
    assert found(index, query, 5, farthest[:3]) == brute_force(store, query, 3, farthest[:3])
    assert found(index, query, 5, farthest[:0]) == []
    assert len(found(index, query, 5000)) == 5000
    assert len(found(index, query, 9999)) == 6000


@pytest.mark.parametrize("threshold", [nearest.EXACT_UP_TO, 500])
def test_what_was_written_is_found_and_what_was_deleted_is_not(
    store: LanceStore, folder: Path, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setattr(nearest, "EXACT_UP_TO", threshold)
    vectors = clustered(1200)
    add(store, vectors[:1000])
    open_hot_index(folder, store, "x")
    add(store, vectors[1000:1100], first=1000)
    store.delete_chunks([chunk(row).id for row in range(0, 1100, 7)])
    index = open_hot_index(folder, store, "x")
    assert (index.exact, len(index.rows.ids)) == (threshold > 1000, 1000)
    assert len(index) == store.count_chunks() == 1100 - 158
    odd = store.row_ids("ordinal % 2 = 1")
    for row in range(990, 1020):
        assert recall(index, store, vectors[row : row + 1]) >= 0.9
        gone = row % 7 == 0
        assert (found(index, vectors[row], 1) == brute_force(store, vectors[row], 1)) or gone
        assert (index.search(vectors[row], 1)[1][0] > 0.999) != gone
        assert set(found(index, vectors[row], 10, odd)) <= set(odd.tolist())
        assert len(found(index, vectors[row], 10, odd)) == 10
    np.testing.assert_array_equal(
        index.cosines(store.row_ids(), vectors[0]),
        open_hot_index(folder.with_name("fresh"), store, "x").cosines(store.row_ids(), vectors[0]),
    )


def test_a_row_with_a_new_embedding_is_found_where_it_is_now(store: LanceStore, folder: Path) -> None:
    vectors = clustered(100)
    add(store, vectors)
    open_hot_index(folder, store, "x")
    add(store, -vectors[:1])
    index = open_hot_index(folder, store, "x")
    assert found(index, -vectors[0], 5) == brute_force(store, -vectors[0], 5)
    assert found(index, vectors[0], 5) == brute_force(store, vectors[0], 5)


def test_rows_written_again_as_they_were_cost_no_new_index(store: LanceStore, folder: Path) -> None:
    vectors = clustered(100)
    add(store, vectors)
    open_hot_index(folder, store, "x")
    made = (folder / "cache.json").read_text()
    add(store, vectors[:50])
    assert found(open_hot_index(folder, store, "x"), vectors[3], 5) == brute_force(store, vectors[3], 5)
    assert (folder / "cache.json").read_text() == made


def test_too_many_changes_make_a_new_index(store: LanceStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_index, "_SPARE", 1000)
    vectors = clustered(2100)
    add(store, vectors[:1000])
    open_hot_index(folder, store, "x")
    add(store, vectors[1000:], first=1000)
    index = open_hot_index(folder, store, "x")
    assert len(index.rows.ids) == 2100
    assert found(index, vectors[2000], 5) == brute_force(store, vectors[2000], 5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 12), spare=st.sampled_from([20, 60, 1000]))
def test_whatever_changes_an_index_that_is_kept_up_finds_what_a_new_one_finds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, spare: int
) -> None:
    draw = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("hot")
    store = LanceStore(folder / "tables", DIMENSION, create=True)
    vectors = clustered(200, seed % 7)
    add(store, vectors[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_index, "_SPARE", spare)
        kept = open_hot_index(folder / "hot", store, "x")
        for _ in range(steps):
            assert kept is not None
            version = store.version
            some = np.sort(draw.choice(120, draw.integers(1, 25), replace=False))
            if draw.random() < 0.3:
                store.delete_chunks([chunk(int(row)).id for row in some])
            else:  # some as they were, some with another vector, some for the first time
                moved = draw.random(len(some)) < 0.5
                made = np.where(moved[:, None], vectors[draw.integers(0, 200, len(some))], vectors[some])
                store.add_chunks([chunk(int(row)) for row in some], made)
            before = kept
            now = found(before, vectors[0], 10)
            kept = hot_index.catch_up(kept, version, store) or open_hot_index(folder / "hot", store, "x")
            assert found(before, vectors[0], 10) == now  # who still holds the old one sees what was
            assert kept is not None  # a flat index takes in whatever comes
            assert len(kept) == store.count_chunks()
            where = store.row_ids("ordinal % 3 = 1")
            for query in vectors[draw.integers(0, 200, 3)]:
                assert found(kept, query, 12) == brute_force(store, query, 12)
                assert found(kept, query, 12, where) == brute_force(store, query, 12, where)
            np.testing.assert_array_equal(kept.holds(np.arange(150)), np.isin(np.arange(150), store.row_ids()))


# -- what finds candidates


@pytest.mark.parametrize("per_list", [1, 50, 1000])
@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 600), k=st.integers(1, 700), seed=st.integers(0, 99), share=st.sampled_from([None, 0.5, 0]))
def test_engines_that_look_at_every_row_give_the_best_among_their_candidates(
    per_list: int, count: int, k: int, seed: int, share: float | None
) -> None:
    vectors = clustered(count, seed).astype(np.float16)
    vectors[count // 2 :] = vectors[: count - count // 2]
    kept = None if share is None else np.random.default_rng(seed).random(count) < share
    there = np.arange(count) if kept is None else np.flatnonzero(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_PER_LIST", per_list)
        engines: list[nearest.Nearest] = [nearest.Flat(vectors), nearest.OnDevice(vectors, "cpu")]
    for query in clustered(3, seed + 1):
        scores = vectors[there].astype(np.float64) @ query.astype(np.float64)
        wanted = there[np.lexsort((there, -np.round(scores, 7)))[:k]]
        for engine in engines:
            rows = engine.candidates(query, k, kept)
            assert len(engine) == count
            assert set(wanted.tolist()) <= set(rows.tolist()) <= set(there.tolist())
            assert len(set(rows.tolist())) == len(rows)


@pytest.mark.gpu
def test_a_gpu_finds_what_brute_force_finds(store: LanceStore, folder: Path) -> None:
    add(store, clustered(5000))
    index = open_hot_index(folder, store, "x")
    assert isinstance(index.nearest, nearest.OnDevice)
    for query in clustered(20, seed=1):
        assert found(index, query, 10) == brute_force(store, query, 10)


# -- the cache


def check(store: LanceStore, folder: Path, *more: Vectors) -> None:
    """The index answers rightly, and the cache is one of the present version that the next opening takes as it is."""
    queries = np.concatenate([clustered(2, seed=3), *more])
    index = open_hot_index(folder, store, "x")
    for query in queries:
        assert found(index, query, 10) == brute_force(store, query, 10)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    open_hot_index(folder, store, "x")
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before


@pytest.mark.parametrize("threshold", [nearest.EXACT_UP_TO, 100])
def test_a_flipped_bit_or_a_cut_in_any_file_of_the_cache_is_noticed(
    store: LanceStore, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, threshold: int
) -> None:
    monkeypatch.setattr(nearest, "EXACT_UP_TO", threshold)
    monkeypatch.setattr(nearest, "PROBES", 10_000)  # every list: what is found is then what brute force finds
    add(store, clustered(200))
    open_hot_index(folder, store, "x")
    names = {path.name for path in folder.iterdir()}
    assert ("ivf.faiss" in names) == (threshold == 100)
    draw = np.random.default_rng(0)
    for name in sorted(names):
        size = (folder / name).stat().st_size
        flips = [(at, bit) for at, bit in zip(draw.integers(size, size=3), draw.integers(8, size=3), strict=True)]
        for at, bit in flips:
            content = bytearray((folder / name).read_bytes())
            content[int(at) % len(content)] ^= 1 << int(bit)
            (folder / name).write_bytes(content)
            caplog.clear()
            check(store, folder)
            assert "is built again" in caplog.text, (name, at, bit)
        for cut in (0, size // 2, size - 1):
            (folder / name).write_bytes((folder / name).read_bytes()[:cut])
            caplog.clear()
            check(store, folder)
            assert "is built again" in caplog.text, (name, cut)
        (folder / name).unlink()
        check(store, folder)


def test_a_cache_that_claims_another_version_is_noticed(store: LanceStore, folder: Path) -> None:
    add(store, clustered(200))
    open_hot_index(folder, store, "x")
    add(store, clustered(100, seed=3), first=200)
    key = (folder / "cache.json").read_text()
    version = json.loads(key)["version"]
    (folder / "cache.json").write_text(key.replace(f'"version": {version}', f'"version": {store.version}'))
    check(store, folder)


def test_another_embedder_makes_a_new_index(store: LanceStore, folder: Path) -> None:
    add(store, clustered(20))
    open_hot_index(folder, store, "x")
    open_hot_index(folder, store, "y")
    assert json.loads((folder / "cache.json").read_text())["embedder"] == "y"


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_a_cache_of_a_history_that_was_lost_is_not_trusted(
    tmp_path: Path, store: LanceStore, folder: Path, caplog: pytest.LogCaptureFixture, commits: int
) -> None:
    """After a power cut the version numbers, and the row ids, of what was lost are given out again."""
    add(store, clustered(50, seed=10))
    add(store, clustered(20, seed=11), first=100)
    open_hot_index(folder, store, "x")
    min((tmp_path / "tables" / "chunks.lance" / "_versions").glob("*.manifest")).write_bytes(b"")
    store = LanceStore(tmp_path / "tables", DIMENSION)
    new = [clustered(20, seed=12 + number) for number in range(commits)]
    for number, vectors in enumerate(new):
        add(store, vectors, first=200 + 100 * number)
    if commits == 3:
        store._chunks.optimize(cleanup_older_than=timedelta(milliseconds=1))  # forgets the versions in between
    check(store, folder, *new)
    assert "built again" not in caplog.text


def test_tables_that_went_back_make_a_new_index(tmp_path: Path, store: LanceStore, folder: Path) -> None:
    add(store, clustered(50))
    shutil.copytree(tmp_path / "tables", tmp_path / "backup")
    add(store, clustered(20, seed=1), first=50)
    open_hot_index(folder, store, "x")
    shutil.rmtree(tmp_path / "tables")
    (tmp_path / "backup").rename(tmp_path / "tables")
    check(LanceStore(tmp_path / "tables", DIMENSION), folder)


@pytest.mark.parametrize("obstacle", ["a file in place of the folder", "a file in place of its parent"])
def test_a_folder_that_cannot_be_written_leaves_a_search_without_cache(
    store: LanceStore, tmp_path: Path, obstacle: str
) -> None:
    add(store, clustered(50))
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    folder = blocked if "parent" not in obstacle else blocked / "hot"
    for query in clustered(3, seed=2):
        assert found(open_hot_index(folder, store, "x"), query, 10) == brute_force(store, query, 10)
    if "parent" in obstacle:
        assert blocked.read_text() == "in the way"


def test_what_a_killed_save_has_left_is_swept_away(store: LanceStore, folder: Path) -> None:
    add(store, clustered(50))
    old, new = folder.parent / ".hot-killed", folder.parent / ".hot-busy"
    for left in (old, new):
        left.mkdir()
        (left / "vectors.f16").write_bytes(bytes(1000))
    os.utime(old, (0, time.time() - 2 * hot_index.ABANDONED))
    check(store, folder)
    assert (old.exists(), new.exists()) == (False, True)
    assert {path.name for path in folder.parent.iterdir()} == {"hot", "tables", ".hot-busy"}


def test_nothing_is_said_of_a_cache_that_is_not_there_yet(
    store: LanceStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(store, clustered(20))
    with caplog.at_level(logging.INFO):
        check(store, folder)
    assert caplog.text == ""
