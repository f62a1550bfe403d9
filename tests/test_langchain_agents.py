"""Agents over a collection, end to end with the default weights: `create_agent`, its memory, a graph with its store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.store.base import BaseStore
from pydantic import BaseModel, Field

import l2m_rag
from l2m_rag.collection import Collection
from l2m_rag.config import Settings, load_settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain import ChatL2M, L2MChatMessageHistory, L2MMemoryMiddleware, L2MStore, L2MToolkit

pytestmark = pytest.mark.usefixtures("default_weights")
LEASE = (
    "The lease of the red house begins on 1 May 2024 and ends on 30 April 2029. The landlord is Bolt GmbH. "
    "The deposit is 1,800 euros and is paid back within 60 days. Pets need written permission of the landlord."
)


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    given = load_settings()[0]
    return Settings(home=tmp_path / "home", models=given.models or given.data / "models", threads=1)


@pytest.fixture
def kb(home: Settings, tmp_path: Path) -> Collection:
    (tmp_path / "lease.txt").write_text(LEASE)
    kb = l2m_rag.open("contracts", settings=home)
    kb.ingest(tmp_path / "lease.txt")
    return kb


class Scripted(GenericFakeChatModel):
    """Says what it was told to say, and keeps what it was sent."""

    sent: list[Any] = Field(default_factory=list)

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, *arguments: Any, **kwargs: Any) -> Any:
        self.sent.append(list(messages))
        return super()._generate(messages, *arguments, **kwargs)


def ask(agent: Any, text: str, **config: Any) -> list[Any]:
    messages: list[Any] = agent.invoke({"messages": [HumanMessage(text)]}, **config)["messages"]
    return messages


def test_a_scripted_model_answers_over_a_collection(kb: Collection) -> None:
    call = {"name": "ask_documents", "args": {"question": "Who is the landlord?"}, "id": "1", "type": "tool_call"}
    script = Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("It is Bolt GmbH [1].")]), sent=[])
    messages = ask(create_agent(script, tools=L2MToolkit(collection=kb).get_tools()), "Who is the landlord?")
    assert [type(one) for one in messages] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    (cited,) = messages[2].artifact["citations"]
    assert LEASE[cited["start"] : cited["end"]] == cited["quote"] == "Bolt GmbH"
    assert "[1] lease.txt: Bolt GmbH" in messages[2].content
    assert messages[-1].text == "It is Bolt GmbH [1]."


@pytest.mark.parametrize(("name", "argument"), [("ask_documents", "question"), ("search_documents", "query")])
def test_our_model_answers_over_a_collection(kb: Collection, home: Settings, name: str, argument: str) -> None:
    tools = [tool for tool in L2MToolkit(collection=kb).get_tools() if tool.name in (name, "remember", "forget")]
    _, call, result, answer = ask(create_agent(ChatL2M(settings=home), tools=tools), "Who is the landlord?")
    assert [(one["name"], one["args"]) for one in call.tool_calls] == [(name, {argument: "Who is the landlord?"})]
    assert result.status == "success"
    assert answer.text == "Bolt GmbH"
    cited = [one for block in answer.content_blocks for one in block.get("annotations", [])]
    assert [(one["title"], one["cited_text"]) for one in cited] == [("lease.txt", "Bolt GmbH")]
    assert LEASE[cited[0]["extras"]["start"] : cited[0]["extras"]["end"]] == "Bolt GmbH"


async def test_our_model_answers_within_a_running_loop(kb: Collection, home: Settings) -> None:
    agent: Any = create_agent(ChatL2M(settings=home), tools=L2MToolkit(collection=kb).get_tools())
    found = await agent.ainvoke({"messages": [HumanMessage("Who is the landlord according to the documents?")]})
    assert found["messages"][-1].text == "Bolt GmbH"


def test_an_agent_gives_what_a_schema_describes(kb: Collection, home: Settings) -> None:
    class Person(BaseModel):
        name: str
        age: int

    agent: Any = create_agent(ChatL2M(settings=home), tools=[], response_format=Person)
    found = agent.invoke({"messages": [HumanMessage("Ada is 36 years old.")]})
    assert found["structured_response"] == Person(name="Ada", age=36)


def test_an_agent_remembers_one_user_and_tells_no_other(kb: Collection, home: Settings) -> None:
    kept = l2m_rag.open("conversations", settings=home)

    def agent(user: str) -> Any:
        return create_agent(ChatL2M(settings=home, max_tokens=8), middleware=[L2MMemoryMiddleware(user, kept)])

    ask(agent("ada"), "The sister of Ada is called Rosa. Rosa lives in the city of Porto.")
    answer = ask(agent("ada"), "In which city does Rosa live?")[-1]
    assert "Porto" in answer.text
    cited = [one for block in answer.content_blocks for one in block.get("annotations", [])]
    assert cited[0]["title"].startswith("said on ")
    assert "Porto" in cited[0]["cited_text"]
    assert "Porto" not in ask(agent("bob"), "In which city does Rosa live?")[-1].text
    said = [(one.type, one.text) for one in L2MChatMessageHistory("ada", kept).messages]
    assert [said[0], said[2]] == [
        ("human", "The sister of Ada is called Rosa. Rosa lives in the city of Porto."),
        ("human", "In which city does Rosa live?"),
    ]


@pytest.mark.parametrize("system", [None, "Be kind."])
async def test_any_model_is_told_what_was_said(home: Settings, system: str | None) -> None:
    kept = l2m_rag.open("conversations", settings=home)
    L2MChatMessageHistory("ada", kept).add_messages([HumanMessage("Rosa lives in Porto.")], at=1_683_504_000.0)
    script = Scripted(messages=iter([AIMessage("In Porto.")]), sent=[])
    memory = L2MMemoryMiddleware(lambda runtime: runtime.context["user"], kept)
    agent: Any = create_agent(script, middleware=[memory], system_prompt=system)
    await agent.ainvoke({"messages": [HumanMessage("Where does Rosa live?")]}, context={"user": "ada"})
    told = script.sent[0][0]
    assert isinstance(told, SystemMessage)
    assert told.text == (system or "") + "Said before, with its day:\n[8 May 2023] human: Rosa lives in Porto."
    assert [one.text for one in L2MChatMessageHistory("ada", kept).messages[1:]] == [
        "Where does Rosa live?",
        "In Porto.",
    ]


def test_a_memory_of_nobody_is_refused(kb: Collection) -> None:
    with pytest.raises(UsageError, match="user"):
        L2MMemoryMiddleware("", kb)
    with pytest.raises(UsageError, match="k"):
        L2MMemoryMiddleware("ada", kb, k=0)


def test_a_graph_answers_and_remembers_in_its_store(kb: Collection, home: Settings) -> None:
    chat = ChatL2M(collection=kb, settings=home)

    def answer(state: MessagesState, *, store: BaseStore) -> dict[str, Any]:
        question = state["messages"][-1].text
        known = store.search(("asked",), query=question, limit=1)
        if known:
            return {"messages": [AIMessage(f"As before: {known[0].value['answer']}")]}
        reply = chat.invoke(state["messages"])
        store.put(("asked",), "1", {"question": question, "answer": reply.text})
        return {"messages": [reply]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    whole: Any = graph.compile(store=L2MStore("graph", settings=home), checkpointer=InMemorySaver())
    first = ask(whole, "Who is the landlord?", config={"configurable": {"thread_id": "1"}})[-1]
    assert first.text == "Bolt GmbH"
    assert first.content_blocks[0]["annotations"][0]["title"] == "lease.txt"
    again = ask(whole, "And the landlord?", config={"configurable": {"thread_id": "2"}})[-1]
    assert again.text == "As before: Bolt GmbH"
