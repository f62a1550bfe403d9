"""The tables: what is written comes back, once, and damage is noticed."""

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l2m_rag.config
from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.memory_tiers.lance_store import LanceStore, Vectors
from l2m_rag.memory_tiers.records import Chunk, DocumentRow, Scalar

ROOT = Path(l2m_rag.config.__file__).parents[1]
DIMENSION = 8
NASTY = [
    "it's; DROP TABLE chunks --",
    'say "no"',
    "line\nbreak\r\ttab",
    "nul\0inside",
    "\u202eright to left\u202c",
    "e\u0301 and \u00e9",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ufffe",
    "漢字カタカナ",
    "%_\\ [x] {y} $1",
    "x" * 255,
    " leading and trailing ",
    "",
]


def chunk(number: int, text: str = "", document: str = "a.txt", **metadata: Scalar) -> Chunk:
    text = text or f"Text number {number} speaks of sheep."
    return Chunk(f"{number:032x}", document, number, None, "Head", 10 * number, 10 * number + len(text), text, metadata)


def row(identity: str, **values: Any) -> DocumentRow:
    plain = DocumentRow(identity, "/" + identity, "/", identity, "text/plain", "0" * 64, 1, 2, 0, 1, "1:8:0", 0.5)
    return replace(plain, **values)


def vectors(count: int, seed: int = 0) -> Vectors:
    drawn = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    unit: Vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def chunks_in(store: LanceStore) -> dict[str, Chunk]:
    return {found.id: found for found in store.fetch(store.row_ids().tolist())}


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    return LanceStore(tmp_path / "tables", DIMENSION, create=True)


@pytest.fixture(scope="module")
def sheep(tmp_path_factory: pytest.TempPathFactory) -> LanceStore:
    """Ten chunks with metadata of several types; nobody writes to it."""
    store = LanceStore(tmp_path_factory.mktemp("sheep") / "tables", DIMENSION, create=True)
    facts: list[dict[str, Scalar]] = [
        {"author": "O'Brien", "year": 2000 + i, "score": i / 2, "draft": i % 2 == 0, "über": "ja"} for i in range(8)
    ]
    facts += [{"author": 'Ada "the Countess"', "year": "unknown", "draft": "perhaps"}, {}]
    names = ["it's.txt" if i < 2 else "reports/b.pdf" for i in range(10)]
    chunks = [
        replace(chunk(i, document=name), page=i or None, metadata=fact)
        for i, (name, fact) in enumerate(zip(names, facts, strict=True))
    ]
    store.add_chunks(chunks, vectors(10))
    return store


# -- writing and reading


def test_the_same_chunks_twice_are_there_once(store: LanceStore) -> None:
    chunks, made = [chunk(i) for i in range(20)], vectors(20)
    store.add_chunks(chunks, made)
    store.add_chunks(chunks[5:], made[5:])
    store.add_chunks([chunks[0], chunks[1], chunks[0]], made[[0, 1, 0]])
    assert store.count_chunks() == 20
    assert chunks_in(store) == {found.id: found for found in chunks}


def test_a_chunk_with_a_known_id_takes_its_new_place_in_the_document(store: LanceStore) -> None:
    store.add_chunks([chunk(1)], vectors(1))
    store.add_chunks([replace(chunk(1), ordinal=7)], vectors(1))
    assert [found.ordinal for found in chunks_in(store).values()] == [7]


RACER = """
import sys, time
from pathlib import Path
import numpy as np
from l2m_rag.memory_tiers.lance_store import LanceStore
from l2m_rag.memory_tiers.records import Chunk

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = LanceStore(folder / "tables", 8)
made = np.ones((200, 8), dtype=np.float32)
for race in range(5):
    chunks = [Chunk(f"{race:016x}{i:016x}", "a.txt", i, None, "", 0, 4, "text", {}) for i in range(200)]
    (folder / f"{me}{race}").touch()
    while not (folder / f"{other}{race}").exists():
        time.sleep(0.0005)
    store.refresh()
    store.add_chunks(chunks, made)
"""


def test_two_processes_that_add_the_same_chunks_leave_no_duplicates(store: LanceStore, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    racers = [subprocess.Popen([*command, *names], env=environment) for names in ("ab", "ba")]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0]
    store.refresh()
    assert store.count_chunks() == 5 * 200
    assert len(chunks_in(store)) == 5 * 200


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
scalar = st.one_of(text, st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
documents = st.lists(
    st.tuples(text, text, st.dictionaries(text, st.one_of(scalar, st.none()), max_size=3)), min_size=1, max_size=20
)


@settings(max_examples=15, deadline=None)
@given(documents)
def test_any_text_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, dict[str, Scalar]]]
) -> None:
    store = LanceStore(tmp_path_factory.mktemp("any") / "tables", DIMENSION, create=True)
    chunks = [replace(chunk(i, document=name), text=body, metadata=facts) for i, (name, body, facts) in enumerate(rows)]
    store.add_chunks(chunks, vectors(len(chunks)))
    assert chunks_in(store) == {found.id: found for found in chunks}
    assert store.damaged() == []


def test_nasty_names_name_their_own_chunks_and_no_others(store: LanceStore) -> None:
    chunks = [chunk(i, name, name, key=name) for i, name in enumerate(NASTY)]
    store.add_chunks(chunks, vectors(len(NASTY)))
    rows = [row(name, title=name, error=name, uri=f"/x/{name}") for name in NASTY]
    store.put_documents(rows)
    assert store.documents() == {found.id: found for found in rows}
    assert store.chunks_per_document() == dict.fromkeys(NASTY, 1)
    for found in chunks:
        assert store.chunk_ids([found.document]) == [found.id]
        assert list(store.embeddings(found.document)) == [found.text]
        assert store.chunks_of(found.document) == [found]
    store.remove_documents(NASTY[:2])
    assert store.documents().keys() == set(NASTY[2:])
    assert chunks_in(store) == {found.id: found for found in chunks[2:]}


def test_numbers_that_json_does_not_know_become_none(store: LanceStore) -> None:
    store.add_chunks([chunk(1, a=float("nan"), b=float("-inf"), c=10**400, d=1.5)], vectors(1))
    assert [found.metadata for found in chunks_in(store).values()] == [{"a": None, "b": None, "c": None, "d": 1.5}]
    assert store.damaged() == []


def test_a_document_row_is_replaced_by_id(store: LanceStore) -> None:
    store.put_documents([row("a"), row("b")])
    store.put_documents([row("a", chunks=5, error="corrupt: x")])
    assert store.documents() == {"a": row("a", chunks=5, error="corrupt: x"), "b": row("b")}
    store.put_documents([])
    store.remove_documents([])
    assert len(store.documents()) == 2


def test_thousands_of_documents_are_removed_at_once(store: LanceStore) -> None:
    names = [f"document '{i}'" for i in range(1100)]
    store.add_chunks([chunk(i, document=name) for i, name in enumerate(names)], vectors(1100))
    store.put_documents([row(name) for name in names])
    store.remove_documents(names[1:])
    assert list(store.documents()) == list(store.chunks_per_document()) == names[:1]


def test_stale_chunks_are_those_not_kept_of_the_named_documents(store: LanceStore) -> None:
    store.add_chunks([chunk(i, document="abc"[i % 3]) for i in range(9)], vectors(9))
    kept = {"a": {chunk(0).id, chunk(3).id}, "b": {chunk(1).id, chunk(4).id, chunk(7).id}}
    assert store.drop_stale_chunks(kept) == 1
    assert sorted(found.ordinal for found in chunks_in(store).values()) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert store.drop_stale_chunks({}) == 0


def test_rows_come_in_the_order_asked_for(store: LanceStore) -> None:
    made = vectors(30)
    store.add_chunks([chunk(i) for i in range(30)], made)
    by_ordinal = {found.ordinal: identity for identity in store.row_ids().tolist() for found in store.fetch([identity])}
    asked = [7, 29, 0, 7, 12]
    ids = np.array([by_ordinal[number] for number in asked], dtype=np.int64)
    np.testing.assert_array_equal(store.vectors(ids), made[asked])
    assert [found.ordinal for found in store.fetch(ids.tolist())] == asked
    assert [found.ordinal for found in store.fetch([*ids[:2].tolist(), 1 << 40])] == asked[:2]
    gathered = {
        identity: vector
        for ids, batch in store.all_vectors()
        for identity, vector in zip(ids.tolist(), batch, strict=True)
    }
    np.testing.assert_array_equal(np.stack([gathered[by_ordinal[i]] for i in range(30)]), made)


def test_row_ids_survive_an_update_and_an_optimize(store: LanceStore) -> None:
    for start in range(0, 40, 10):
        store.add_chunks([chunk(i) for i in range(start, start + 10)], vectors(10, start))
    before, version = store.row_ids(), store.version
    store.add_chunks([replace(chunk(3), ordinal=99)], vectors(1))
    store.optimize()
    np.testing.assert_array_equal(store.row_ids(), before)
    assert [found.ordinal for found in store.fetch(store.changed_since(version)[0].tolist())] == [99]


# -- filters


@pytest.mark.parametrize(
    ("where", "ordinals"),
    [
        ("document = 'it''s.txt'", [0, 1]),
        ("document LIKE 'reports/%' AND page >= 7", [7, 8, 9]),
        ("page IS NULL", [0]),
        ("text LIKE '%number 3 %' OR start = 40", [3, 4]),
        ("metadata.author = 'O''Brien' AND page < 3", [1, 2]),
        ("metadata.author = 'Ada \"the Countess\"'", [8]),
        ("metadata.author LIKE 'O''B%' AND metadata.year < 2002", [0, 1]),
        ("metadata.author NOT LIKE 'O%'", [8]),
        ("metadata.author ILIKE 'o_b%' AND page = 1", [1]),
        ("metadata.author IS NULL", [9]),
        ("metadata.year = 2003", [3]),
        ("metadata.year = '2003'", [3]),
        ("metadata.year>=2006", [6, 7]),
        ("metadata.year != 2000 AND metadata.year <> 2001 AND page < 4", [2, 3]),
        ("metadata.year IN (2001, 2002)", [1, 2]),
        ("metadata.year NOT IN (2000,2001,2002,2003)", [4, 5, 6, 7]),
        ("metadata.year BETWEEN 2002 AND 2003", [2, 3]),
        ("metadata.year = 2.003e3", [3]),
        ("metadata.score > -1 AND metadata.score <= .5", [0, 1]),
        ("metadata.year > 2006", [7]),  # "unknown" is no number, and no error
        ("metadata.draft = true", [0, 2, 4, 6]),
        ("metadata.draft != TRUE", [1, 3, 5, 7]),
        ("metadata.draft IS NOT TRUE", [1, 3, 5, 7, 8, 9]),
        ("metadata.draft AND page > 3", [4, 6]),
        ("NOT metadata.draft", [1, 3, 5, 7]),
        ("(metadata.draft OR metadata.year = 2001) AND page < 3", [1, 2]),
        ("metadata.über = 'ja' AND page = 5", [5]),
        ("METADATA.year = 2003", [3]),
        ("text = 'metadata.year = 2003'", []),
        ("document = 'it''s metadata.draft' OR page = 2", [2]),
        ("metadata.author = 'x'' OR ''1''=''1'", []),
        ("metadata.nothing = 'x'", []),
    ],
)
def test_a_filter_looks_into_columns_and_metadata(sheep: LanceStore, where: str, ordinals: list[int]) -> None:
    assert sorted(found.ordinal for found in sheep.fetch(sheep.row_ids(where).tolist())) == ordinals
    ids, _ = sheep.full_text("sheep", 20, where)
    assert sorted(found.ordinal for found in sheep.fetch(ids.tolist())) == ordinals


@pytest.mark.parametrize(
    "where",
    [
        "'",
        "nonsense",
        "document =",
        "document = 'a",
        "1",
        "page = 'three' AND",
        "document; DROP TABLE chunks",
        "document IN (SELECT id FROM chunks)",
        "nosuch(document)",
        "1/0 = 1",
        "embedding = 1",
        "metadata = 1",
        "metadata.",
        "metadata.a.b = 1",
        "\0",
        "document = '\udcff'",
        "document\n=\n",
        "(" * 300,
        "x" * 5000,
    ],
)
def test_a_filter_that_cannot_be_used_is_one_line(sheep: LanceStore, where: str) -> None:
    for search in (lambda: sheep.row_ids(where), lambda: sheep.full_text("sheep", 5, where)):
        with pytest.raises(UsageError, match=r"^--where .* cannot be used: ") as raised:
            search()
        assert "\n" not in str(raised.value)
    assert sheep.count_chunks() == 10


# -- text search


@pytest.mark.parametrize(
    "text",
    [
        'C++ ("x',
        "?!... --",
        "the and of",
        "AND OR NOT",
        "NEAR(x, y)",
        "x* ^y ~z",
        "",
        " ",
        "\0",
        "\udcff",
        "\U0001f389",
        "漢字",
        "\u202e" * 9,
        "word " * 200_000,
        "x" * 1_000_000,
        '"sheep',
    ],
)
def test_no_words_make_the_text_search_fail(sheep: LanceStore, text: str) -> None:
    ids, scores = sheep.full_text(text, 5)
    assert len(ids) == len(scores) <= 5
    assert len(ids) == (5 if "sheep" in text else 0)


def test_the_text_search_finds_words_written_a_moment_ago(store: LanceStore) -> None:
    assert len(store.full_text("zebra", 5)[0]) == 0
    store.add_chunks([chunk(1, "A zebra runs."), chunk(2, "A lion sleeps.")], vectors(2))
    for _ in range(2):
        assert [found.ordinal for found in store.fetch(store.full_text("zebras", 5)[0].tolist())] == [1]
        store.index_text(unindexed=0)
    store.rebuild_text_index()
    assert [found.ordinal for found in store.fetch(store.full_text("zebra", 5)[0].tolist())] == [1]


# -- damage


def test_a_row_that_was_altered_is_found(store: LanceStore) -> None:
    altered = {
        "text": "Text number 1 speaks of goats.",
        "document": "b.txt",
        "ordinal": 5,
        "page": 1,
        "heading": "Hoad",
        "start": 11,
        "end": 12,
        "metadata": '{"a": 2}',
        "embedding": [1.0] + [0.0] * 7,
        "crc": 1,
    }
    store.add_chunks([chunk(i, a=1) for i in range(5)], vectors(5))
    tables = store.to_arrow()
    at = tables["chunks"]["id"].to_pylist().index(chunk(1).id)
    sound = tables["chunks"].slice(at, 1)
    for column, value in altered.items():
        kind = sound.schema.field(column).type
        values = pa.array([value], getattr(kind, "storage_type", kind)).cast(kind)
        store.add_arrow(tables["documents"], sound.set_column(sound.schema.names.index(column), column, values))
        assert store.count_chunks() == 5
        assert store.damaged() == [chunk(1).id], column
        document = str(value) if column == "document" else chunk(1).document
        reads: list[Callable[[], object]] = [
            partial(store.fetch, store.row_ids().tolist()),
            partial(store.chunks_named, [chunk(i).id for i in range(5)]),
            partial(store.chunks_of, document),
        ]
        for read in reads:
            with pytest.raises(CorruptError, match=f"{chunk(1).id} has been altered.*collections repair"):
                read()
        store.add_arrow(tables["documents"], sound)
        assert store.damaged() == []


def test_no_flipped_bit_goes_unnoticed(store: LanceStore, tmp_path: Path) -> None:
    store.add_chunks([chunk(i, f"Text {i} " + "ü" * (i % 4), page=i) for i in range(100)], vectors(100))
    store.put_documents([row("a.txt")])
    whole = chunks_in(store)
    (written,) = (tmp_path / "tables" / "chunks.lance" / "data").iterdir()
    content = written.read_bytes()
    draw = random.Random(0)
    for number in range(50):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "tables", copy)
        (copy / written.relative_to(tmp_path / "tables")).write_bytes(flipped)
        damaged = LanceStore(copy, DIMENSION)
        try:
            assert damaged.damaged() or chunks_in(damaged) == whole
        except CorruptError:
            continue


@pytest.mark.parametrize("harm", ["cut short", "removed"])
def test_an_unreadable_file_is_not_blamed_on_the_filter(store: LanceStore, tmp_path: Path, harm: str) -> None:
    store.add_chunks([chunk(i) for i in range(50)], vectors(50))
    (written,) = (tmp_path / "tables" / "chunks.lance" / "data").iterdir()
    if harm == "removed":
        written.unlink()
    else:
        written.write_bytes(written.read_bytes()[:-100])
    fresh = LanceStore(tmp_path / "tables", DIMENSION)
    reads: list[Callable[[], object]] = [
        fresh.row_ids,
        fresh.damaged,
        fresh.chunks_per_document,
        lambda: fresh.row_ids("page > 1"),
        lambda: fresh.full_text("sheep", 5, "page > 1"),
        lambda: list(fresh.all_vectors()),
        lambda: fresh.fetch([1]),
        lambda: fresh.vectors(np.array([1])),
    ]
    for read in reads:
        with pytest.raises(CorruptError, match=r"cannot be read .* repair") as raised:
            read()
        assert "\n" not in str(raised.value)


def test_tables_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="cannot be opened"):
        LanceStore(tmp_path / "tables", DIMENSION)


def manifests(folder: Path, table: str) -> list[Path]:
    """Give the manifests of a table, the newest first."""
    return sorted((folder / f"{table}.lance" / "_versions").glob("*.manifest"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [empty, halve, blank])
@pytest.mark.parametrize("commits", [1, 2])
def test_a_newest_manifest_without_content_costs_its_commit_only(
    store: LanceStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any, commits: int
) -> None:
    folder = tmp_path / "tables"
    for number in range(4):
        store.add_chunks([chunk(number)], vectors(1, number))
    for path in manifests(folder, "chunks")[:commits]:
        harm(path)
    with caplog.at_level(logging.WARNING):
        healed = LanceStore(folder, DIMENSION)
    assert f"its last {commits} commits are lost" in caplog.text
    assert sorted(found.ordinal for found in chunks_in(healed).values()) == list(range(4 - commits))
    assert len(list((folder / "chunks.lance" / "_versions").glob("*.damaged"))) == commits
    healed.add_chunks([chunk(i) for i in range(4)], vectors(4))
    healed.optimize()
    assert healed.commits_lost == commits
    caplog.clear()
    again = LanceStore(folder, DIMENSION)
    assert (again.count_chunks(), again.damaged(), caplog.text) == (4, [], "")


def test_the_table_of_documents_is_healed_too(store: LanceStore, tmp_path: Path) -> None:
    store.put_documents([row("a")])
    store.put_documents([row("b")])
    empty(manifests(tmp_path / "tables", "documents")[0])
    assert list(LanceStore(tmp_path / "tables", DIMENSION).documents()) == ["a"]


def test_nothing_is_set_aside_when_no_manifest_is_whole(store: LanceStore, tmp_path: Path) -> None:
    before = manifests(tmp_path / "tables", "chunks")
    for path in before:
        empty(path)
    with pytest.raises(CorruptError, match="cannot be opened"):
        LanceStore(tmp_path / "tables", DIMENSION)
    assert manifests(tmp_path / "tables", "chunks") == before


def test_a_version_that_comes_back_has_another_stamp(store: LanceStore, tmp_path: Path) -> None:
    store.add_chunks([chunk(1)], vectors(1))
    version, stamp = store.version, store.stamp(store.version)
    assert stamp == LanceStore(tmp_path / "tables", DIMENSION).stamp(version)
    empty(manifests(tmp_path / "tables", "chunks")[0])
    healed = LanceStore(tmp_path / "tables", DIMENSION)
    healed.add_chunks([chunk(2)], vectors(1))
    assert healed.version == version
    assert healed.stamp(version) not in (stamp, None)
    assert healed.stamp(version + 1) is None


def test_a_commit_is_over_when_its_files_are_on_the_disk(
    store: LanceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)

    def changed(work: Any, *args: Sequence[Any]) -> set[str]:
        before = {str(path) for path in tmp_path.rglob("*")}
        synced.clear()
        work(*args)
        return {str(path) for path in tmp_path.rglob("*") if path.is_file()} - before

    writes: list[tuple[Any, ...]] = [
        (store.add_chunks, [chunk(i) for i in range(5)], vectors(5)),
        (store.put_documents, [row("a.txt")]),
        (store.delete_chunks, [chunk(1).id]),
        (store.optimize,),
        (store.remove_documents, ["a.txt"]),
    ]
    for work, *args in writes:
        new = changed(work, *args)
        assert new, work
        assert new <= synced
        assert {os.path.dirname(path) for path in new} <= synced
