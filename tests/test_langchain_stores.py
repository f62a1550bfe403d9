"""Bytes and records by key: the standard suites, the laws of the stores in memory, and runs of `index`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, RecordManager, index
from langchain_core.stores import BaseStore
from langchain_tests.integration_tests.base_store import BaseStoreAsyncTests, BaseStoreSyncTests

import l2m_rag
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import IncompatibleError, UsageError
from l2m_rag.langchain import L2MByteStore, L2MDocumentIndex, L2MRecordManager, L2MVectorStore
from l2m_rag.memory_tiers.texts import Text

VALUES = (b"", bytes(range(256)), b"ends in May")


@pytest.fixture
def made(tmp_path: Path, embedder: Path) -> Settings:
    return Settings(home=tmp_path / "home", embedder=str(embedder))


@pytest.fixture
def store(made: Settings) -> L2MByteStore:
    return L2MByteStore(settings=made)


# -- the standard suites -----------------------------------------------------------------------------------------------
class TestByteStore(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, store: L2MByteStore) -> BaseStore[str, bytes]:
        return store

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return VALUES


class TestAsyncByteStore(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self, store: L2MByteStore) -> BaseStore[str, bytes]:
        return store

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return VALUES


# -- bytes -------------------------------------------------------------------------------------------------------------
KEYS = st.text(min_size=1, max_size=8) | st.sampled_from(["a", "ab", "a'b", '"', "\\", "\x00", "\ud800", "%", "text:"])
STEPS = st.lists(
    st.tuples(st.just("set"), st.lists(st.tuples(KEYS, st.binary(max_size=20)), max_size=3))
    | st.tuples(st.just("delete"), st.lists(KEYS, max_size=2)),
    max_size=3,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, asked=st.lists(KEYS, max_size=3))
def test_it_does_as_a_dict(store: L2MByteStore, steps: list[tuple[str, list[Any]]], asked: list[str]) -> None:
    store.mdelete(list(store.yield_keys()))
    model: dict[str, bytes] = {}
    for step, what in steps:
        if step == "set":
            store.mset(what)
            model.update(what)
        else:
            store.mdelete(what)
            model = {key: value for key, value in model.items() if key not in what}
    asked += list(model)
    assert store.mget(asked) == [model.get(key) for key in asked]
    for prefix in (None, *(key[:1] for key in asked[:2])):
        kept = [key for key in model if key.startswith(prefix or "")]
        assert sorted(store.yield_keys(prefix=prefix)) == sorted(kept)


def test_bytes_are_there_for_the_next_program_and_cost_no_embedding(made: Settings, store: L2MByteStore) -> None:
    store.mset([("lease", b"first"), ("rent", VALUES[1]), ("lease", b"later")])
    no_model = Settings(home=made.home, embedder="/there/is/none")
    other = L2MByteStore(l2m_rag.open("bytes", settings=no_model))
    assert other.mget(["lease", "rent", "lease", "none"]) == [b"later", VALUES[1], b"later", None]
    other.mset([("lease", b"last")])
    assert store.mget(["lease"]) == [b"last"]
    assert store.collection.verify().ok


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (("", b"x"), r"key \(''\) must be a string that is not empty"),
        ((7, b"x"), r"key \(7\) must be a string"),
        (("key", "text"), "value of the key 'key' must be bytes; it is a str"),
        (("key", None), "must be bytes"),
    ],
)
def test_what_is_no_key_or_no_bytes_is_named_and_nothing_is_written(store: L2MByteStore, pair: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        store.mset([("good", b"x"), pair])
    assert not store.collection.exists()
    for call in (store.mget, store.mdelete):
        with pytest.raises(UsageError, match="must be a string that is not empty"):
            call([""])


def test_a_collection_of_another_embedder_is_refused(made: Settings, store: L2MByteStore) -> None:
    notes = l2m_rag.open("notes", settings=made)
    notes.put([Text("a", "A text.")])
    for keyed in (L2MByteStore(notes), L2MByteStore("notes", settings=made)):
        with pytest.raises(IncompatibleError, match="it was opened with 'keys'"):
            keyed.mset([("a", b"x")])
        with pytest.raises(IncompatibleError):
            keyed.mget(["a"])
    with pytest.raises(IncompatibleError):
        L2MRecordManager("all", notes).create_schema()
    store.mset([("a", b"x")])
    with pytest.raises(IncompatibleError):
        l2m_rag.open("bytes", settings=made).put([Text("a", "A text.")])


def test_two_writers_at_once_lose_nothing(made: Settings, store: L2MByteStore) -> None:
    stores = [store, L2MByteStore(settings=made)]  # and the collection is not there yet
    managers = [L2MRecordManager(str(number), store.collection) for number in range(2)]

    def write(number: int) -> None:
        for at in range(4):
            stores[number].mset([(f"{number}-{at}", bytes([at])), ("both", bytes([number]))])
            managers[number].update([f"key {at}"])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(store.yield_keys()) == {"both", *(f"{number}-{at}" for number in range(2) for at in range(4))}
    assert stores[1].mget(["0-3", "1-2"]) == [b"\3", b"\2"]
    assert [manager.list_keys() for manager in managers] == [[f"key {at}" for at in range(4)]] * 2
    assert store.collection.verify().ok


# -- records -----------------------------------------------------------------------------------------------------------
class Clock:
    """A clock that tells other times only when it is set."""

    def __init__(self, manager: RecordManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_764_344_994.123_456_7
        monkeypatch.setattr(manager, "get_time", lambda: self.now)


@pytest.fixture(params=["memory", "ours"])
def manager(request: pytest.FixtureRequest, made: Settings) -> RecordManager:
    made_of: dict[str, Callable[[], RecordManager]] = {
        "memory": lambda: InMemoryRecordManager("notes"),
        "ours": lambda: L2MRecordManager("notes", settings=made),
    }
    found = made_of[request.param]()
    found.create_schema()
    return found


def test_records_are_kept_by_time_and_group(manager: RecordManager, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (manager.list_keys(), manager.exists(["a"])) == ([], [False])
    clock = Clock(manager, monkeypatch)
    first = clock.now
    manager.update(["a", "b", "it's"], group_ids=["one", 'a "group"', None])
    second = clock.now = first + 3e-7  # the next number that a clock can tell
    manager.update(["c", "d", "c"], group_ids=["one", "two", "1"])
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["a", "b", "it's", "c", "d"]), ({"before": first}, []), ({"after": first}, ["c", "d"]),
        ({"before": second}, ["a", "b", "it's"]), ({"after": second}, []),
        ({"before": 0, "after": 0}, ["a", "b", "it's", "c", "d"]),
        ({"after": first - 1, "before": second + 1, "group_ids": ["one", "two"]}, ["a", "d"]),
        ({"group_ids": ['a "group"']}, ["b"]), ({"group_ids": [None]}, ["it's"]), ({"group_ids": [1]}, []),
        ({"group_ids": ["1"]}, ["c"]), ({"group_ids": []}, ["a", "b", "it's", "c", "d"]), ({"limit": 2}, ["a", "b"]),
        ({"group_ids": ["one", *map(str, range(300))]}, ["a", "c"]), ({"group_ids": ["one' OR 1=1"]}, []),
        ({"limit": 0, "after": first}, ["c", "d"]), ({"limit": 1, "after": first}, ["c"]),
    ]  # fmt: skip
    for asked, keys in cases:
        assert manager.list_keys(**asked) == keys, asked
    assert manager.exists(["d", "none", "a"]) == [True, False, True]
    manager.update(["a"])  # which also takes its group away
    assert manager.list_keys(after=first) == ["a", "c", "d"]
    assert manager.list_keys(group_ids=["one"]) == []
    manager.delete_keys(["a", "none", "it's"])
    assert manager.list_keys() == ["b", "c", "d"]
    manager.update([])
    manager.delete_keys([])
    assert manager.exists([]) == []


def test_a_clock_that_is_behind_and_groups_that_do_not_fit_are_errors(manager: RecordManager) -> None:
    with pytest.raises(ValueError, match="time_at_least must be in the past"):
        manager.update(["a"], time_at_least=time.time() + 60)
    with pytest.raises(ValueError, match="Length of keys must match length of group_ids"):
        manager.update(["a", "b"], group_ids=["one"])
    assert manager.list_keys() == []
    before = manager.get_time()
    manager.update(["a"], time_at_least=before)
    assert manager.list_keys(before=before) == []


async def test_the_asynchronous_methods_do_the_same(manager: RecordManager) -> None:
    await manager.acreate_schema()
    before = await manager.aget_time()
    await asyncio.gather(*(manager.aupdate([key], group_ids=[key], time_at_least=before) for key in "ab"))
    assert await manager.aexists(["a", "c"]) == [True, False]
    assert sorted(await manager.alist_keys(after=before - 1, group_ids=["a", "b"])) == ["a", "b"]
    await manager.adelete_keys(["a"])
    assert await manager.alist_keys(limit=5) == ["b"]


def test_namespaces_and_bytes_in_one_collection_are_kept_apart(made: Settings, store: L2MByteStore) -> None:
    names = ["a", "ab", 'a", "b', "a'b"]
    managers = [L2MRecordManager(name, store.collection) for name in names]
    store.mset([("key", b"x")])
    for number, one in enumerate(managers):
        one.update(["key", f"{number}"], group_ids=["group", "group"])
    managers[0].delete_keys(["key", "1", '", "key'])
    assert [one.list_keys(group_ids=["group"]) for one in managers] == [
        ["0"],
        *([["key", str(at)] for at in (1, 2, 3)]),
    ]
    assert (list(store.yield_keys()), store.mget(["key"])) == (["key"], [b"x"])
    store.mdelete(["key"])
    assert managers[1].exists(["key", "0"]) == [True, False]


def test_what_is_no_namespace_or_key_is_an_error(made: Settings) -> None:
    with pytest.raises(UsageError, match=r"namespace \(''\)"):
        L2MRecordManager("", settings=made)
    with pytest.raises(UsageError, match=r"key \(''\)"):
        L2MRecordManager("a", settings=made).update(["a", ""])


# -- index() -----------------------------------------------------------------------------------------------------------
def documents(**texts: str) -> list[Document]:
    return [Document(page_content=text, metadata={"source": source[0]}) for source, text in texts.items()]


FIRST = documents(a1="The lease ends in May.", a2="The rent is 900 euros.", b1="Forty sheep graze.")
SECOND = documents(a1="The lease ends in May.", a2="The rent is 950 euros.")
# of the second run: added, skipped and deleted, and how many documents are there then
MODES: list[tuple[Any, tuple[int, int, int], int]] = [
    (None, (1, 1, 0), 4), ("incremental", (1, 1, 1), 3), ("full", (1, 1, 2), 2), ("scoped_full", (1, 1, 1), 3),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["store", "index"])
@pytest.mark.parametrize(("mode", "second", "left"), MODES)
def test_index_writes_what_is_new_and_deletes_what_is_gone(
    made: Settings, kind: str, mode: Any, second: tuple[int, int, int], left: int
) -> None:
    def run(some: Sequence[Document]) -> tuple[int, int, int]:
        store = L2MVectorStore("notes", settings=made)  # each time as a new program would
        target: Any = store if kind == "store" else L2MDocumentIndex(collection=store.collection)
        manager = L2MRecordManager("notes", settings=made)
        manager.create_schema()
        done = index(some, manager, target, cleanup=mode, source_id_key="source", key_encoder="sha256")
        return done["num_added"], done["num_skipped"], done["num_deleted"]

    assert run(FIRST) == (3, 0, 0)
    assert run(SECOND) == second
    notes = l2m_rag.open("notes", settings=made)
    keys = L2MRecordManager("notes", settings=made).list_keys()
    assert sorted(f"text:{key}" for key in keys) == [row.id for row in notes.documents()]
    assert len(keys) == left


def test_records_are_there_in_another_process(made: Settings) -> None:
    L2MRecordManager("notes", settings=made).update(["a"], group_ids=["one"])
    code = (
        "import sys; from pathlib import Path; from l2m_rag.config import Settings;"
        "from l2m_rag.langchain import L2MByteStore, L2MRecordManager;"
        "made = Settings(home=Path(sys.argv[1]));"
        "print(L2MRecordManager('notes', settings=made).list_keys(group_ids=['one']));"
        "L2MByteStore('records', settings=made).mset([('k', b'v')])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(made.home)], capture_output=True, text=True, check=False)
    assert ran.stdout == "['a']\n", ran.stderr
    assert L2MByteStore("records", settings=made).mget(["k"]) == [b"v"]


def amend(kb: Collection, ids: list[str], change: Callable[[Text], dict[str, Any] | None]) -> tuple[int, list[Text]]:
    return kb.amend(ids, change), kb.get(ids)


def test_metadata_change_and_texts_go_with_no_writer_in_between(made: Settings) -> None:
    kb = l2m_rag.open("notes", settings=made)
    assert amend(kb, ["a"], lambda text: None) == (0, [])
    kb.put([Text("a", "A lease.", {"n": 1}), Text("b", "A rent.", {"n": 2}), Text("c", "A sheep.")])
    before = kb.tier().store.vectors_named(["text:b"])["text:b"]
    kb.amend(["a", "b", "none"], lambda text: None if text.id == "a" else {**text.metadata, "n": 3})
    assert kb.get(["a", "b", "c"]) == [Text("b", "A rent.", {"n": 3}), Text("c", "A sheep.")]
    assert (kb.tier().store.vectors_named(["text:b"])["text:b"] == before).all()
    assert [one.chunk.metadata["n"] for one in kb.search("rent", 3, where="metadata.n = 3")] == [3]
    version = kb.tier().version
    assert amend(kb, ["b"], lambda text: dict(text.metadata)) == (0, [Text("b", "A rent.", {"n": 3})])
    assert kb.tier().version == version
    with pytest.raises(UsageError, match="cannot be stored as JSON"):
        kb.amend(["b", "c"], lambda text: None if text.id == "c" else {"n": object()})
    assert len(kb.get(["b", "c"])) == 2
    assert kb.verify().ok
