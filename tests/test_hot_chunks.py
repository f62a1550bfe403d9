"""Chunks from the hot cache against those of the table: the same, also after rows were written again or removed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_rag.memory_tiers.hot_chunks import HotChunks, write_chunks
from l2m_rag.memory_tiers.hot_index import open_hot_index
from l2m_rag.memory_tiers.lance_store import LanceStore, Vectors
from l2m_rag.memory_tiers.long_term import LongTermTier, Manifest, create_tier
from l2m_rag.memory_tiers.records import Chunk

DIMENSION = 8


def made(number: int, text: str = "a text") -> Chunk:
    return Chunk(f"{number:032x}", "a.txt", number, number or None, "heading", 0, len(text), text, {"author": "Ada"})


def unit(count: int, seed: int = 0) -> Vectors:
    drawn = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    vectors: Vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return vectors


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    return LanceStore(tmp_path / "tables", DIMENSION, create=True)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=12))
def test_what_is_kept_is_what_was_stored(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = LanceStore(folder / "tables", DIMENSION, create=True)
    for number, text in enumerate(texts):  # a batch of its own for each
        store.add_chunks([made(number, text)], unit(1, number))
    write_chunks(folder / "chunks.arrow", store)
    with (folder / "chunks.arrow").open("rb") as stream:
        chunks = HotChunks(stream)
    rows = store.row_ids().tolist()
    assert len(chunks) == len(texts)
    assert list(chunks.fetch(rows[::-1]).values()) == store.fetch(rows[::-1])
    assert chunks.fetch([1 << 40, -1]) == {}


def test_a_row_that_was_written_again_comes_from_the_table(store: LanceStore, tmp_path: Path) -> None:
    vectors = unit(30)
    store.add_chunks([made(number) for number in range(30)], vectors)
    open_hot_index(tmp_path / "hot", store, "e")
    store.add_chunks([replace(made(3), heading="another")], vectors[3:4])
    for _ in range(2):  # the same from the cache as it was kept
        index = open_hot_index(tmp_path / "hot", store, "e")
        assert index.chunks is not None
        found = index.chunks.fetch(store.row_ids().tolist())
        assert len(found) == 29
        assert {chunk.heading for chunk in found.values()} == {"heading"}


def test_a_search_takes_chunks_from_the_cache_and_the_rest_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = create_tier(tmp_path, Manifest(embedder="e", fingerprint="e", dimension=DIMENSION, created_at=0.0))
    vectors = unit(40)
    tier.store.add_chunks([made(number) for number in range(40)], vectors)
    tier.hot_index()
    tier.store.add_chunks([made(number, "late") for number in (7, 40)], unit(41)[[7, 40]])
    asked: list[int] = []
    fetch = LanceStore.fetch

    def noted(self: LanceStore, rows: list[int]) -> list[Chunk]:
        asked.extend(rows)
        return fetch(self, rows)

    monkeypatch.setattr(LanceStore, "fetch", noted)
    again = LongTermTier(tmp_path)
    found = again.search("late text", unit(41)[40], 41)
    assert len(asked) == 2
    assert sorted(passage.chunk.ordinal for passage in found) == list(range(41))
    assert {passage.chunk.ordinal for passage in found if passage.chunk.text == "late"} == {7, 40}


def test_a_folder_that_cannot_be_written_leaves_the_table(tmp_path: Path, store: LanceStore) -> None:
    store.add_chunks([made(0)], unit(1))
    (tmp_path / "file").write_text("in the way")
    assert open_hot_index(tmp_path / "file" / "hot", store, "e").chunks is None
