"""The tools of an agent: the standard suites of langchain-tests over each, and what those do not look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from pydantic import ValidationError

import l2m_rag
from l2m_rag import qa
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.langchain import L2MToolkit

TEXT = "The lease of the red house ends on 30 April 2029. The tenant pays the rent each month."
EXAMPLES: dict[str, dict[str, Any]] = {
    "search_documents": {"query": "When does the lease end?", "k": 2},
    "ask_documents": {"question": "When does the lease end?"},
    "read_document": {"document": "lease.txt", "start": 4, "length": 5},
    "remember": {"fact": "Ada's sister lives in Porto."},
    "recall": {"query": "Where does Ada's sister live?"},
    "forget": {"ids": ["no such id"]},
}


@pytest.fixture
def home(by_hashing: Any, tmp_path: Path, language_model: Path) -> Settings:
    return Settings(
        home=tmp_path / "home", embedder="hashing", model=str(language_model), chunk_size=64, chunk_overlap=0
    )


@pytest.fixture
def kb(home: Settings, tmp_path: Path) -> Collection:
    (tmp_path / "lease.txt").write_text(TEXT)
    kb = l2m_rag.open("documents", settings=home)
    kb.ingest(tmp_path / "lease.txt")
    return kb


def tools(kb: Collection, user: str = "ada") -> dict[str, BaseTool]:
    return {tool.name: tool for tool in L2MToolkit(collection=kb, user=user).get_tools()}


def called(tool: BaseTool, args: dict[str, Any]) -> Any:
    """Call a tool as an agent does."""
    message = tool.invoke({"name": tool.name, "args": args, "id": "1", "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    return message


class _Suite:
    """What the suites ask of a tool, of the six in turn; none has settings in the environment."""

    @pytest.fixture(autouse=True, params=list(EXAMPLES))
    def chosen(self, request: pytest.FixtureRequest, kb: Collection) -> None:
        self._tool = tools(kb)[request.param]

    @property
    def tool_constructor(self) -> Any:
        return self._tool

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return EXAMPLES[self._tool.name]


class TestToolsAsTheyAre(_Suite, ToolsUnitTests):
    pass


class TestToolsAtWork(_Suite, ToolsIntegrationTests):
    pass


def test_there_are_six_tools_that_say_what_they_do(kb: Collection) -> None:
    assert list(tools(kb)) == list(EXAMPLES)
    for tool in tools(kb).values():
        assert tool.description.endswith(".")
        assert set(EXAMPLES[tool.name]) <= set(tool.args)
        assert all(facts["description"] for facts in tool.args.values())


def test_documents_are_searched_and_read(kb: Collection) -> None:
    found = called(tools(kb)["search_documents"], {"query": "When does the lease end?"})
    assert TEXT in found.content
    (document,) = found.artifact
    assert isinstance(document, Document)
    name = document.metadata["source"]
    assert found.content.startswith(f"[{name}]")
    read = called(tools(kb)["read_document"], {"document": name, "start": 4, "length": 5})
    assert read.content == f"lease\n\n[{len(TEXT) - 9:,} characters follow]"
    assert (read.artifact["end"], read.artifact["characters"]) == (9, len(TEXT))
    assert called(tools(kb)["read_document"], {"document": name}).content == TEXT
    assert "ends at character" in called(tools(kb)["read_document"], {"document": name, "start": 999}).content


def test_an_answer_comes_with_its_citations(kb: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    cited = qa.Citation(1, "lease.txt", None, 36, 49, "30 April 2029", 1.0)
    answers = iter(
        [qa.Answer("q", "30 April 2029", "span", False, 0.9, [cited]), qa.Answer("q", "", "none", True, 0.1)]
    )
    monkeypatch.setattr(Collection, "ask", lambda *_: next(answers))  # what a model says is tested with the model
    told = called(tools(kb)["ask_documents"], {"question": "When?"})
    assert told.content == "30 April 2029\n[1] lease.txt: 30 April 2029"
    assert told.artifact["citations"][0]["start"] == 36
    assert called(tools(kb)["ask_documents"], {"question": "Who?"}).content == "The documents do not tell."


def test_what_is_remembered_is_recalled_and_forgotten_by_its_user_only(kb: Collection) -> None:
    ada, bob = tools(kb), tools(kb, "bob' OR '1' = '1")
    assert called(ada["recall"], {"query": "sister"}).content == "Nothing is remembered of that."
    one = called(ada["remember"], {"fact": "Ada's sister lives in Porto."}).artifact
    called(bob["remember"], {"fact": "Bob's sister lives in Rome."})
    assert [document.id for document in called(ada["recall"], {"query": "sister", "k": 20}).artifact] == [one]
    assert "Ada" not in called(bob["recall"], {"query": "Ada's sister Porto", "k": 20}).content
    assert called(bob["forget"], {"ids": [one]}).artifact == []
    assert "sister" not in called(ada["search_documents"], {"query": "sister"}).content
    assert called(ada["forget"], {"ids": [one, one]}).content == "Forgotten: Ada's sister lives in Porto."
    assert called(ada["recall"], {"query": "sister"}).content == "Nothing is remembered of that."
    assert len(called(bob["recall"], {"query": "sister"}).artifact) == 1


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("search_documents", {"query": " "}, "question"),
        ("ask_documents", {"question": ""}, "question"),
        ("read_document", {"document": "../etc/passwd"}, "has no text of a document"),
        ("remember", {"fact": ""}, "empty"),
    ],
)
def test_what_cannot_be_done_is_told_to_the_model(kb: Collection, name: str, args: dict[str, Any], told: str) -> None:
    message = called(tools(kb)[name], args)
    assert (message.status, told in message.content) == ("error", True), message.content


def test_a_collection_that_is_not_there_is_told(home: Settings) -> None:
    nothing = tools(l2m_rag.open("none", settings=home))
    assert "there is no collection" in called(nothing["search_documents"], {"query": "lease"}).content


async def test_tools_can_be_awaited(kb: Collection) -> None:
    told = await tools(kb)["remember"].ainvoke({"fact": "Ada likes tea."})
    assert told.startswith("Remembered as ")
    assert "tea" in await tools(kb)["recall"].ainvoke({"query": "tea"})


def test_memory_among_the_documents_is_refused(kb: Collection) -> None:
    with pytest.raises(ValidationError, match="are the same collection"):
        L2MToolkit(collection=kb, memory="documents")
