"""Sessions of the command line: kept, found again, read beside the documents, and forgotten so that nothing stays."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import l2m_rag
from l2m_rag.cli.main import app
from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.conversation import COLLECTION, Conversation, Said, line_of, sessions
from l2m_rag.errors import UsageError
from l2m_rag.langchain import L2MChatMessageHistory
from l2m_rag.memory_tiers.records import Chunk, Passage, merged

MAY, JUNE = 1_683_504_000.0, 1_686_182_400.0  # 8 May and 8 June 2023


@pytest.fixture
def home(by_hashing: Any, tmp_path: Path, language_model: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("L2M_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("L2M_EMBEDDER", "hashing")
    monkeypatch.setenv("L2M_MODEL", str(language_model))
    (tmp_path / "lease.txt").write_text("The lease of the red house ends on 30 April 2029.")
    settings = Settings(home=tmp_path / "home", embedder="hashing", model=str(language_model))
    l2m_rag.open("c", settings=settings).ingest(tmp_path / "lease.txt")
    return settings


@pytest.fixture
def kept(home: Settings) -> Collection:
    return l2m_rag.open(COLLECTION, settings=home)


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def files_with(word: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_a_session_goes_on_where_it_was_and_langchain_reads_the_same(home: Settings, kept: Collection) -> None:
    assert (
        run("chat", "-c", "c", "--session", "ada", stdin="Rosa lives in Porto.\nWhere does Rosa live?\n").exit_code == 0
    )
    assert run("chat", "-c", "c", "--session", "bob", stdin="Who is it?\n").exit_code == 0
    assert sessions(kept) == {"ada": 4, "bob": 2}
    messages = L2MChatMessageHistory("ada", kept).messages
    assert [(one.type, one.text) for one in messages[::2]] == [
        ("human", "Rosa lives in Porto."),
        ("human", "Where does Rosa live?"),
    ]


def test_what_was_told_is_read_with_its_day_and_only_in_its_session(kept: Collection, home: Settings) -> None:
    Conversation("ada", kept).add([Said("human", "Rosa lives in Porto."), Said("ai", "Rosa lives in Rome.")], MAY)
    Conversation("ada", kept).add([Said("human", "Where does Rosa live?")], JUNE)
    (found,) = Conversation("ada", kept).statements("Where does Rosa live?", 4)
    assert (found.chunk.document, found.chunk.text) == ("said on 8 May 2023", "Rosa lives in Porto.")
    assert Conversation("bob", kept).statements("Where does Rosa live?", 4) == []
    answer = l2m_rag.open("c", settings=home).ask(
        "Where does Rosa live?", abstain_below=0.0, also=lambda text: Conversation("ada", kept).statements(text, 4)
    )
    read = {one["chunk_id"] for step in answer.steps for one in step["read"]}  # type: ignore[attr-defined]
    assert found.chunk.id in read


def test_days_that_words_stand_for_are_told_where_the_program_runs(
    kept: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation("ada", kept)
    talk.add([Said("human", "Rosa came\nyesterday.", "Ada"), Said("ai", "Good.")], MAY + 16 * 3600)
    (found,) = talk.statements("Who came?", 4)
    assert found.chunk.text == "Rosa came\nyesterday [7 May 2023]."
    assert len(found.chunk.text) == found.chunk.end
    assert talk.recall("Rosa", 1)[0].text == "Ada: Rosa came\nyesterday."  # as it was said
    (near,) = talk.recall("Rosa", 1, around=1)
    assert near.text == "[8 May 2023] Ada: Rosa came yesterday [7 May 2023].\n[8 May 2023] ai: Good."
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # where it is one in the morning of the next day
    time.tzset()
    try:
        assert line_of(found_text := talk.texts()[0]).startswith("[9 May 2023] Ada: Rosa came yesterday [8 May 2023]")
        assert found_text.metadata["said_at"] == "2023-05-08T16:00:00+00:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_is_forgotten_while_it_is_recalled_is_left_out(kept: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation("ada", kept)
    talk.add([Said("human", "Rosa lives in Porto."), Said("human", "Rosa is a painter.")], MAY)
    (stays, _) = talk.texts()
    monkeypatch.setattr(talk, "texts", lambda: [stays])  # as if the other were deleted between search and reading
    (found,) = talk.recall("Rosa", around=1)
    assert (found.id, found.text) == (stays.id, "[8 May 2023] human: Rosa lives in Porto.")


def test_passages_of_another_search_stand_where_their_cosine_puts_them() -> None:
    def passage(name: str, score: float, dense: float | None) -> Passage:
        return Passage(Chunk(name, name, 0, None, "", 0, 1, "x"), score, dense)

    whole = merged([passage("a", 0.9, 0.6), passage("b", 0.5, 0.2)], [passage("c", 7.0, 0.4), passage("d", 7.0, None)])
    assert [(one.chunk.id, one.score) for one in whole] == [("a", 0.9), ("c", 0.5), ("b", 0.5), ("d", 0.5)]
    assert merged([], [passage("c", 7.0, 0.4)]) == [passage("c", 7.0, 0.4)]


def test_forgetting_leaves_nothing_in_the_files_and_says_what_went(home: Settings, kept: Collection) -> None:
    Conversation("ada", kept).add([Said("human", "Quixotic Rosa lives in Porto."), Said("ai", "Noted.")])
    Conversation("bob", kept).add([Said("human", "Zanzibar is warm.")])
    shown = json.loads(run("sessions", "show", "ada", "--json").stdout)["messages"]
    assert [one["text"] for one in shown] == ["human: Quixotic Rosa lives in Porto.", "ai: Noted."]
    assert isinstance(home.home, Path)
    assert files_with("Quixotic", home.home)
    result = run("sessions", "forget", "ada", shown[0]["id"])
    assert result.exit_code == 0, result.stderr
    assert "Quixotic Rosa lives in Porto." in result.stdout
    assert not files_with("Quixotic", home.home)
    assert files_with("Zanzibar", home.home)
    assert (
        json.loads(run("sessions", "forget", "ada", "--all", "--json").stdout)["forgotten"][0]["text"] == "ai: Noted."
    )
    assert run("sessions", "list", "--json").stdout == '{"sessions": [{"name": "bob", "messages": 1}]}\n'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "ada"), "there is no session 'ada'; there are: bob"),
        (("forget", "bob"), "give the ids of what to forget, or --all"),
        (("forget", "bob", "x", "--all"), "give the ids of what to forget, or --all"),
        (("forget", "bob", "x"), "session 'bob' holds no 'x'; see: l2m sessions show bob"),
        (("forget", "x' OR 'a'='a", "--all"), "there is no session"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_lost(
    kept: Collection, arguments: tuple[str, ...], said: str
) -> None:
    Conversation("bob", kept).add([Said("human", "Zanzibar is warm.")])
    result = run("sessions", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert sessions(kept) == {"bob": 1}


def test_the_ids_of_another_session_forget_nothing(kept: Collection) -> None:
    Conversation("bob", kept).add([Said("human", "Zanzibar is warm.")])
    Conversation("ada", kept).add([Said("human", "Rome is warm.")])
    theirs = Conversation("bob", kept).texts()[0].id
    assert Conversation("ada", kept).forget([theirs]) == []
    assert sessions(kept) == {"ada": 1, "bob": 1}


def test_a_session_without_a_name_is_refused(kept: Collection) -> None:
    with pytest.raises(UsageError, match=r"session \(''\)"):
        Conversation("", kept)
