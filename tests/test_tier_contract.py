"""One contract for every backend of the long-term tier, and each held equal to the in-memory reference."""

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2m_rag.errors import DiskFullError, IncompatibleError, L2MError, ReadOnlyError, UsageError
from l2m_rag.memory_tiers.in_memory import InMemoryTier
from l2m_rag.memory_tiers.long_term import Fusion, LongTermTier, Manifest, Mode, Tier, create_tier
from l2m_rag.memory_tiers.places import writing
from l2m_rag.memory_tiers.records import Chunk
from l2m_rag.memory_tiers.state_table import StateFormat, StateRows
from l2m_rag.memory_tiers.usage import DiskPolicy

DIMENSION = 16
FORM = StateFormat(key_dim=8, dim=6, vectors=3, ratio=4, dtype="int8", backbone="b", depth=3, key_version="k")
WORDS = ["lease", "rent", "house", "garden", "tree", "river", "stone", "paper", "engine", "mirror", "kettle"]
"""A stemmer may shorten them, but each to a stem of its own."""


def on_disk(folder: Path) -> Tier:
    made = Manifest(embedder="none", fingerprint="x", dimension=DIMENSION, created_at=time.time())
    return create_tier(folder / "collection", made)


BACKENDS: dict[str, Callable[[Path], Tier]] = {"lance": on_disk, "memory": lambda folder: InMemoryTier(DIMENSION)}


@pytest.fixture(params=BACKENDS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return BACKENDS[request.param](tmp_path)


def chunk(number: int, text: str = "", **facts: Any) -> Chunk:
    text = text or f"{WORDS[number % len(WORDS)]} {WORDS[number // 3 % len(WORDS)]}"
    return Chunk(f"{number:032d}", f"d{number % 3}.txt", number, 1 + number, "", 0, len(text), text, facts)


def vectors(count: int, seed: int = 0) -> Any:
    made = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def filled(tier: Tier, count: int = 12) -> Any:
    made = vectors(count)
    tier.add([chunk(number, n=number, odd=bool(number % 2), name=f"'{number}'") for number in range(count)], made)
    return made


def ids(found: Sequence[Any]) -> list[int]:
    return [int(one.chunk.id) for one in found]


def test_what_is_added_is_found_at_once_and_what_is_evicted_never(tier: Tier) -> None:
    made = filled(tier)
    for number, vector in enumerate(made):
        assert ids(tier.search("", vector, 1)) == [number]
    before = tier.version
    assert tier.evict([chunk(3).id, chunk(5).id, chunk(3).id, "no such id"]) == 2
    assert tier.version > before
    assert len(tier) == 10
    for mode in ("dense", "hybrid", "text"):
        assert not {3, 5} & set(ids(tier.search(chunk(3).text, made[3], 12, mode=mode)))
    assert tier.evict([chunk(3).id]) == 0
    tier.compact()
    assert len(tier.search("", made[0], 100, mode="dense")) == 10


def test_a_chunk_of_the_same_id_takes_the_place_of_the_old_one(tier: Tier) -> None:
    made = filled(tier)
    other = replace(chunk(4), text="kettle", heading="new")
    tier.add([other], -made[4:5])
    assert len(tier) == 12
    assert tier.fetch([other.id]) == [other]
    assert ids(tier.search("", -made[4], 1)) == [4]
    assert tier.search("", made[4], 12, mode="dense")[-1].chunk == other


def test_chunks_are_fetched_in_the_order_asked_for(tier: Tier) -> None:
    filled(tier)
    wanted = [chunk(number, n=number, odd=bool(number % 2), name=f"'{number}'") for number in (7, 2, 9)]
    assert tier.fetch([wanted[0].id, "none", wanted[1].id, wanted[2].id]) == wanted
    assert tier.fetch([]) == []


def test_vectors_are_brought_to_unit_length(tier: Tier) -> None:
    made = vectors(3)
    tier.add([chunk(number) for number in range(3)], made * np.array([[0.1], [1], [50]], np.float32))
    for number in range(3):
        best = tier.search("", made[number], 1)[0]
        assert int(best.chunk.id) == number
        assert best.dense == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("page <= 4", {0, 1, 2, 3}),
        ("document = 'd1.txt' AND ordinal > 4", {7, 10}),
        ("metadata.n >= 9", {9, 10, 11}),
        ("metadata.odd = true AND metadata.n < 5", {1, 3}),
        ("metadata.name = '''7'''", {7}),
        ("metadata.n = 'text'", set()),
        ("text LIKE 'lease%'", {0, 11}),
        ("page > 100", set()),
    ],
)
def test_a_filter_keeps_what_fits(tier: Tier, where: str, kept: set[int]) -> None:
    made = filled(tier)
    for mode in ("dense", "hybrid"):
        assert set(ids(tier.search("lease rent", made[0], 12, mode=mode, where=where))) == kept
    assert set(ids(tier.search(" ".join(WORDS), None, 12, mode="text", where=where))) == kept


@pytest.mark.parametrize(
    "where",
    ["page >", "nonsense = 1", "1 = 1; DROP TABLE chunks", "1 = 1) OR (1 = 1", "page = 1 UNION SELECT id FROM chunks",
     "page = (SELECT", "page = 1 page = 2", "page = 1 2", "page = 1 LIMIT 0", "page = 1, page = 2", "page = 1;",
     "page = 1 -- x", "page = 1 /* ( */ ) OR (1 = 1", "$$($$ = 'x') OR (1 = 1", "`(` = 1) OR (1 = 1", " ",
     "document = E'\\') OR (1 = 1) OR (document = ''", "drop_table('chunks')"],
)  # fmt: skip
def test_a_filter_that_is_none_is_an_error_and_does_nothing(tier: Tier, where: str) -> None:
    made = filled(tier)
    version = tier.version
    with pytest.raises(UsageError, match="cannot be used"):
        tier.search("lease", made[0], 3, where=where)
    assert (len(tier), tier.version) == (12, version)


@pytest.mark.parametrize(
    ("chunks", "made", "told"),
    [
        ([chunk(90)], np.ones((1, DIMENSION + 1)), "shape"),
        ([chunk(90)], np.ones((2, DIMENSION)), "shape"),
        ([chunk(90)], np.ones(DIMENSION), "shape"),
        ([chunk(90), chunk(91)], np.stack([np.ones(DIMENSION), np.zeros(DIMENSION)]), "zero"),
        ([chunk(90), chunk(91)], np.stack([np.ones(DIMENSION), np.full(DIMENSION, np.nan)]), "not numbers"),
        ([chunk(90)], np.full((1, DIMENSION), np.inf), "not numbers"),
        ([chunk(90), chunk(91), chunk(90)], np.ones((3, DIMENSION)), "more than once"),
    ],
)
def test_a_batch_that_cannot_be_stored_leaves_everything_as_it_was(
    tier: Tier, chunks: list[Chunk], made: Any, told: str
) -> None:
    filled(tier)
    version = tier.version
    with pytest.raises(UsageError, match=told):
        tier.add(chunks, made.astype(np.float32))
    assert (len(tier), tier.version) == (12, version)
    assert tier.verify() == [] or all("expected" in line for line in tier.verify())  # no documents were told of


@pytest.mark.parametrize(
    ("vector", "k", "mode", "told"),
    [
        (np.ones(DIMENSION + 1), 3, "dense", "shape"),
        (np.full(DIMENSION, np.nan), 3, "hybrid", "not numbers"),
        (np.full(DIMENSION, -np.inf), 3, "dense", "not numbers"),
        (np.ones(DIMENSION), 0, "dense", "k"),
        (np.ones(DIMENSION), 3, "sideways", "mode"),
    ],
)
def test_a_search_that_cannot_be_made_is_an_error(tier: Tier, vector: Any, k: int, mode: Any, told: str) -> None:
    filled(tier)
    with pytest.raises(UsageError, match=told):
        tier.search("lease", vector.astype(np.float32), k, mode=mode)


def test_the_states_of_a_tier_are_searched_by_key(tier: Tier) -> None:
    keys = np.eye(4, FORM.key_dim, dtype=np.float16)
    made = StateRows(
        streams=("a", "a", "b", "b"),
        steps=np.arange(4),
        positions=np.array([0, 10, 0, 10]),
        lengths=np.full(4, 10, np.int32),
        keys=keys,
        values=np.arange(4 * 18, dtype=np.int8).reshape(4, 3, 6),
        scales=np.ones((4, 3), np.float32),
        tokens=(),
    )
    with tier.states(FORM, namespace="ada") as states:
        rows = states.add(made)
        found, scores = states.search(keys[3:].astype(np.float32), ["b"], np.array([100]), 2)
        assert (found.tolist(), scores.tolist()) == ([[rows[3], rows[2]]], [[1, 0]])
        assert states.fetch(rows[1:2]).values.tolist() == made.values[1:2].tolist()
    assert len(tier.states(FORM, namespace="ada")) == 4
    assert len(tier.states(FORM, namespace="bob")) == 0
    with pytest.raises(IncompatibleError, match="this run has"):
        tier.states(replace(FORM, depth=4), namespace="ada")
    tier.compact()
    assert tier.verify() == []


@pytest.mark.parametrize(("policy", "left"), [("lru", [2]), ("learned", [1])])
def test_states_go_by_the_policy_that_is_asked_for(tier: Tier, policy: DiskPolicy, left: list[int]) -> None:
    made = StateRows(
        streams=("a",) * 3,
        steps=np.arange(3),
        positions=np.arange(3) * 10,
        lengths=np.full(3, 10, np.int32),
        keys=np.eye(3, FORM.key_dim, dtype=np.float16),
        values=np.zeros((3, 3, 6), np.int8),
        scales=np.ones((3, 3), np.float32),
        tokens=(),
    )
    room = 2 * FORM.row_bytes
    with tier.states(FORM, disk_bytes=room + FORM.row_bytes // 2, policy=policy, hot_bytes=0) as states:
        rows = states.add(made.take([0, 1]), np.array([0.1, 0.9], np.float32))
        states.fetch(rows[:1])
        rows = np.concatenate([rows, states.add(made.take([2]), np.array([0.5], np.float32))])
        states.flush()
        assert states.hot_nbytes == 0
        there = states.search(np.ones((1, FORM.key_dim), np.float32), ["a"], np.array([100]), 3)[0]
        assert states.displaced == 3 - len(left)
        assert sorted(rows.tolist().index(row) for row in there[0] if row >= 0) == left


def test_an_empty_tier_finds_nothing(tier: Tier) -> None:
    tier.add([], np.empty((0, DIMENSION), np.float32))
    for mode in ("dense", "hybrid", "text"):
        assert tier.search("lease", vectors(1)[0], 5, mode=mode) == []
    assert tier.search("lease", vectors(1)[0], 5, where="page = 1") == []
    assert tier.fetch(["x"]) == []
    assert tier.evict(["x"]) == 0
    tier.compact()
    assert (len(tier), tier.verify()) == (0, [])


def test_more_than_there_is_gives_all_there_is(tier: Tier) -> None:
    made = filled(tier)
    assert sorted(ids(tier.search("", made[0], 10_000, mode="dense"))) == list(range(12))


def test_a_zero_vector_to_search_for_likes_all_the_same(tier: Tier) -> None:
    filled(tier)
    found = tier.search("", np.zeros(DIMENSION, np.float32), 3, mode="dense")
    assert [(int(one.chunk.id), one.dense) for one in found] == [(0, 0.0), (1, 0.0), (2, 0.0)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 8))
def test_whatever_is_done_the_tier_on_disk_finds_what_the_reference_finds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int
) -> None:
    draw = random.Random(seed)
    disk: Any = on_disk(tmp_path_factory.mktemp("tier"))
    reference = InMemoryTier(DIMENSION)
    numbers = range(30)
    for step in range(steps):
        some = draw.sample(numbers, draw.randint(1, 12))
        if draw.random() < 0.7:
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in some]
            batch = [chunk(number, text, n=number) for number, text in zip(some, texts, strict=True)]
            made = vectors(len(some), draw.randrange(3))  # few of them, so that some are equal
            for each in (disk, reference):
                each.add(batch, made)
        else:
            gone = [chunk(number).id for number in some]
            assert disk.evict(gone) == reference.evict(gone)
        if draw.random() < 0.3:
            disk.compact()
        where = draw.choice([None, "page > 10", "metadata.n < 20"])
        _same(disk, reference, "", vectors(1, step)[0], "dense", where)
    disk.compact()  # which also counts the words of what was written last
    for mode in ("text", "hybrid"):
        for fusion in ("scores", "rrf"):
            text = " ".join(draw.sample(WORDS, 3))
            _same(disk, reference, text, vectors(1, 9)[0], mode, draw.choice([None, "page > 10"]), fusion)
    everything = [chunk(number).id for number in numbers]
    assert disk.fetch(everything) == reference.fetch(everything)


def _same(
    one: Tier, other: Tier, text: str, vector: Any, mode: Mode, where: str | None, fusion: Fusion = "scores"
) -> None:
    found, expected = (each.search(text, vector, 10, mode=mode, where=where, fusion=fusion) for each in (one, other))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        # words that come equally often may differ in the last bit, and then change places
        assert a.score == pytest.approx(b.score, abs=2e-3 if fusion == "rrf" else 1e-4)
    if mode == "dense":
        assert ids(found) == ids(expected)


def test_deleted_words_are_not_found_after_their_rows_are_gone_from_the_files(tier: Tier) -> None:
    filled(tier)
    tier.evict([chunk(number).id for number in range(6)])
    tier.compact()
    tier.add([chunk(20, "kettle")], vectors(1, 3))
    tier.evict([chunk(number).id for number in range(6, 9)])
    for store in [tier.store] if isinstance(tier, LongTermTier) else []:
        store.optimize()  # as an ingest does it, without the indexes made anew
    assert sorted(ids(tier.search(" ".join(WORDS), None, 20, mode="text"))) == [9, 10, 11, 20]
    assert len(tier.search(" ".join(WORDS), None, 2, mode="text")) == 2


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def all_of(tier: Tier) -> list[Chunk]:
    return tier.fetch([chunk(number).id for number in range(1000)])


def test_a_full_disk_is_an_error_and_what_is_stored_stays(small_disk: Path) -> None:
    tier = on_disk(small_disk)
    filled(tier)
    before = all_of(tier)
    filling = small_disk / "filling"
    with suppress(OSError), filling.open("wb") as stream:
        while True:
            stream.write(bytes(4096))
            stream.flush()
    many = [chunk(number) for number in range(100, 900)]
    for _ in range(2):
        with pytest.raises(DiskFullError, match="is full; nothing is lost"):
            tier.add(many, vectors(800))
        with pytest.raises(DiskFullError):
            tier.evict([chunk(3).id])
        with pytest.raises(DiskFullError), writing(small_disk / "collection"):
            pass
        assert all_of(tier) == before
    again = LongTermTier(small_disk / "collection")
    assert (all_of(again), again.verify()[:-3]) == (before, [])  # no documents were told of
    filling.unlink()
    with writing(small_disk / "collection"):
        again.add(many, vectors(800))
    assert len(all_of(again)) == 812


def test_a_disk_that_is_read_only_is_an_error_and_can_be_searched(small_disk: Path) -> None:
    made = filled(on_disk(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    tier = LongTermTier(small_disk / "collection")
    assert ids(tier.search("", made[5], 1)) == [5]
    for write in (
        partial(tier.add, [chunk(90)], vectors(1)),
        partial(tier.evict, [chunk(3).id]),
        tier.compact,
        tier.repair,
        partial(tier.states, FORM),
        writing(small_disk / "collection").__enter__,
    ):
        with pytest.raises(ReadOnlyError, match="cannot be written"):
            write()
    assert len(all_of(tier)) == 12


def test_every_error_is_one_that_is_meant_for_the_user(tier: Tier) -> None:
    with pytest.raises(L2MError):
        tier.search("x", vectors(1)[0], -1)
