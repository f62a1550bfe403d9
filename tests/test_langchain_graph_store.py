"""LangGraph's store over a collection: the laws of its store in memory, lifetimes, and a graph that remembers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore, GetOp, Item, ListNamespacesOp, MatchCondition, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore

import l2m_rag
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain import L2MEmbeddings, L2MStore
from l2m_rag.memory_tiers.texts import Text

ADA = ("users", "ada")
FACTS = {
    "sister": {"fact": "My sister Rosa has moved to Porto.", "year": 2024},
    "lease": {"fact": "The lease of the red house ends in May.", "year": 2025, "tags": ["home", "money"]},
    "sheep": {"fact": "Forty sheep graze on the farm.", "year": 2026, "place": {"name": "farm"}},
}


@pytest.fixture
def made(tmp_path: Path, embedder: Path) -> Settings:
    return Settings(home=tmp_path / "home", embedder=str(embedder))


@pytest.fixture
def ours(made: Settings) -> L2MStore:
    return L2MStore(mode="dense", settings=made)


@pytest.fixture(params=["memory", "ours"])
def store(request: pytest.FixtureRequest, made: Settings, ours: L2MStore) -> BaseStore:
    embeddings = L2MEmbeddings(settings=made)
    return InMemoryStore(index={"dims": 32, "embed": embeddings}) if request.param == "memory" else ours


def keys(found: list[Any]) -> list[str]:
    return [item.key for item in found]


def fill(store: BaseStore) -> None:
    store.batch([PutOp(ADA, key, value) for key, value in FACTS.items()])


# -- the laws, also of the store in memory -----------------------------------------------------------------------------
def test_what_was_put_is_there_until_it_is_deleted(store: BaseStore) -> None:
    assert (store.list_namespaces(), store.get(ADA, "sister")) == ([], None)
    assert (store.search(ADA), store.search(ADA, query="sister")) == ([], [])
    store.put(ADA, "sister", FACTS["sister"])
    item = store.get(ADA, "sister")
    assert item is not None
    assert type(item) is Item
    assert (item.namespace, item.key, item.value) == (ADA, "sister", FACTS["sister"])
    assert 0 <= time.time() - item.created_at.timestamp() < 60
    assert item.created_at.tzinfo is not None
    store.put(ADA, "sister", {"fact": "Rosa lives in Lisbon."})
    again = store.get(ADA, "sister")
    assert again is not None
    assert again.value == {"fact": "Rosa lives in Lisbon."}
    assert again.updated_at > item.updated_at
    store.delete(ADA, "sister")
    store.delete(ADA, "never there")
    assert store.get(ADA, "sister") is None
    assert (store.search(ADA), store.search(ADA, query="Rosa")) == ([], [])


def test_names_are_any_text_and_never_leak(store: BaseStore) -> None:
    spaces = [("a",), ("ab",), ("a", "b"), ("a", "b", "c"), ('a", "b',), ("a'b", "%_"), ("é\n", "b\\")]
    store.batch([PutOp(space, "key", {"at": number}) for number, space in enumerate(spaces)])
    for number, space in enumerate(spaces):
        item = store.get(space, "key")
        assert item is not None
        assert item.value == {"at": number}
        below = [at for at, other in enumerate(spaces) if other[: len(space)] == space]
        for query in (None, "key"):
            assert sorted(one.value["at"] for one in store.search(space, query=query)) == below
    assert len(store.search(())) == len(spaces)
    assert store.search(("b",)) == []
    assert store.get(("a", "b"), 'key"') is None


def test_a_search_filters_and_pages(store: BaseStore) -> None:
    fill(store)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"year": 2024}, "sister"), ({"year": {"$gt": 2024}}, "lease sheep"),
        ({"year": {"$gte": 2025, "$lt": 2026}}, "lease"),
        ({"year": {"$lte": 2025}}, "sister lease"), ({"year": {"$ne": 2025}}, "sister sheep"),
        ({"year": {"$eq": 2025}}, "lease"), ({"tags": ["home", "money"]}, "lease"), ({"tags": ["home"]}, ""),
        ({"place": {"name": "farm"}}, "sheep"), ({"place": {"name": {"$ne": "farm"}}}, ""),
        ({"tags": None}, "sister sheep"),
        ({"fact": "x' OR 1=1 --"}, ""), ({"no such name": 1}, ""), ({}, "sister lease sheep"),
        ({"year": 2026, "place": {"$ne": None}}, "sheep"),
    ]  # fmt: skip
    for wanted, kept in cases:
        assert keys(store.search(ADA, filter=wanted)) == kept.split(), wanted
        assert set(keys(store.search(ADA, query="a house", filter=wanted))) == set(kept.split()), wanted
    with pytest.raises(ValueError, match="Unsupported operator"):
        store.search(ADA, filter={"year": {"$in": [2024]}})
    assert keys(store.search(ADA, limit=2)) == ["sister", "lease"]
    assert keys(store.search(ADA, limit=2, offset=2)) == ["sheep"]
    assert store.search(ADA, limit=0) == []
    ranked = keys(store.search(ADA, query="a house"))
    pages = [keys(store.search(ADA, query="a house", limit=1, offset=at)) for at in range(4)]
    assert pages == [*([key] for key in ranked), []]


def test_a_query_ranks_by_meaning(store: BaseStore) -> None:
    fill(store)
    store.put(ADA, "hidden", {"fact": FACTS["sheep"]["fact"]}, index=False)
    store.put(ADA, "partly", {"fact": FACTS["sheep"]["fact"], "about": "geese"}, index=["about"])
    best = store.search(ADA, query="geese", limit=1)[0]
    assert best.key == "partly"
    assert best.score == pytest.approx(1.0, abs=2e-3)
    scores = [item.score for item in store.search(ADA, query="sheep", limit=4)]
    assert None not in scores
    assert scores == sorted(scores, key=lambda score: -(score or 0.0))
    assert store.search(ADA)[0].score is None
    assert "hidden" in keys(store.search(ADA))
    assert store.get(ADA, "hidden") is not None


def test_a_batch_reads_first_and_the_last_of_several_puts_counts(store: BaseStore) -> None:
    store.put(ADA, "a", {"at": "first"})
    results = store.batch([
        PutOp(ADA, "a", {"at": "second"}), GetOp(ADA, "a"), PutOp(ADA, "a", {"at": "third"}), SearchOp(("users",)),
        PutOp(("other",), "b", {"at": "new"}), ListNamespacesOp(), PutOp(ADA, "c", {"at": "x"}), PutOp(ADA, "c", None),
        GetOp(ADA, "none"),
    ])  # fmt: skip
    assert results[1].value == results[3][0].value == {"at": "first"}  # type: ignore[union-attr,index]
    assert results[5] == [ADA]
    assert [results[at] for at in (0, 2, 4, 6, 7, 8)] == [None] * 6
    assert [item.value for item in store.search(())] == [{"at": "third"}, {"at": "new"}]
    store.batch([PutOp(ADA, "a", None), PutOp(ADA, "a", {"at": "again"})])
    assert [item.value for item in store.search(ADA)] == [{"at": "again"}]
    assert store.batch([]) == []
    with pytest.raises(ValueError, match=r"(?i)operation"):
        store.batch(["no operation"])  # type: ignore[list-item]


def test_namespaces_are_listed(store: BaseStore) -> None:
    spaces = [("a", "b", "c"), ("a", "b", "d"), ("a", "x", "c"), ("ab", "c"), ("b",)]
    store.batch([PutOp(space, key, {"at": f"{key} {space}"}) for space in spaces for key in "12"])
    cases: list[tuple[dict[str, Any], list[tuple[str, ...]]]] = [
        ({}, spaces), ({"prefix": ("a",)}, spaces[:3]), ({"suffix": ("c",)}, [spaces[0], *spaces[2:4]]),
        ({"prefix": ("a", "*", "c")}, [spaces[0], spaces[2]]), ({"prefix": ("a", "b"), "suffix": ("d",)}, [spaces[1]]),
        ({"max_depth": 2}, [("a", "b"), ("a", "x"), ("ab", "c"), ("b",)]),
        ({"max_depth": 1, "prefix": ("a",)}, [("a",)]), ({"suffix": ("*", "d")}, [spaces[1]]),
        ({"limit": 2, "offset": 1}, spaces[1:3]), ({"prefix": ("a", "b", "c", "d")}, []),
    ]  # fmt: skip
    for asked, listed in cases:
        assert store.list_namespaces(**asked) == listed, asked


async def test_within_a_running_loop(store: BaseStore) -> None:
    await asyncio.gather(*(store.aput(ADA, key, value) for key, value in FACTS.items()))
    store.put(ADA, "more", {"fact": "A call that blocks, in the loop."})
    item = await store.aget(ADA, "lease")
    assert item is not None
    assert item.value == FACTS["lease"]
    results = await store.abatch([GetOp(ADA, "sheep"), SearchOp(ADA, query="sheep", limit=2), ListNamespacesOp()])
    assert results[0].value == FACTS["sheep"]  # type: ignore[union-attr]
    assert len(results[1]) == 2  # type: ignore[arg-type]
    assert results[2] == [ADA]
    await store.adelete(ADA, "lease")
    assert set(keys(await store.asearch(ADA))) == {"sister", "sheep", "more"}
    assert await store.alist_namespaces(prefix=("users",)) == [ADA]


# -- ours alone --------------------------------------------------------------------------------------------------------
def test_cosines_are_those_of_the_store_in_memory(made: Settings) -> None:
    memory = InMemoryStore(index={"dims": 32, "embed": L2MEmbeddings(settings=made), "fields": ["fact"]})
    mine = L2MStore(mode="dense", fields=["fact"], settings=made)
    for store in (memory, mine):
        fill(store)
    theirs, found = (store.search(ADA, query="When does the lease end?") for store in (memory, mine))
    assert keys(found) == keys(theirs)
    assert [item.score for item in found] == pytest.approx([item.score for item in theirs], abs=2e-3)


def test_words_are_found_wherever_they_stand_and_nothing_is_found_that_shall_not_be(made: Settings) -> None:
    store = L2MStore(settings=made)
    fill(store)
    store.put(ADA, "deep", {"list": [{"inner": ["Zanzibar"]}], "n": 1})
    store.put(ADA, "numbers", {"n": 41})
    store.put(ADA, "empty", {})
    store.put(ADA, "hidden", {"fact": "Zanzibar"}, index=False)
    store.put(ADA, "nothing there", {"fact": "Zanzibar"}, index=["none", "also[*].none"])
    store.collection.put([Text("other", "Zanzibar"), Text('item:["no JSON', "Zanzibar")])  # of other programs
    assert store.search(ADA, query="Zanzibar")[0].key == "deep"
    found = set(keys(store.search((), query="Zanzibar", limit=20)))
    assert found == {*FACTS, "deep", "numbers", "empty"}
    assert store.search(ADA, query="Zanzibar", filter={"n": 41}, limit=1)[0].key == "numbers"
    assert len(store.search((), limit=20)) == 8
    store.put(ADA, "deep", {"n": 1}, index=False)
    assert "deep" not in keys(store.search(ADA, query="Zanzibar"))
    with pytest.raises(UsageError, match="at least one letter"):
        store.search(ADA, query="?")


def test_a_filter_looks_further_where_it_keeps_few(ours: L2MStore) -> None:
    ours.batch([PutOp(ADA, str(at), {"text": f"sheep number {at}", "at": at}) for at in range(60)])
    last = keys(ours.search(ADA, query="sheep number", limit=60))[-1]
    assert keys(ours.search(ADA, query="sheep number", filter={"at": int(last)}, limit=1)) == [last]
    assert len(ours.search(ADA, query="sheep", filter={"at": {"$lt": 30}}, limit=25, offset=10)) == 20


@pytest.mark.parametrize(
    ("op", "told"),
    [
        (PutOp(ADA, "b", {"at": object()}), r"value of 'b' in \('users', 'ada'\) cannot be stored as JSON"),
        (PutOp(ADA, "b", {"at": float("nan")}), "cannot be stored as JSON"),
        (PutOp(ADA, "b", {"at": (1, 2)}), "would not come back from JSON"),
        (PutOp(ADA, "b", {1: 2}), "would not come back"),  # type: ignore[dict-item]
        (PutOp(ADA, "b", {"at": "\ud800"}), "UTF-8"),
        (PutOp(ADA, "b", ["a"]), "must be a dict"),  # type: ignore[arg-type]
        (PutOp(ADA, "", {"at": 1}), "must be a string that is not empty"),
        (PutOp(ADA, "b", {"at": 1}, ttl=-1), "ttl of 'b' in .* must be minutes, 0 or more; it is -1"),
        (PutOp(ADA, "b", {"at": 1}, ttl=float("nan")), "must be minutes"),
        (PutOp(ADA, "b", {"at": 1}, index="at"), "index of 'b' in .* must be False or a list of paths; it is 'at'"),  # type: ignore[arg-type]
        (SearchOp(ADA, {"at": {"$gt": "much"}}), r"\$gt compares numbers; 'much' is none"),
    ],
)
def test_what_cannot_be_done_is_named_and_nothing_is_written(ours: L2MStore, op: Any, told: str) -> None:
    ours.put(ADA, "before", {"at": 1})
    with pytest.raises(UsageError, match=told):
        ours.batch([PutOp(ADA, "a", {"at": 2}), PutOp(ADA, "before", None), op])
    assert keys(ours.search(())) == ["before"]


def test_what_cannot_be_compared_fits_no_comparison(ours: L2MStore) -> None:
    ours.batch([PutOp(ADA, str(number), {"at": at}) for number, at in enumerate((None, "x", [1], 5, "6"))])
    assert keys(ours.search(ADA, filter={"at": {"$gt": 0}})) == ["3", "4"]
    assert ours.search(ADA, filter={"none": {"$lt": 9}}) == []


def test_it_keeps_when_an_item_came_in_and_survives_the_program(ours: L2MStore, made: Settings) -> None:
    ours.put(ADA, "a", {"at": 1})
    first = ours.get(ADA, "a")
    ours.put(ADA, "a", {"at": 2})
    again = L2MStore(l2m_rag.open("store", settings=made), mode="dense").get(ADA, "a")
    assert first is not None
    assert again is not None
    assert (again.value, again.created_at) == ({"at": 2}, first.created_at)
    assert again.updated_at > first.updated_at
    ours.delete(ADA, "a")
    ours.put(ADA, "a", {"at": 3})
    assert ours.search(ADA)[0].created_at > again.updated_at
    assert ours.collection.verify().ok


# -- lifetimes ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give a way to let minutes pass for the store alone."""
    now = [time.time()]
    monkeypatch.setattr("l2m_rag.langchain.graph_stores.time.time", lambda: now[0])

    def wait(minutes: float) -> None:
        now[0] += minutes * 60

    return wait


def test_what_has_expired_is_never_given_and_swept_away(ours: L2MStore, clock: Callable[[float], None]) -> None:
    ours.put(ADA, "short", FACTS["sheep"], ttl=1)
    ours.put(ADA, "long", FACTS["sheep"])
    ours.put(("gone",), "short", FACTS["sheep"], ttl=1)
    clock(0.9)
    assert len(ours.search((), query="sheep", refresh_ttl=False)) == 3
    assert ours.sweep_ttl() == 0
    clock(0.2)
    assert ours.get(ADA, "short") is None
    assert keys(ours.search(())) == keys(ours.search((), query="sheep")) == ["long"]
    assert ours.list_namespaces() == [ADA]
    assert len(ours.collection.documents()) == 3
    assert ours.sweep_ttl() == 2
    assert ours.sweep_ttl() == 0
    assert len(ours.collection.documents()) == 1
    assert ours.collection.verify().ok


def test_a_read_gives_an_item_its_time_again_unless_it_is_told_not_to(
    made: Settings, clock: Callable[[float], None]
) -> None:
    store = L2MStore(ttl={"default_ttl": 10}, mode="dense", settings=made)
    store.put(ADA, "read", {"at": "read"})
    store.put(ADA, "found", {"at": "found"})
    store.put(ADA, "seen", {"at": "seen"})
    store.put(ADA, "for ever", {"at": "ever"}, ttl=None)
    updated = store.search(ADA, refresh_ttl=False)[0].updated_at
    clock(9)
    assert store.get(ADA, "read") is not None
    assert keys(store.search(ADA, query="found", limit=1)) == ["found"]
    assert store.get(ADA, "seen", refresh_ttl=False) is not None
    clock(9)
    left = store.search(ADA, refresh_ttl=False)
    assert keys(left) == ["read", "found", "for ever"]
    assert left[0].updated_at == updated
    store.put(ADA, "read", {"at": "put again"})
    clock(9)
    assert keys(store.search(ADA, refresh_ttl=False)) == ["read", "for ever"]
    quiet = L2MStore(store.collection, ttl={"default_ttl": 10, "refresh_on_read": False}, mode="dense")
    assert quiet.get(ADA, "read") is not None
    clock(2)
    assert quiet.get(ADA, "read") is None
    store.put(ADA, "read", {"at": "anew"}, ttl=0)
    assert store.get(ADA, "read") is None


def test_a_read_does_not_bring_back_what_another_one_deletes_or_puts(
    ours: L2MStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.put(ADA, "deleted", {"at": 1}, ttl=5)
    ours.put(ADA, "put", {"at": 1}, ttl=5)
    refresh = ours._refresh

    def late(ids: list[str]) -> None:
        monkeypatch.setattr(ours, "_refresh", refresh)
        ours.delete(ADA, "deleted")
        ours.put(ADA, "put", {"at": 2})
        refresh(ids)

    monkeypatch.setattr(ours, "_refresh", late)
    assert [item.value for item in ours.search(ADA)] == [{"at": 1}, {"at": 1}]
    assert [(item.key, item.value) for item in ours.search(ADA)] == [("put", {"at": 2})]
    assert "expires_at" not in ours.collection.texts("metadata.findable")[0].metadata


# -- several at once, and a graph --------------------------------------------------------------------------------------
def test_writers_at_once_lose_nothing(made: Settings, ours: L2MStore) -> None:
    stores = [ours, ours, L2MStore(mode="dense", settings=made)]  # and the collection is not there yet
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for at in range(4):
                stores[number].put(("writers", str(number)), str(at), {"at": at}, ttl=5)
                stores[number].get(("writers", str(number)), "0")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(ours.search(("writers",), limit=99)) == 12
    assert ours.collection.verify().ok


class State(TypedDict):
    said: str
    answer: str


def test_a_graph_remembers_in_one_thread_and_recalls_in_another(ours: L2MStore) -> None:
    def talk(state: State, *, store: BaseStore) -> dict[str, str]:
        recalled = store.search(ADA, query=state["said"], limit=1)
        store.put(ADA, str(len(store.search(ADA))), {"fact": state["said"]})
        return {"answer": recalled[0].value["fact"] if recalled else "I do not know."}

    builder = StateGraph(State)
    builder.add_node("talk", talk)
    builder.add_edge(START, "talk")
    graph = builder.compile(checkpointer=InMemorySaver(), store=ours)

    def say(text: str, thread: str) -> str:
        answered = graph.invoke({"said": text, "answer": ""}, {"configurable": {"thread_id": thread}})
        return str(answered["answer"])

    assert say("My sister Rosa has moved to Porto.", "monday") == "I do not know."
    assert say("My sister Rosa has moved to Porto?", "tuesday") == "My sister Rosa has moved to Porto."

    async def asay() -> Any:
        config: Any = {"configurable": {"thread_id": "wednesday"}}
        return await graph.ainvoke({"said": "sister Rosa Porto", "answer": ""}, config)

    assert "Rosa" in asyncio.run(asay())["answer"]
    assert len(ours.search(ADA)) == 3


def test_the_other_classes_do_without_langgraph() -> None:
    code = (
        "import sys; sys.modules['langgraph'] = None; import l2m_rag.langchain as ours\n"
        "from l2m_rag.langchain import *\n"
        "try: ours.L2MStore\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "langgraph is not installed; run: pip install 'l2m-rag[langgraph]'\n", ran.stderr
    with pytest.raises(AttributeError, match="nothing_like_this"):
        l2m_rag.langchain.nothing_like_this  # noqa: B018


def test_conditions_of_namespaces_are_prefix_or_suffix(ours: L2MStore) -> None:
    ours.put(ADA, "a", {"at": 1})
    with pytest.raises(UsageError, match=r"match_type \('infix'\)"):
        ours.batch([ListNamespacesOp((MatchCondition("infix", ("users",)),))])  # type: ignore[arg-type]
