"""Conversations in a collection: in order, apart from one another, found again, and forgotten."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory

import l2m_rag
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain import L2MChatMessageHistory
from l2m_rag.memory_tiers.texts import Text

pytestmark = pytest.mark.usefixtures("by_hashing")
MESSAGES: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("My sister Rosa has moved to Porto.", additional_kwargs={"lc": 1, "type": "constructor"}),
    AIMessage("", tool_calls=[{"name": "remember", "args": {"fact": "Rosa: Porto"}, "id": "1", "type": "tool_call"}]),
    ToolMessage("kept", tool_call_id="1"),
    AIMessage([{"type": "text", "text": "I will keep that in mind."}]),
]


@pytest.fixture
def home(by_hashing: Any, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", embedder="hashing")


@pytest.fixture
def kb(home: Settings) -> Collection:
    return l2m_rag.open("conversations", settings=home)


def history(kb: Collection, session: str = "ada", **options: Any) -> L2MChatMessageHistory:
    return L2MChatMessageHistory(session, kb, **options)


def test_messages_of_every_kind_come_back_as_they_were_in_their_order(kb: Collection, home: Settings) -> None:
    assert history(kb).messages == []
    history(kb).add_messages(MESSAGES[:2])
    for message in MESSAGES[2:]:
        history(kb).add_message(message)
    assert history(kb).messages == MESSAGES
    assert L2MChatMessageHistory("ada", settings=home, last=2).messages == MESSAGES[-2:]  # as of another process
    history(kb).add_messages([])
    assert history(kb).messages == MESSAGES


def test_what_was_said_is_found_again_with_its_date(kb: Collection) -> None:
    history(kb).add_messages(MESSAGES)
    for number in range(30):
        history(kb).add_user_message(f"The weather of day {number} is fine.")
    (best,) = history(kb, last=1).recall("Where has my sister Rosa moved?", k=1)
    assert best.page_content == "human: My sister Rosa has moved to Porto."
    assert best.metadata["by"] == "human"
    assert best.metadata["said_at"].endswith("+00:00")
    assert set(best.metadata) == {"chat", "by", "said_at"}
    assert history(kb).forget([best.id or "", "nothing"]) == [best.id]
    assert "Porto" not in str(history(kb).recall("Rosa Porto sister", k=50)[0].page_content)


def test_a_conversation_of_another_time_is_kept_with_its_names_and_dates(kb: Collection) -> None:
    history(kb).add_user_message("Said now.")
    may = 1683554160.0  # 2023-05-08 13:56 UTC
    told = [HumanMessage(f"Line {number}.", name="Caroline") for number in range(5)]
    history(kb).add_messages([HumanMessage("I paint.", name="Melanie")], at=may + 3600)
    for message in told:  # all of one time, in calls of their own
        history(kb).add_messages([message], at=may)
    said = [message.text for message in history(kb).messages]
    assert said == [*(message.text for message in told), "I paint.", "Said now."]
    (best,) = history(kb).recall("Melanie: I paint", k=1)
    assert best.page_content == "Melanie: I paint."
    assert best.metadata["said_at"] == "2023-05-08T14:56:00+00:00"
    (best,) = history(kb).recall("Melanie: I paint", k=1, around=1)
    before, here, behind = best.page_content.split("\n")
    assert (before, here) == ("[8 May 2023] Caroline: Line 4.", "[8 May 2023] Melanie: I paint.")
    assert behind.endswith("] human: Said now.")
    (first,) = history(kb).recall("Caroline: Line 0", k=1, around=1)
    assert first.page_content == "[8 May 2023] Caroline: Line 0.\n[8 May 2023] Caroline: Line 1."
    for wrong in (-1.0, float("nan"), 1e18):
        with pytest.raises(UsageError, match="must be a time"):
            history(kb).add_messages(told, at=wrong)


STRANGE = ["ada", "bob", "ad", "ADA", "ada' OR '1' = '1", "%", "a%", "ü", 'a"b', "x' --", " ", "chat:0"]


@pytest.mark.parametrize("name", STRANGE)
def test_nothing_of_another_conversation_is_ever_seen_or_deleted(kb: Collection, name: str) -> None:
    for each in STRANGE:
        history(kb, each).add_user_message(f"The secret of {each!r}.")
    kb.put([Text("note", "A note, and no message.")])
    ours = history(kb, name)
    assert [message.text for message in ours.messages] == [f"The secret of {name!r}."]
    found = ours.recall("the secret of ada bob", k=50)
    assert [document.metadata["chat"] for document in found] == [name]
    others = history(kb, next(each for each in STRANGE if each != name))
    assert others.forget([found[0].id or ""]) == []
    ours.clear()
    assert (ours.messages, ours.recall("secret")) == ([], [])
    assert sum(len(history(kb, each).messages) for each in STRANGE) == len(STRANGE) - 1
    assert len(kb.get(["note"])) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=6))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    kb = l2m_rag.open("c", settings=Settings(home=tmp_path_factory.mktemp("home"), embedder="hashing"))
    wanted = [HumanMessage(text) for text in texts]
    history(kb).add_messages(wanted)
    assert history(kb).messages == wanted


def test_two_that_write_at_once_lose_nothing_and_keep_their_own_order(kb: Collection) -> None:
    def write(who: str) -> None:
        mine = L2MChatMessageHistory("ada", l2m_rag.open("conversations", settings=kb.settings))
        for number in range(10):
            mine.add_user_message(f"{who} {number}")

    threads = [threading.Thread(target=write, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [message.text for message in history(kb).messages]
    for who in "ab":
        assert [text for text in said if text.startswith(who)] == [f"{who} {number}" for number in range(10)]
    assert len(said) == 20


def test_a_long_history_stays_usable(kb: Collection) -> None:
    many = [HumanMessage(f"turn {number} of a long talk") for number in range(3000)]
    history(kb).add_messages(many)
    assert history(kb).messages == many
    assert [message.text for message in history(kb, last=2).messages] == [many[-2].text, many[-1].text]
    assert history(kb).recall("turn 1234", k=1)[0].page_content == "human: turn 1234 of a long talk"
    history(kb).clear()
    assert history(kb).messages == []


@pytest.mark.slow
def test_a_history_of_a_hundred_thousand_turns(kb: Collection) -> None:
    history(kb).add_messages([HumanMessage(f"turn {number} of a long talk") for number in range(100_000)])
    assert len(history(kb).messages) == 100_000
    assert [message.text for message in history(kb, last=1).messages] == ["turn 99999 of a long talk"]
    assert history(kb).recall("turn 77777", k=1)[0].page_content == "human: turn 77777 of a long talk"


async def test_it_works_from_a_running_loop(kb: Collection) -> None:
    ours = history(kb)
    await asyncio.gather(*(ours.aadd_messages([HumanMessage(str(number))]) for number in range(4)))
    assert sorted(message.text for message in await ours.aget_messages()) == ["0", "1", "2", "3"]
    await ours.aclear()
    assert await ours.aget_messages() == []


@pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated")
def test_a_chain_reads_and_writes_it(kb: Collection) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("Noted."), AIMessage("Porto.")]))
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
    chain = RunnableWithMessageHistory(
        prompt | model,
        lambda session_id: history(kb, session_id),
        input_messages_key="question",
        history_messages_key="history",
    )
    talk: Any = {"configurable": {"session_id": "ada"}}
    chain.invoke({"question": "Rosa lives in Porto."}, config=talk)
    chain.invoke({"question": "Where does Rosa live?"}, config=talk)
    said = [message.text for message in history(kb).messages]
    assert said == ["Rosa lives in Porto.", "Noted.", "Where does Rosa live?", "Porto."]


def test_what_cannot_be_kept_is_an_error_and_nothing_is_added(kb: Collection) -> None:
    ours = history(kb)
    ours.add_user_message("first")
    for wrong in (HumanMessage("x", additional_kwargs={"a": object()}), HumanMessage("\ud800")):
        with pytest.raises(UsageError, match="cannot be stored"):
            ours.add_messages([HumanMessage("second"), wrong])
    assert [message.text for message in ours.messages] == ["first"]
    for session in ("", None, 3):
        with pytest.raises(UsageError, match="must be a string that is not empty"):
            L2MChatMessageHistory(session, kb)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be at least 1"):
        history(kb, last=0)
