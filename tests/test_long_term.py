"""Search over the tier: its modes, its bounds, and that it always gives the same answer to the same question."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import l2m_rag.config
from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.indexers.chunking import chunk_id
from l2m_rag.memory_tiers.lance_store import LanceStore
from l2m_rag.memory_tiers.long_term import Fusion, LongTermTier, Manifest, Mode, create_tier
from l2m_rag.memory_tiers.records import Chunk, Passage

ROOT = Path(l2m_rag.config.__file__).parents[1]
MODES: tuple[Mode, ...] = ("hybrid", "dense", "text")
TEXTS = [
    "The lease of the red house ends on 30 April 2029.",
    "A tenant pays the rent on the first of each month.",
    "The landlord repairs the roof, the windows and the heating.",
    "Either side gives notice three months ahead, in writing.",
    "The deposit is paid back within thirty days.",
    "Dogs are allowed in the garden, cats everywhere.",
    "The garden is mown by the tenant, twice in summer.",
    "Nothing in this contract is about sheep.",
]


def fill(tier: LongTermTier, embedder: Any, texts: list[str], *documents: str) -> None:
    chunks = [
        Chunk(chunk_id(name, 100 * i, text), name, i, 1 + i, "", 100 * i, 100 * i + len(text), text, {"n": i})
        for name in documents or ("lease.txt",)
        for i, text in enumerate(texts)
    ]
    tier.store.add_chunks(chunks, embedder.encode([chunk.text for chunk in chunks]))


def find(tier: LongTermTier, embedder: Any, text: str, k: int = 5, **options: Any) -> list[Passage]:
    return tier.search(text, embedder.encode([text])[0], k, **options)


@pytest.fixture
def tier(tmp_path: Path, hashing: Any) -> LongTermTier:
    manifest = Manifest(embedder="hashing", fingerprint="x", dimension=hashing.dimension, created_at=time.time())
    return create_tier(tmp_path / "collection", manifest)


@pytest.fixture
def lease(tier: LongTermTier, hashing: Any) -> LongTermTier:
    fill(tier, hashing, TEXTS)
    return tier


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_finds_a_text_by_itself(lease: LongTermTier, hashing: Any, mode: Mode) -> None:
    for text in TEXTS:
        passages = find(lease, hashing, text, mode=mode)
        assert passages[0].chunk.text == text
        assert sorted(-passage.score for passage in passages) == [-passage.score for passage in passages]
        assert max(Counter(passage.chunk.id for passage in passages).values()) == 1


def test_words_are_found_that_the_vector_does_not_tell(lease: LongTermTier, hashing: Any) -> None:
    vector = hashing.encode([TEXTS[0]])[0]
    assert lease.search("sheep", vector, 3, mode="dense")[0].chunk.text == TEXTS[0]
    assert [passage.chunk.text for passage in lease.search("sheep", vector, 3, mode="text")] == [TEXTS[7]]
    found = {passage.chunk.text: passage for passage in lease.search("sheep", vector, 8)}
    assert found.keys() == set(TEXTS)
    assert found[TEXTS[7]].lexical is not None
    assert found[TEXTS[0]].dense == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fusion", ["scores", "rrf"])
def test_no_more_than_k_passages_come(lease: LongTermTier, hashing: Any, mode: Mode, fusion: Fusion) -> None:
    for k in (1, 3, 8, 9, 5000):
        passages = find(lease, hashing, "the tenant and the garden", k, mode=mode, fusion=fusion)
        assert len(passages) == min(k, 3 if mode == "text" else 8)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": -1}, {"mode": "semantic"}, {"where": "nonsense"}])
def test_a_search_that_makes_no_sense_is_refused(lease: LongTermTier, hashing: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="|".join(map(str, options.values()))):
        find(lease, hashing, "rent", **options)


@pytest.mark.parametrize("mode", MODES)
def test_a_filter_holds_in_every_mode(lease: LongTermTier, hashing: Any, mode: Mode) -> None:
    fill(lease, hashing, TEXTS, "it's.txt")
    passages = find(lease, hashing, TEXTS[6], mode=mode, where="document = 'it''s.txt' AND metadata.n >= 5")
    assert passages[0].chunk.text == TEXTS[6]
    assert len(passages) == (2 if mode == "text" else 3)
    assert all(passage.chunk.document == "it's.txt" and passage.chunk.ordinal >= 5 for passage in passages)
    assert find(lease, hashing, "rent", mode=mode, where="document = 'none.txt'") == []


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_told_apart_by_nothing_but_their_rows(tier: LongTermTier, hashing: Any, mode: Mode) -> None:
    names = [f"{number}.txt" for number in range(30)]
    fill(tier, hashing, TEXTS[:2], *names[:25])
    fill(tier, hashing, TEXTS[:2], *names[25:])
    first = find(tier, hashing, TEXTS[1], 25, mode=mode)
    tier.store.optimize()
    fresh = LongTermTier(tier.folder)
    for again in (tier, fresh, LongTermTier(tier.folder)):
        assert find(again, hashing, TEXTS[1], 25, mode=mode) == first
    if mode == "dense":
        assert {passage.chunk.document for passage in first} == set(names[:25])


def test_no_question_makes_a_search_fail(lease: LongTermTier, hashing: Any) -> None:
    for text in ("?!...", "\U0001f389", "the and of", "", "\udcff", 'C++ ("x', "x " * 5000):
        for mode in MODES:
            assert len(find(lease, hashing, text, 4, mode=mode)) == (0 if mode == "text" else 4)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_collection_gives_nothing(tier: LongTermTier, hashing: Any, mode: Mode) -> None:
    assert find(tier, hashing, "rent", mode=mode) == []


WRITER = """
import sys
from pathlib import Path
import numpy as np
from l2m_rag.memory_tiers.long_term import LongTermTier
from l2m_rag.memory_tiers.places import writing
from l2m_rag.memory_tiers.records import Chunk

folder = Path(sys.argv[1])
with writing(folder):
    tier = LongTermTier(folder)
    tier.store.remove_documents(["lease.txt"])
    text = "A zebra crosses the garden."
    vector = np.load(folder.parent / "vector.npy")
    tier.store.add_chunks([Chunk("f" * 32, "zoo.txt", 0, None, "", 0, len(text), text, {})], vector)
"""


def test_a_commit_of_another_process_is_seen(lease: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    import numpy as np

    assert find(lease, hashing, "zebra", mode="text") == []
    text = "A zebra crosses the garden."
    np.save(tmp_path / "vector.npy", hashing.encode([text]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WRITER, str(lease.folder)], check=True, env=environment, timeout=60)
    for mode in MODES:
        assert [passage.chunk.text for passage in find(lease, hashing, "garden", mode=mode)] == [text]


def test_a_manifest_of_other_vectors_than_the_tables_is_an_error(lease: LongTermTier, hashing: Any) -> None:
    with pytest.raises(CorruptError, match=r"16-d .* hold 32-d"):
        LanceStore(lease.folder / "tables", 16)
