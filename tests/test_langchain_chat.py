"""ChatL2M beside the standard suites: room, stops, grammars, citations, cancellation, bad input; models untrained."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

import l2m_rag
from l2m_rag import models, qa
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.constrained import bounded
from l2m_rag.errors import MissingExtraError, ModelError, UsageError
from l2m_rag.generate import Decoder
from l2m_rag.langchain import ChatL2M
from l2m_rag.langchain.messages import passages, remembered, told, turns
from l2m_rag.langchain.pieces import until
from l2m_rag.langchain.tool_choice import choose

pytestmark = pytest.mark.usefixtures("by_hashing")
TEXT = "The lease of the red house ends on 30 April 2029. The tenant pays the rent each month."
FEW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def home(by_hashing: Any, tmp_path: Path, language_model: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        embedder="hashing",
        model=str(language_model),
        chunk_size=64,
        chunk_overlap=0,
        abstain_below=0.0,
        threads=1,
    )


@pytest.fixture
def kb(home: Settings, tmp_path: Path) -> Collection:
    (tmp_path / "lease.txt").write_text(TEXT)
    kb = l2m_rag.open("documents", settings=home)
    kb.ingest(tmp_path / "lease.txt")
    return kb


@pytest.fixture
def chat(home: Settings) -> ChatL2M:
    return ChatL2M(settings=home, max_tokens=16)


@tool
def search(query: str, k: int = 4) -> str:
    """Find passages."""
    return query


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def cited_in(message: AIMessage) -> list[dict[str, Any]]:
    """Give the annotations of the one text block."""
    (block,) = message.content_blocks
    assert block["type"] == "text"
    return [dict(one) for one in block.get("annotations", [])]


# -- answers


@pytest.mark.parametrize("free", [False, True])
def test_an_answer_of_a_collection_cites_in_annotations(kb: Collection, home: Settings, free: bool) -> None:
    message = ChatL2M(collection=kb, settings=home, free=free).invoke("When does the lease end?")
    for one in cited_in(message):
        assert one["type"] == "citation"
        where = one["extras"]
        assert kb.text(where["document"])[where["start"] : where["end"]] == one["cited_text"]
        if not free:
            assert message.text[one["start_index"] : one["end_index"]] == one["cited_text"]
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] > 0
    assert free or not message.response_metadata["abstained"]


def test_pieces_of_a_stream_make_the_whole_with_one_usage(kb: Collection, home: Settings) -> None:
    chunks = list(ChatL2M(collection=kb, settings=home).stream("When does the lease end?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text == ChatL2M(collection=kb, settings=home).invoke("When does the lease end?").text
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert whole.content_blocks[0]["annotations"]  # type: ignore[typeddict-item]


def test_what_a_search_found_is_read_and_cited(chat: ChatL2M) -> None:
    found = [Document(TEXT, metadata={"source": "lease.txt", "page": 2, "start": 100}, id="1")]
    call = AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1", "type": "tool_call"}])
    result = ToolMessage(TEXT, tool_call_id="1", name="search", artifact=found)
    message = chat.invoke([HumanMessage("When does the lease end?"), call, result])
    (one,) = cited_in(message)
    assert one["title"] == "lease.txt"
    assert TEXT[one["extras"]["start"] - 100 : one["extras"]["end"] - 100] == one["cited_text"] == message.text
    assert one["extras"]["page"] == 2


@pytest.mark.parametrize(
    ("result", "text", "cited"),
    [
        (ToolMessage("It's sunny.", tool_call_id="1", name="weather"), "It's sunny.", []),
        (ToolMessage("Error: no b", tool_call_id="1", status="error"), "Error: no b", []),
        (
            ToolMessage(
                "in May\n[1] a.txt: May",
                tool_call_id="1",
                artifact={
                    "answer": "in May",
                    "citations": [
                        {"document": "a.txt", "page": None, "start": 4, "end": 7, "quote": "May", "score": 0.5}
                    ],
                },
            ),
            "in May",
            ["May"],
        ),
    ],
)
def test_a_short_result_is_the_answer_as_it_stands(
    chat: ChatL2M, result: ToolMessage, text: str, cited: list[str]
) -> None:
    call = AIMessage("", tool_calls=[{"name": "x", "args": {}, "id": "1", "type": "tool_call"}])
    message = chat.invoke([HumanMessage("And so?"), call, result])
    assert message.text == text
    assert [one["cited_text"] for one in cited_in(message)] == cited


def test_paragraphs_of_a_plain_result_are_passages() -> None:
    found = passages([ToolMessage("One.\n\nTwo.\n\n", tool_call_id="7", name="wiki")])
    assert [(one.chunk.document, one.chunk.text) for one in found] == [("wiki", "One."), ("wiki", "Two.")]
    assert told(ToolMessage(" It is. ", tool_call_id="1")) == ("It is.", [])


# -- calls


@FEW
@given(said=st.text(min_size=1, max_size=60).filter(lambda text: any(letter.isalnum() for letter in text)))
def test_texts_of_a_call_are_words_that_were_said(home: Settings, said: str) -> None:
    @tool
    def note(fact: str, count: int) -> str:
        """Note a fact."""
        return fact

    said = said.encode("utf-8", "ignore").decode()
    bound = ChatL2M(settings=home, max_tokens=200).bind_tools([note], tool_choice="note")
    message = bound.invoke([HumanMessage(said)])
    (call,) = message.tool_calls
    assert call["args"]["fact"] in " ".join(said.split())
    assert isinstance(call["args"]["count"], int)


def test_the_question_of_a_search_is_the_message_and_what_may_be_left_out_is(chat: ChatL2M) -> None:
    message = chat.bind_tools([search], tool_choice="any").invoke('Who said "no"\nto it?')
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("search", {"query": 'Who said "no" to it?'})
    assert message.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("message", "choice", "chosen"),
    [
        ("add 3 and 4", None, "add"),
        ("Where is it?", None, "search"),
        ("Well.", None, None),
        ("Well.", "any", "search"),
        ("add 3 and 4", "none", None),
        ("Where is it?", "add", "add"),
    ],
)
def test_which_tool(message: str, choice: str | None, chosen: str | None) -> None:
    tools = [
        {"name": "search", "parameters": {"properties": {"query": {}}}},
        {"name": "add", "parameters": {"properties": {"a": {}}}},
    ]
    found = choose(message, tools, choice, lambda text, others: [0.0] * len(others))
    assert (found["name"] if found else None) == chosen


def test_behind_a_result_comes_an_answer_unless_a_call_is_demanded(chat: ChatL2M) -> None:
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "x"}, "id": "1", "type": "tool_call"}])
    messages = [HumanMessage("add 1 and 2"), call, ToolMessage("found", tool_call_id="1", name="search")]
    assert chat.bind_tools([search, add]).invoke(messages).tool_calls == []
    (again,) = chat.bind_tools([search, add], tool_choice="any").invoke(messages).tool_calls
    assert again["name"] == "add"


# -- JSON


class Deep(BaseModel):
    kind: Literal["a", "b"]
    names: list[str] = Field(max_length=2)
    size: int = Field(ge=0, le=9)


class Whole(BaseModel):
    first: Deep
    note: str | None = None


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_json_is_always_what_the_schema_says(home: Settings, temperature: float) -> None:
    chat = ChatL2M(settings=home, max_tokens=200, temperature=temperature, seed=1)
    found = chat.with_structured_output(Whole, include_raw=True).invoke("Anything.")
    assert isinstance(found, dict)
    assert found["parsing_error"] is None, found["raw"].text
    assert isinstance(found["parsed"], Whole)
    assert json.loads(found["raw"].text)["first"]["kind"] in ("a", "b")


def test_bounds_are_added_where_there_are_none() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string", "maxLength": 3}, "c": {"enum": ["x"]}},
        "$defs": {"D": {"type": "array", "items": {"type": "string"}}},
    }
    made = bounded(schema, 50)
    assert made["additionalProperties"] is False
    assert [made["properties"][name].get("maxLength") for name in "abc"] == [50, 3, None]
    assert made["$defs"]["D"] == {"type": "array", "items": {"type": "string", "maxLength": 50}, "maxItems": 8}


def test_a_schema_that_cannot_be_held_to_is_named(chat: ChatL2M) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "X", "schema": {"title": "X", "type": "nonsense"}}}
    with pytest.raises(UsageError, match="schema X cannot be held to"):
        chat.invoke("Hi", response_format=shape)
    with pytest.raises(UsageError, match="response_format"):
        chat.invoke("Hi", response_format={"type": "xml"})
    with pytest.raises(UsageError, match="method"):
        chat.with_structured_output(Whole, method="xml")


def test_without_llguidance_the_extra_is_named(chat: ChatL2M, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance.hf", None)
    decoder = models.load_language_model(chat.settings or Settings())
    assert isinstance(decoder, Decoder)
    decoder.__dict__.pop("grammars", None)
    with pytest.raises(MissingExtraError, match="langchain"):
        chat.bind_tools([add], tool_choice="any").invoke("add 1 and 2")


# -- room


@FEW
@given(
    texts=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=9000)), min_size=1),
    most=st.integers(1, 1900),
)
def test_no_conversation_overflows_the_window(home: Settings, texts: list[tuple[str, str]], most: int) -> None:
    decoder = models.load_language_model(home)
    assert isinstance(decoder, Decoder)
    clean = [(role, text.encode("utf-8", "ignore").decode()) for role, text in texts]
    assert len(decoder.chat(clean, most=most)) + most <= decoder.window


def test_the_last_turn_and_the_system_stay_longest(home: Settings) -> None:
    decoder = models.load_language_model(home)
    assert isinstance(decoder, Decoder)
    history = [
        ("system", "Be kind."),
        *[("user", f"the lease ends {n}") for n in range(2000)],
        ("user", "and the rent?"),
    ]
    text = decoder.tokenizer.decode(decoder.chat(history, most=100))
    assert "Be kind." in text
    assert "and the rent?" in text
    assert "ends 1999" in text
    assert "ends 1\n" not in text


def test_a_history_of_many_turns_is_answered(chat: ChatL2M) -> None:
    messages = [HumanMessage("the rent " * 50) if n % 2 else AIMessage("is paid") for n in range(2001)]
    assert isinstance(chat.invoke([*messages, HumanMessage("And now?")]), AIMessage)


def test_a_reply_that_leaves_no_room_is_refused(home: Settings) -> None:
    with pytest.raises(UsageError, match="leaves no room in the window"):
        ChatL2M(settings=home, max_tokens=5000).invoke("Hello")


def test_a_reply_of_the_most_tokens_says_so(home: Settings) -> None:
    message = ChatL2M(settings=home, max_tokens=3).invoke("Hello")
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] <= 3
    ended = "length" if message.usage_metadata["output_tokens"] == 3 else "stop"
    assert message.response_metadata["finish_reason"] == ended


# -- stops


@example(pieces=["ab", "a"], stops=["b", "aba"])  # the second begins before the first, but is whole behind it
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_a_stop_ends_the_text_wherever_pieces_end(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    first = min(ends, default=(0, len(whole)))[1]
    assert "".join(until(pieces, stops)) == whole[:first]


def test_an_empty_stop_is_refused(chat: ChatL2M) -> None:
    with pytest.raises(UsageError, match="stop"):
        chat.invoke("Hello", stop=[""])


def test_a_stop_cuts_what_is_shown_and_keeps_the_citations(kb: Collection, home: Settings) -> None:
    chat = ChatL2M(collection=kb, settings=home)
    whole = chat.invoke("When does the lease end?").text
    cut = chat.invoke("When does the lease end?", stop=[whole[3:5]])
    assert cut.text == whole[: whole.find(whole[3:5])]
    assert cut.usage_metadata is not None


# -- cancellation


def test_a_stream_that_is_left_stops_the_answer(
    kb: Collection, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def endless(*_: Any, **__: Any) -> Any:
        for number in range(10_000):
            written.append(f"{number} ")
            yield written[-1]
            time.sleep(0.001)

    monkeypatch.setattr(Decoder, "reply", endless)
    stream = ChatL2M(collection=kb, settings=home, free=True).stream("When does the lease end?")
    assert next(stream).text == "0 "
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while any(one.name == "l2m-answer" for one in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(written) < 10_000
    assert not any(one.name == "l2m-answer" for one in threading.enumerate())


def test_a_task_that_is_cancelled_in_mid_stream_leaves_the_model_usable(chat: ChatL2M) -> None:
    async def cancelled() -> list[str]:
        got: list[str] = []

        async def read() -> None:
            async for chunk in chat.astream("Hello"):
                got.append(chunk.text)
                await asyncio.sleep(0)

        task = asyncio.create_task(read())
        while not got:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return got

    assert asyncio.run(cancelled())
    assert isinstance(chat.invoke("Hello"), AIMessage)


async def test_many_at_once_within_a_running_loop(kb: Collection, home: Settings) -> None:
    chat = ChatL2M(collection=kb, settings=home)
    found = await chat.abatch(["When does the lease end?"] * 6)
    assert len({one.text for one in found}) == 1


def test_an_error_of_the_answer_is_raised_where_it_is_read(kb: Collection, home: Settings) -> None:
    with pytest.raises(UsageError, match="at least one letter or digit"):
        ChatL2M(collection=kb, settings=home).invoke("?!")


def test_a_reply_that_takes_too_long_is_given_up(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        time.sleep(0.05)
        yield "late"

    monkeypatch.setattr(Decoder, "write", late)
    with pytest.raises(ModelError, match="timeout"):
        ChatL2M(settings=home, timeout=0.01).invoke("Hello")


# -- bad input


def test_pictures_are_refused(chat: ChatL2M) -> None:
    picture = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
    with pytest.raises(UsageError, match="text only, not 'image'"):
        chat.invoke([HumanMessage([{"type": "text", "text": "What is it?"}, picture])])


def test_nothing_said_is_refused(chat: ChatL2M) -> None:
    with pytest.raises(UsageError, match="no message"):
        chat.invoke([])


def test_an_unknown_tool_is_refused(chat: ChatL2M) -> None:
    with pytest.raises(UsageError, match="must be one of search"):
        chat.bind_tools([search], tool_choice="fly")


def test_an_endpoint_answers_from_a_collection_only(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Far:
        name = "far"

    monkeypatch.setattr(models, "_load_endpoint", lambda *_: Far())
    far = Settings(home=home.home, embedder="hashing", llm_url="http://127.0.0.1:9/v1", llm_model="far")
    with pytest.raises(UsageError, match="llm_url"):
        ChatL2M(settings=far).invoke("Hello")


def test_turns_tell_calls_and_results_as_text() -> None:
    call = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}])
    told = turns([SystemMessage("Be kind."), HumanMessage("1?"), call, ToolMessage("3", tool_call_id="1", name="add")])
    assert told == [("system", "Be kind."), ("user", "1?"), ("assistant", 'add({"a": 1})'), ("user", "add gave: 3")]


def test_lines_that_only_look_remembered_are_not_read() -> None:
    assert remembered("[8 May 2023] human: Rosa lives in Porto.") == []
    (found,) = remembered("Be kind.Said before, with its day:\n[8 May 2023] human: Rosa lives in Porto.\nnot this")
    assert (found.chunk.document, found.chunk.text) == ("said on 8 May 2023", "Rosa lives in Porto.")


def test_an_abstention_is_said_in_words(kb: Collection, home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qa, "_quote", lambda *_: qa._Draft("", "none", 0.12, [], 3, 0, time.monotonic()))
    message = ChatL2M(collection=kb, settings=home).invoke("When does the lease end?")
    assert message.text == "The documents do not answer this (probability that they do: 12 %)."
    assert message.response_metadata["abstained"]
