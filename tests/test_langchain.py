"""The LangChain classes: the standard suites of langchain-tests, and what those do not look at."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.indexing.base import DocumentIndex
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.integration_tests.indexer import AsyncDocumentIndexTestSuite, DocumentIndexerTestSuite
from langchain_tests.unit_tests import EmbeddingsUnitTests

import l2m_rag
from l2m_rag import collection as library
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import IncompatibleError, L2MError, LoadError, LockedError, UsageError
from l2m_rag.langchain import L2MDocumentIndex, L2MDocumentLoader, L2MEmbeddings, L2MRetriever, L2MVectorStore
from l2m_rag.memory_tiers.lance_store import LanceStore
from l2m_rag.memory_tiers.places import writing
from l2m_rag.memory_tiers.texts import Text

TEXTS = ["The lease of the red house ends in May.", "Forty sheep graze on the farm.", "The geese guard the house."]


@pytest.fixture
def made(tmp_path: Path, embedder: Path) -> Settings:
    return Settings(home=tmp_path / "home", embedder=str(embedder), chunk_size=64, chunk_overlap=8)


@pytest.fixture
def kb(made: Settings) -> Collection:
    return l2m_rag.open("notes", settings=made)


@pytest.fixture
def store(made: Settings) -> L2MVectorStore:
    return L2MVectorStore("notes", settings=made)


# -- the standard suites -----------------------------------------------------------------------------------------------
class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, made: Settings) -> VectorStore:
        return L2MVectorStore("suite", self.get_embeddings(), settings=made)


class TestVectorStoreWithItsOwnEmbedder(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, made: Settings) -> VectorStore:
        return L2MVectorStore("suite", settings=made)


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def filled(self, kb: Collection) -> None:
        kb.put([Text(str(number), f"{text} ({number})") for number, text in enumerate(TEXTS * 2)])
        self.kb = kb

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return L2MRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"collection": self.kb}

    @property
    def retriever_query_example(self) -> str:
        return "When does the lease end?"


class OurEmbeddings:
    @pytest.fixture(autouse=True)
    def with_settings(self, made: Settings) -> None:
        self.made = made

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return L2MEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"settings": self.made}


class TestEmbeddings(OurEmbeddings, EmbeddingsIntegrationTests):
    pass


class TestEmbeddingsAlone(OurEmbeddings, EmbeddingsUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        variables = {"L2M_EMBEDDER": self.made.embedder, "L2M_HOME": str(self.made.home)}
        return variables, {}, {}


class TestDocumentIndex(DocumentIndexerTestSuite):
    @pytest.fixture
    def index(self, kb: Collection) -> DocumentIndex:
        return L2MDocumentIndex(collection=kb)


class TestAsyncDocumentIndex(AsyncDocumentIndexTestSuite):
    @pytest.fixture
    async def index(self, kb: Collection) -> DocumentIndex:
        return L2MDocumentIndex(collection=kb)


# -- texts in a collection ---------------------------------------------------------------------------------------------
def test_texts_stand_beside_documents_and_neither_touches_the_other(kb: Collection, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "1").with_suffix(".txt").write_text("The tenant pays the rent each month.")
    kb.put([Text("1.txt", TEXTS[0], {"author": "Ada"})])
    kb.ingest(tmp_path / "docs", prune=True)
    (tmp_path / "docs" / "1.txt").unlink()
    assert kb.get(["1.txt"]) == [Text("1.txt", TEXTS[0], {"author": "Ada"})]
    assert {passage.chunk.document for passage in kb.search("rent lease", 5)} == {"1.txt", "text:1.txt"}
    assert kb.ingest(tmp_path / "docs", prune=True).removed == 1
    assert [passage.chunk.text for passage in kb.search("rent lease", 5)] == [TEXTS[0]]
    assert kb.verify().ok
    assert kb.drop(["1.txt", "none"]) == ["1.txt"]
    assert (kb.get(["1.txt"]), kb.search("lease", 5)) == ([], [])
    assert kb.verify().ok


def test_an_answer_cites_a_text(kb: Collection) -> None:
    kb.put([Text("lease", TEXTS[0])])
    assert kb.text("text:lease") == TEXTS[0]
    (document,) = kb.documents()
    assert (document.id, document.chunks, document.title) == ("text:lease", 1, "lease")


LETTERS = st.characters(exclude_categories=["Cs"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(LETTERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(LETTERS, max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(LETTERS, min_size=1, max_size=50),
    metadata=st.dictionaries(st.text(LETTERS, max_size=6), JSON, max_size=4),
    name=st.text(LETTERS, min_size=1, max_size=20),
)
def test_whatever_is_put_in_comes_back_as_it_was(
    kb: Collection, text: str, metadata: dict[str, Any], name: str
) -> None:
    kb.put([Text(name, text, metadata)])
    (back,) = kb.get([name])
    assert back == Text(name, text, metadata)
    assert json.dumps(back.metadata) == json.dumps(metadata)  # 1 stays 1, not 1.0
    assert kb.drop([name]) == [name]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (Text("", "x"), "must be a string that is not empty"),
        (Text(7, "x"), "must be a string"),  # type: ignore[arg-type]
        (Text("a", ""), "is empty"),
        (Text("a", "\ud800"), "UTF-8"),
        (Text("a", "x", {"at": object()}), "cannot be stored as JSON"),
        (Text("a", "x", {"at": float("nan")}), "cannot be stored as JSON"),
        (Text("a", "x", {1: 2}), "would not come back"),  # type: ignore[dict-item]
        (Text("a", "x", {"at": (1, 2)}), "would not come back"),
    ],
)
def test_a_text_that_cannot_be_stored_is_named_and_nothing_is_written(kb: Collection, bad: Text, told: str) -> None:
    kb.put([Text("before", "There was one.")])
    with pytest.raises(UsageError, match=told):
        kb.put([Text("good", "This one is."), bad])
    with pytest.raises(UsageError, match="more than once"):
        kb.put([Text("twice", "x"), Text("twice", "y")])
    assert [document.id for document in kb.documents()] == ["text:before"]


def test_what_looks_like_a_serialised_object_is_only_text(store: L2MVectorStore) -> None:
    trap = {"lc": 1, "type": "constructor", "id": ["os", "system"], "kwargs": {"command": "exit"}}
    store.add_texts(["A text."], [{"lc": 1, "inner": trap}], ids=["1"])
    (found,) = store.similarity_search("text", k=1)
    assert found.metadata == {"lc": 1, "inner": trap}
    assert type(found.metadata["inner"]) is dict


def test_two_writers_at_once_lose_nothing(made: Settings) -> None:
    stores = [L2MVectorStore("notes", settings=made) for _ in range(2)]
    stores[0].add_texts(["The first one."], ids=["first"])

    def write(number: int) -> None:
        for at in range(5):
            stores[number].add_texts([f"Text {at} of writer {number}."], ids=[f"{number}-{at}"])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{number}-{at}" for number in range(2) for at in range(5)]
    assert [document.id for document in stores[0].get_by_ids(names)] == names
    assert stores[1].collection.verify().ok


def test_many_small_writes_are_tidied_up_while_others_read_and_write(
    kb: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "TIDY_AFTER", 120)
    for at in range(0, 300, 10):
        kb.put([Text(str(number), f"Text number {number} of three hundred.") for number in range(at, at + 10)])
        assert kb.search(f"text number {at}", 1)
    kb.settle()
    table = kb.tier().store._chunks
    table.checkout_latest()
    assert table.index_stats("text_idx").num_unindexed_rows < 240
    assert table.stats()["fragment_stats"]["num_fragments"] < 25
    assert [text.id for text in kb.get(["7", "299"])] == ["7", "299"]
    assert kb.verify().ok
    kb.delete()
    assert not kb.exists()


def test_what_cannot_be_tidied_up_is_a_warning(
    kb: Collection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "TIDY_AFTER", 1)

    def fails(self: LanceStore, unindexed: int = 100) -> None:
        raise OSError("no more of this")

    monkeypatch.setattr(LanceStore, "index_text", fails)
    kb.put([Text("a", "A text.")])
    kb.settle()
    assert "'notes' was not tidied up: no more of this" in caplog.text
    assert kb.verify().ok


def test_a_writer_that_goes_on_for_long_is_named(store: L2MVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add_texts(["The first one."])
    monkeypatch.setattr(library, "PATIENCE", 0.1)
    with writing(store.collection.path), pytest.raises(LockedError, match="is being written by process"):
        store.add_texts(["Another one."])


# -- the vector store --------------------------------------------------------------------------------------------------
def test_a_filter_is_of_values_or_sql(store: L2MVectorStore) -> None:
    facts: list[dict[str, Any]] = [{"author": "Ada", "year": 2024, "draft": True}]
    facts += [{"author": "O'Hara", "year": 2025}, {"author": "Bo"}]
    store.add_texts(TEXTS, facts, ids=["0", "1", "2"])
    cases: list[tuple[Any, str]] = [
        ({"author": "Ada"}, "0"), ({"author": "O'Hara", "year": 2025}, "1"), ({"author": ["Ada", "Bo"]}, "02"),
        ({"draft": True}, "0"), ({"year": 1}, ""), ("metadata.year > 2023", "01"), ({}, "012"), (None, "012"),
    ]  # fmt: skip
    for wanted, kept in cases:
        for way in (store.similarity_search, store.max_marginal_relevance_search):
            assert "".join(sorted(str(one.id) for one in way("house", k=5, filter=wanted))) == kept


@pytest.mark.parametrize(
    "bad",
    [{"a b": 1}, {"x'); DROP TABLE chunks; --": 1}, {"a": None}, {"a": {"$gt": 1}}, {"a": []}, "1 = 1; DROP TABLE"],
)
def test_a_filter_that_cannot_be_looked_for_is_an_error(store: L2MVectorStore, bad: Any) -> None:
    store.add_texts(TEXTS)
    with pytest.raises(UsageError):
        store.similarity_search("house", filter=bad)
    assert len(store.similarity_search("house", k=9)) == 3


def test_scores_are_cosines_and_thresholds_hold(store: L2MVectorStore) -> None:
    store.add_texts(TEXTS, ids=["0", "1", "2"])
    vectors = np.array(store.embeddings.embed_documents(TEXTS))
    query = np.array(store.embeddings.embed_query("sheep"))
    scored = store.similarity_search_with_score("sheep", k=3)
    for document, score in scored:
        assert score == pytest.approx(float(vectors[int(str(document.id))] @ query), abs=2e-3)
    assert [score for _, score in scored] == sorted((score for _, score in scored), reverse=True)
    limit = scored[0][1] - 1e-4
    retriever = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": limit})
    assert [one.id for one in retriever.invoke("sheep")] == [scored[0][0].id]
    assert store.similarity_search_by_vector(query.tolist(), k=1)[0].id == scored[0][0].id


def test_mmr_passes_over_a_copy(store: L2MVectorStore) -> None:
    store.add_texts([TEXTS[0], TEXTS[0] + " ", TEXTS[1]], ids=["one", "copy", "other"])
    found = store.max_marginal_relevance_search(TEXTS[0], k=2, fetch_k=3, lambda_mult=0.1)
    assert {one.id for one in found} in ({"one", "other"}, {"copy", "other"})
    assert len(store.max_marginal_relevance_search(TEXTS[0], k=2, lambda_mult=1.0)) == 2


def test_a_collection_keeps_the_embedder_that_made_it(made: Settings) -> None:
    L2MVectorStore("notes", DeterministicFakeEmbedding(size=6), settings=made).add_texts(["A text."])
    for other in (DeterministicFakeEmbedding(size=7), None):
        with pytest.raises(IncompatibleError):
            L2MVectorStore("notes", other, settings=made).add_texts(["Another one."])
    assert len(L2MVectorStore("notes", DeterministicFakeEmbedding(size=6), settings=made).get_by_ids(["x"])) == 0


def test_files_are_not_read_with_embeddings_of_langchain(made: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    store = L2MVectorStore("notes", DeterministicFakeEmbedding(size=6), settings=made)
    with pytest.raises(UsageError, match="files are read with one that the settings name"):
        store.collection.ingest(tmp_path / "a.txt")


def test_from_texts_makes_a_store(made: Settings) -> None:
    store = L2MVectorStore.from_texts(TEXTS, ids=["a", "b", "c"], collection="new", settings=made)
    assert [one.id for one in store.get_by_ids(["c", "a", "zz"])] == ["c", "a"]
    with pytest.raises(ValueError, match="ids of the documents"):
        store.delete()
    with pytest.raises(UsageError, match="need as many ids"):
        store.add_texts(TEXTS, ids=["only one"])


def test_inside_a_running_loop(store: L2MVectorStore) -> None:
    async def use() -> list[Document]:
        await store.aadd_texts(TEXTS, ids=["0", "1", "2"])
        store.add_texts(["And one more."], ids=["3"])  # a call that blocks, in the loop
        found = await asyncio.gather(*(store.asimilarity_search(text, k=1) for text in TEXTS))
        return [documents[0] for documents in found]

    assert [one.id for one in asyncio.run(use())] == ["0", "1", "2"]


# -- the retriever and the index ---------------------------------------------------------------------------------------
def test_a_retriever_gives_passages_with_where_they_stand(made: Settings, tmp_path: Path) -> None:
    kb = l2m_rag.open("notes", settings=made)
    (tmp_path / "lease.md").write_text("# Lease\n\nThe lease of the red house ends in May.")
    kb.ingest(tmp_path / "lease.md")
    (found,) = L2MRetriever(collection=kb, k=3).invoke("lease")
    text = kb.text("lease.md")
    assert found.page_content == text[found.metadata["start"] : found.metadata["end"]]
    assert (found.metadata["source"], found.metadata["heading"]) == ("lease.md", "Lease")
    assert found.id == kb.search("lease", 1)[0].chunk.id


def test_a_retriever_passes_on_what_is_asked_with(kb: Collection) -> None:
    kb.put([Text(str(at), text, {"at": at}) for at, text in enumerate(TEXTS)])
    retriever = L2MRetriever(collection=kb)
    assert [one.id for one in retriever.invoke("house", k=5, filter={"at": 1})] == ["1"]
    assert [one.id for one in retriever.invoke("geese", k=1, mode="text")] == ["2"]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        L2MRetriever(collection=kb, k=0)
    with pytest.raises(L2MError):
        L2MRetriever(collection=kb).invoke("  ")


def test_a_retriever_finds_the_collection_by_name(made: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    l2m_rag.open("notes", settings=made).put([Text("1", TEXTS[0])])
    monkeypatch.setenv("L2M_HOME", str(made.home))
    monkeypatch.setenv("L2M_EMBEDDER", made.embedder)
    assert [one.id for one in L2MRetriever(collection="notes").invoke("lease")] == ["1"]


@pytest.mark.parametrize("kind", ["store", "index"])
def test_index_adds_what_is_new_and_deletes_what_is_gone(made: Settings, kind: str) -> None:
    store = L2MVectorStore("notes", settings=made)
    target: Any = store if kind == "store" else L2MDocumentIndex(collection=store.collection)
    manager = InMemoryRecordManager("notes")
    manager.create_schema()
    documents = [Document(page_content=text, metadata={"source": f"{at}.txt"}) for at, text in enumerate(TEXTS)]

    def run(some: list[Document]) -> tuple[int, int, int]:
        done = index(some, manager, target, cleanup="full", source_id_key="source", key_encoder="sha256")
        return done["num_added"], done["num_skipped"], done["num_deleted"]

    assert run(documents) == (3, 0, 0)
    assert run(documents) == (0, 3, 0)
    assert run(documents[:1]) == (0, 1, 2)
    assert [one.page_content for one in store.similarity_search("sheep", k=5)] == TEXTS[:1]


# -- the loader
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "docs"
    place.mkdir()
    (place / "b.md").write_text("# Lease\n\nThe lease ends in May.")
    (place / "a.csv").write_text("name,sheep\nAda,40\n")
    (place / "bad.pdf").write_bytes(b"%PDF-1.7 and no more")
    (place / "empty.txt").write_text("")
    return place


def test_a_loader_gives_what_an_ingest_would_read(
    folder: Path, kb: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    found = {Path(one.metadata["source"]).name: one for one in L2MDocumentLoader(folder).lazy_load()}
    report = kb.ingest(folder)
    assert list(found) == ["a.csv", "b.md"]
    for name, document in found.items():
        assert document.page_content.strip() == kb.text(name).strip()
        assert document.id == name
    assert (found["b.md"].metadata["title"], found["b.md"].metadata["mime"]) == ("Lease", "text/markdown")
    for failure in report.failed:
        assert f"{failure.path} is left out: {failure.reason}" in caplog.text
    assert [one.id for one in asyncio.run(L2MDocumentLoader(folder, glob="*.md").aload())] == ["b.md"]
    assert [one.id for one in L2MDocumentLoader(folder / "a.csv", folder / "b.md").load()] == ["a.csv", "b.md"]


def test_a_file_that_cannot_be_read_is_an_error_where_that_is_wanted(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"corrupt: .*bad\.pdf"):
        L2MDocumentLoader(folder, glob="*.pdf", unreadable="raise").load()
    with pytest.raises(UsageError, match="no such file or folder"):
        L2MDocumentLoader(folder / "none").load()
    with pytest.raises(UsageError, match="must be skip or raise"):
        L2MDocumentLoader(folder, unreadable="ignore")  # type: ignore[arg-type]
