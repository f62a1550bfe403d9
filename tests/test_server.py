"""`l2m serve`: who may speak to it, what it answers, and that nothing makes it stop answering."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from typer.testing import CliRunner

import l2m_rag.collection
import l2m_rag.config
from l2m_rag.cli.main import app
from l2m_rag.config import Settings
from l2m_rag.errors import (
    CollectionNotFound,
    ConfigError,
    CorruptError,
    IncompatibleError,
    L2MError,
    LockedError,
    MissingExtraError,
    ModelError,
    UsageError,
    WeightsError,
)
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.memory_tiers.texts import Text
from l2m_rag.qa import Answer
from l2m_rag.server import worker
from l2m_rag.server.guard import LONGEST_BODY, Guard, bind, server_names, url
from l2m_rag.server.http import application
from l2m_rag.server.library import Library
from l2m_rag.server.worker import Worker

HOME = "http://127.0.0.1:8077"
ROOT = Path(l2m_rag.config.__file__).parents[1]
MAIN = "import sys; sys.argv[0] = 'l2m'; from l2m_rag.cli.main import main; main()"
ASKED = {"question": "When does the lease end?"}
PATHS = [
    ("GET", "/collections", None),
    ("GET", "/openapi.json", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/l2m/contracts", None),
    ("POST", "/search", {"query": "rent"}),
    ("POST", "/ask", ASKED),
    ("POST", "/v1/chat/completions", {"model": "l2m/contracts", "messages": [{"role": "user", "content": "Rent?"}]}),
    ("POST", "/v1/embeddings", {"input": "rent"}),
]


@pytest.fixture(scope="module")
def thread() -> Iterator[Worker]:
    with Worker() as made:
        yield made


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(served: Settings, thread: Worker) -> Serve:
    """Gives a client of a server in this process, bound to loopback unless told otherwise."""

    def make(library: Library | None = None, *, token: str = "", own: Sequence[str] = ()) -> TestClient:
        names = {"localhost", "127.0.0.1", "::1", *own}
        made = application(library or Library(served), thread, token=token, is_own=names.__contains__)
        return TestClient(made, base_url=HOME, raise_server_exceptions=False)

    return make


def fault(response: Response, status: int, kind: str) -> str:
    """Give the text of an error, which has the one shape."""
    assert response.status_code == status, response.text
    found = response.json()
    assert list(found) == ["error"]
    assert list(found["error"]) == ["type", "message", "code"]
    assert found["error"]["type"] == kind
    message: str = found["error"]["message"]
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def events(text: str) -> list[tuple[str, Any]]:
    """Read server-sent events whose data is JSON."""
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


class Scripted(Library):
    """A library whose answers take as long as a test lets them."""

    def __init__(self, settings: Settings, pieces: int = 1000) -> None:
        super().__init__(settings)
        self.pieces = pieces
        self.said = 0
        self.asked: list[str] = []
        self.begun, self.ended = threading.Event(), threading.Event()

    def ask(self, question: str, *, on_text: Callable[[str], object] | None = None, **options: Any) -> Answer:
        self.asked.append(question)
        self.begun.set()
        try:
            for _ in range(self.pieces):
                time.sleep(0.01)
                assert on_text is not None
                on_text("word ")
                self.said += 1
        finally:
            self.ended.set()
        return Answer(
            question, "", "none", abstained=True, answerable_probability=0.12, tokens=dict.fromkeys(TOKENS, 1)
        )


TOKENS = ("prompt", "generated", "positions")


class Failing(Library):
    """A library that cannot."""

    def __init__(self, settings: Settings, error: Exception, after: int = 0) -> None:
        super().__init__(settings)
        self.error, self.after = error, after

    def ask(self, question: str, *, on_text: Callable[[str], object] | None = None, **options: Any) -> Answer:
        for _ in range(self.after):
            assert on_text is not None
            on_text("word ")
        raise self.error

    def search(self, *args: Any, **options: Any) -> list[Passage]:
        raise self.error


# -- who may speak to it


@pytest.mark.parametrize("host", ["127.0.0.1:8077", "localhost:9000", "LOCALHOST", "[::1]:8077"])
def test_names_of_this_machine_are_served(serve: Serve, host: str) -> None:
    assert serve().get("/health", headers={"host": host}).json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8077", "127.0.0.1.evil.example", "0.0.0.0:8077", ""])
@pytest.mark.parametrize("path", ["/", "/health", "/collections"])
def test_a_foreign_name_is_not_served(serve: Serve, host: str, path: str) -> None:
    fault(serve().get(path, headers={"host": host}), 421, "host")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", ""])
def test_the_pages_of_others_are_not_served(serve: Serve, origin: str) -> None:
    for method, path, body in PATHS:
        fault(serve().request(method, path, json=body, headers={"origin": origin}), 403, "origin")


def test_its_own_page_is_served(serve: Serve) -> None:
    assert serve().get("/collections", headers={"origin": HOME}).status_code == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "Basic s3cret", "Bearer s3cret2", "s3cret", "Bearer sécret"]
)
def test_without_the_token_nothing_but_the_page_and_the_sign_of_life(serve: Serve, given: str | None) -> None:
    client = serve(token="s3cret")
    headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
    for method, path, body in PATHS:
        response = client.request(method, path, json=body, headers=headers)
        fault(response, 401, "token")
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/").status_code == 200
    assert client.get("/health").status_code == 200


def test_with_the_token_everything(serve: Serve) -> None:
    client = serve(token="s3cret")
    for method, path, body in PATHS:
        response = client.request(method, path, json=body, headers={"authorization": "bearer s3cret"})
        assert response.status_code == 200, (path, response.text)


def test_every_path_is_among_those_that_these_tests_try(serve: Serve) -> None:
    found = serve().get("/openapi.json").json()["paths"]
    tried = {path for _, path, _ in PATHS} | {"/v1/models/{model}", "/health"}
    assert set(found) <= tried


def test_the_token_is_compared_in_constant_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return given == wanted

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert serve(token="s3cret").get("/collections", headers={"authorization": "Bearer s3"}).status_code == 401
    assert compared == [(b"s3", b"s3cret")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_with_a_token_only(host: str) -> None:
    with pytest.raises(UsageError, match="other machines can reach"):
        bind(host, 0, token="")
    with bind("0.0.0.0", 0, token="t") as bound:
        assert url(bound).startswith("http://0.0.0.0:")


@pytest.mark.parametrize("token", ["a b", "a\nb", "é"])
def test_a_token_that_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(UsageError, match="printable ASCII"):
        bind("127.0.0.1", 0, token=token)


def test_beyond_loopback_a_page_still_needs_a_name_of_this_server() -> None:
    with bind("0.0.0.0", 0, token="t") as bound:
        is_own = server_names("0.0.0.0", bound)
    for name in ("192.168.0.7", "2001:db8::1", "localhost", socket.gethostname().lower()):
        assert is_own(name)
    assert not is_own("evil.example")
    with bind("localhost", 0, token="") as bound:
        assert not server_names("localhost", bound)("192.168.0.7")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_what_a_form_of_a_page_can_send_is_not_taken(serve: Serve, media_type: str) -> None:
    response = serve().post("/ask", content=json.dumps(ASKED), headers={"content-type": media_type})
    fault(response, 415, "media_type")


def test_a_body_may_have_a_megabyte(serve: Serve) -> None:
    client = serve()
    headers = {"content-type": "application/json"}
    padded = json.dumps({"query": "rent"}).encode().ljust(LONGEST_BODY)
    assert client.post("/search", content=padded, headers=headers).status_code == 200
    fault(client.post("/search", content=padded + b" ", headers=headers), 413, "too_large")
    parts = iter([padded, b" "])  # without a Content-Length
    fault(client.post("/search", content=parts, headers=headers), 413, "too_large")


@pytest.mark.parametrize("name", ["../contracts", "/etc/passwd", "..", "", "a/b", "A", "x" * 65, ".hidden", "a\x00b"])
def test_a_name_that_could_be_a_path_is_refused(serve: Serve, name: str) -> None:
    client = serve()
    for path, body in (("/search", {"query": "rent"}), ("/ask", ASKED)):
        assert "name" in fault(client.post(path, json={**body, "collection": name}), 400, "usage")
    chat = {"model": f"l2m/{name}", "messages": [{"role": "user", "content": "Rent?"}]}
    fault(client.post("/v1/chat/completions", json=chat), 400, "usage")


@pytest.mark.parametrize("extra", ["file", "path", "home", "model"])
def test_files_of_the_server_cannot_be_asked_for(serve: Serve, extra: str) -> None:
    message = fault(serve().post("/ask", json={**ASKED, extra: "/etc/passwd"}), 400, "usage")
    assert message == f"{extra}: Extra inputs are not permitted"
    assert serve().post("/ingest", json={"path": "/etc"}).status_code == 404


def test_one_collection_can_be_all_that_is_shown(serve: Serve, served: Settings) -> None:
    client = serve(Library(served, only="contracts"))
    assert [entry["name"] for entry in client.get("/collections").json()["collections"]] == ["contracts"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["l2m/contracts"]
    message = fault(client.post("/ask", json={**ASKED, "collection": "letters"}), 404, "collection_not_found")
    assert message == "there is no collection 'letters'; there are: contracts"
    fault(client.get("/v1/models/l2m/letters"), 404, "collection_not_found")
    assert client.post("/ask", json=ASKED).status_code == 200


def test_what_people_said_is_shown_only_when_it_is_asked_for_alone(tmp_path: Path, embedder: Path) -> None:
    settings = Settings(home=tmp_path / "home", embedder=str(embedder))
    for name in ("conversations", "memories", "open"):
        l2m_rag.collection.open(name, settings=settings).put([Text("1", "Rosa lives in Porto.")])
    library = Library(settings)
    assert library.names() == ["open"]
    for name in ("conversations", "memories"):
        with pytest.raises(CollectionNotFound):
            library.search("Rosa", collection=name)
    alone = Library(settings, only="conversations")
    assert alone.names() == ["conversations"]
    assert len(alone.search("Rosa", collection="conversations")) == 1


def test_every_response_forbids_what_it_does_not_need(serve: Serve) -> None:
    client = serve()
    for response in (client.get("/health"), client.get("/nowhere"), client.get("/", headers={"host": "evil"})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "access-control-allow-origin" not in response.headers


# -- what it answers


def test_the_page_runs_its_own_script_and_nothing_else(serve: Serve) -> None:
    response = serve().get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_page_takes_nothing_from_elsewhere_and_sets_text_only() -> None:
    page = resources.files("l2m_rag.server").joinpath("page.html").read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(|\ssrc=|\son\w+=|\sstyle=", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", page)


def test_collections_are_listed_without_their_place_and_a_damaged_one_with_its_fault(serve: Serve) -> None:
    found = serve().get("/collections").json()
    assert found["default"] == "contracts"
    broken, contracts, letters = found["collections"]
    assert (contracts["name"], contracts["documents"], letters["name"]) == ("contracts", 2, "letters")
    assert "path" not in contracts
    assert broken["name"] == "broken"
    assert "cannot be read" in broken["error"]


def test_search_gives_the_json_of_the_command_line(
    serve: Serve, served: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "embedder", "collection"):
        monkeypatch.setenv(f"L2M_{name.upper()}", str(getattr(served, name)))
    printed = CliRunner().invoke(app, ["search", "rent", "-k", "2", "--json"], prog_name="l2m")
    found = serve().post("/search", json={"query": " rent ", "k": 2}).json()
    assert found == json.loads(printed.stdout)
    assert len(found["hits"]) == 2


@pytest.mark.parametrize("mode", ["hybrid", "dense", "text"])
def test_a_search_can_be_narrowed(serve: Serve, mode: str) -> None:
    body = {"query": "rent", "mode": mode, "where": "document LIKE '%evil.md'", "collection": "contracts"}
    found = serve().post("/search", json=body).json()["hits"]
    assert {hit["document"].rpartition("/")[2] for hit in found} == {"evil.md"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "query: Field required"),
        ({"query": "rent", "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"query": "rent", "k": 10**6}, "k: Input should be less than or equal to 1000"),
        ({"query": "rent", "mode": "magic"}, "mode: Input should be 'hybrid', 'dense' or 'text'"),
        ({"query": 7}, "query: Input should be a valid string"),
        ({"query": "?!"}, "the question needs at least one letter or digit"),
        ({"query": "x" * 100_001}, "the question has 100,001 characters; at most 100,000 can be asked"),
        ({"query": "rent", "where": "nonsense("}, "nonsense("),
        ([], "body: Input should be a valid dictionary"),
    ],
)
def test_a_search_that_cannot_be_made_says_why(serve: Serve, body: Any, message: str) -> None:
    assert message in fault(serve().post("/search", json=body), 400, "usage")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"query": NaN}',
        b"\xff",
        b"[" * 100_000,
        b"[" * 900 + b"]" * 900,
        b'{"query": "\\ud800 x"}',
        b'{"query": "a", "k": 1e999}',
    ],
)
def test_a_body_that_is_no_json_is_refused(serve: Serve, body: bytes) -> None:
    response = serve().post("/search", content=body, headers={"content-type": "application/json"})
    fault(response, 400, "usage")


def test_ask_gives_the_json_of_the_command_line(serve: Serve) -> None:
    found = serve().post("/ask", json=ASKED).json()
    outer = "id question answer answer_type abstained answerable_probability citations steps timings tokens"
    assert list(found) == outer.split()
    assert (found["id"], found["question"], found["abstained"]) == (None, ASKED["question"], False)
    assert found["answer"] == found["citations"][0]["quote"]


def test_a_streamed_answer_is_pieces_and_then_the_whole(serve: Serve) -> None:
    response = serve().post("/ask", json={**ASKED, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, (name, whole) = events(response.text)
    assert [name for name, _ in pieces] == ["piece"] * len(pieces)
    assert name == "answer"
    assert "".join(piece["text"] for _, piece in pieces) == whole["answer"]
    assert whole["citations"]


def test_free_text_comes_in_pieces(serve: Serve) -> None:
    response = serve().post("/ask", json={**ASKED, "stream": True, "free": True})
    *pieces, (name, whole) = events(response.text)
    assert len(pieces) > 20
    assert (name, whole["answer_type"]) == (
        "answer",
        "none",
    )  # what a model without training writes, no passage bears out


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UsageError("no"), 400, "usage"),
        (CollectionNotFound("no"), 404, "collection_not_found"),
        (IncompatibleError("no"), 409, "incompatible"),
        (LockedError("no"), 409, "locked"),
        (CorruptError("no"), 500, "corrupt"),
        (ConfigError("no"), 500, "config"),
        (ModelError("no"), 503, "model"),
        (WeightsError("no"), 503, "weights"),
        (L2MError("no"), 500, "error"),
    ],
)
def test_an_error_of_the_library_has_its_status(
    serve: Serve, served: Settings, error: L2MError, status: int, kind: str
) -> None:
    client = serve(Failing(served, error))
    for path, body in (("/search", {"query": "rent"}), ("/ask", ASKED), ("/ask", {**ASKED, "stream": True})):
        response = client.post(path, json=body)
        assert fault(response, status, kind) == "no"
        assert response.json()["error"]["code"] == error.code
    chat = {"model": "l2m/contracts", "messages": [{"role": "user", "content": "Rent?"}], "stream": True}
    assert fault(client.post("/v1/chat/completions", json=chat), status, kind) == "no"


def test_a_fault_of_the_server_tells_nothing_of_its_inside(
    serve: Serve, served: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(Failing(served, RuntimeError("/secret/path")))
    for body in (ASKED, {**ASKED, "stream": True}):
        message = fault(client.post("/ask", json=body), 500, "internal")
        assert message == "the server failed (RuntimeError); its log says more"
    assert "/secret/path" in caplog.text
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("error", "kind"), [(ModelError("broke off"), "model"), (RuntimeError("/secret/path"), "internal")]
)
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    serve: Serve, served: Settings, error: Exception, kind: str
) -> None:
    client = serve(Failing(served, error, after=2))
    response = client.post("/ask", json={**ASKED, "stream": True})
    assert [name for name, _ in events(response.text)] == ["piece", "piece", "error"]
    assert events(response.text)[-1][1]["error"]["type"] == kind
    assert "/secret" not in response.text
    chat = {"model": "l2m/contracts", "messages": [{"role": "user", "content": "Rent?"}], "stream": True}
    last = events(client.post("/v1/chat/completions", json=chat).text)[-1]
    assert last[1]["error"]["type"] == kind


def test_paths_and_methods_that_are_not_there(serve: Serve) -> None:
    assert fault(serve().get("/nowhere"), 404, "path") == "GET /nowhere: Not Found"
    response = serve().get("/ask")
    fault(response, 405, "method")
    assert response.headers["allow"] == "POST"
    assert serve().get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_a_collection_that_was_made_anew_is_read_anew(served: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The first text.")
    (tmp_path / "b.txt").write_text("The second text.")
    library = Library(served)
    made = l2m_rag.collection.open("changing", settings=served)
    made.ingest(tmp_path / "a.txt")
    assert library.search("text", collection="changing")[0].chunk.text == "The first text."
    made.delete()
    with pytest.raises(CollectionNotFound):
        library.search("text", collection="changing")
    made.ingest(tmp_path / "b.txt")
    assert library.search("text", collection="changing")[0].chunk.text == "The second text."
    made.delete()


# -- the interface of OpenAI's API


def chat(*messages: tuple[str, object], **options: object) -> dict[str, object]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return {"model": "l2m/contracts", "messages": turns, **options}


def test_each_collection_is_a_model(serve: Serve) -> None:
    found = serve().get("/v1/models").json()
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["l2m/broken", "l2m/contracts", "l2m/letters"]
    for model in found["data"]:
        assert list(model) == ["id", "object", "created", "owned_by"]
        assert (model["object"], type(model["created"])) == ("model", int)
    assert serve().get("/v1/models/l2m/letters").json() == found["data"][2]
    fault(serve().get("/v1/models/gpt"), 404, "collection_not_found")


def test_a_completion_has_the_fields_of_the_wire_format(serve: Serve) -> None:
    asked = chat(("user", "When does the lease end?"), temperature=0.7, max_tokens=5, user="x", tools=[])
    found = serve().post("/v1/chat/completions", json=asked).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", found["id"])
    assert (found["object"], found["model"]) == ("chat.completion", "l2m/contracts")
    assert abs(found["created"] - time.time()) < 60
    (choice,) = found["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == found["citations"][0]["quote"]
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert set(found["citations"][0]) == {"n", "document", "page", "start", "end", "quote", "score"}


def test_a_streamed_completion_is_lines_of_data_that_end_with_done(serve: Serve) -> None:
    asked = chat(("user", "When does the lease end?"), stream=True, stream_options={"include_usage": True})
    response = serve().post("/v1/chat/completions", json=asked)
    assert all(line.startswith("data: ") for line in response.text.split("\n\n") if line)
    assert response.text.endswith("data: [DONE]\n\n")
    first, *pieces, last, usage = [chunk for _, chunk in events(response.text)[:-1]]
    assert {chunk["object"] for chunk in (first, *pieces, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *pieces, last, usage)}) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in pieces)
    assert text == last["citations"][0]["quote"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, *pieces, last)] == [None] * (1 + len(pieces)) + [
        "stop"
    ]
    assert last["choices"][0]["delta"] == {}
    assert (usage["choices"], usage["usage"]["total_tokens"] > 0) == ([], True)
    plain = serve().post("/v1/chat/completions", json=chat(("user", "When does the lease end?"), stream=True))
    assert all("usage" not in chunk for _, chunk in events(plain.text)[:-1])


def test_the_last_message_of_the_user_is_the_question_and_the_turns_before_are_the_history(
    serve: Serve, served: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: dict[str, Any] = {}

    def note(self: object, question: str, **options: Any) -> Answer:
        noted.update(options, question=question)
        return Answer(
            question, "yes", "span", abstained=False, answerable_probability=1, tokens=dict.fromkeys(TOKENS, 1)
        )

    monkeypatch.setattr(l2m_rag.collection.Collection, "ask", note)
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "where?"}]
    turns = [
        ("system", "Be brief."),
        ("assistant", "Hello!"),
        ("user", "When?"),
        ("assistant", "In April."),
        ("assistant", "Of 2029."),
        ("user", "Sure?"),
        ("user", parts),
        ("assistant", None),
    ]
    assert serve().post("/v1/chat/completions", json=chat(*turns, free=True)).status_code == 200
    assert noted["question"] == "And\nwhere?"
    assert list(noted["history"]) == [("When?", "In April.\nOf 2029."), ("Sure?", "")]
    assert noted["free"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_that_there_is_no_answer_is_a_message_that_says_so(serve: Serve, served: Settings, stream: bool) -> None:
    said = "The documents do not answer this (probability that they do: 12 %)."
    client = serve(Scripted(served, pieces=0))
    response = client.post("/v1/chat/completions", json=chat(("user", "Who?"), stream=stream))
    if stream:
        chunks = [chunk for _, chunk in events(response.text)[:-1]]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said
        assert chunks[-1]["citations"] == []
    else:
        found = response.json()
        assert (found["choices"][0]["message"]["content"], found["citations"]) == (said, [])
        assert found["choices"][0]["finish_reason"] == "stop"


def test_what_was_streamed_and_is_not_borne_out_is_followed_by_that(serve: Serve, served: Settings) -> None:
    client = serve(Scripted(served, pieces=2))
    response = client.post("/v1/chat/completions", json=chat(("user", "Who?"), stream=True))
    chunks = [chunk for _, chunk in events(response.text)[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text.startswith("word word \n\nThe documents do not answer this")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat(("system", "Hello")), "one with the role 'user'"),
        (chat(), "messages: List should have at least 1 item"),
        (chat(("user", "")), "at least one letter or digit"),
        (chat(("user", [{"type": "image_url", "image_url": {"url": "x"}}])), "text only, not 'image_url'"),
        (chat(("user", "Who?"), n=2), "n: Input should be 1"),
    ],
)
def test_a_completion_that_cannot_be_made_says_why(serve: Serve, body: object, message: str) -> None:
    assert message in fault(serve().post("/v1/chat/completions", json=body), 400, "usage")


def test_embeddings_come_as_numbers_and_as_text(serve: Serve, served: Settings) -> None:
    client = serve()
    asked = {"input": ["the rent", "the lease"], "model": "any"}
    found = client.post("/v1/embeddings", json=asked).json()
    assert (found["object"], found["model"]) == ("list", served.embedder)
    assert [(row["object"], row["index"]) for row in found["data"]] == [("embedding", 0), ("embedding", 1)]
    rows = np.array([row["embedding"] for row in found["data"]], dtype=np.float32)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert found["usage"] == {"prompt_tokens": 15, "total_tokens": 15}  # the small embedder's tokens are letters
    coded = client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    same = [np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in coded["data"]]
    assert np.allclose(same, rows, atol=1e-2)
    assert len(client.post("/v1/embeddings", json={"input": "the rent", "dimensions": 32}).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "1 to 2,048 texts"),
        ({"input": ["a", ""]}, "not empty"),
        ({"input": ["a"] * 2049}, "2,049"),
        ({"input": [1, 2]}, "input"),
        ({"input": "a", "dimensions": 7}, "dimensions (7) must be 32"),
    ],
)
def test_what_cannot_be_embedded_is_refused(serve: Serve, body: object, message: str) -> None:
    assert message in fault(serve().post("/v1/embeddings", json=body), 400, "usage")


# -- one answer at a time, and nothing that stops it


def asgi(library: Library, thread: Worker) -> Guard:
    return application(library, thread, token="", is_own=lambda name: True)


def test_it_lives_while_an_answer_is_computed(served: Settings, thread: Worker) -> None:
    library = Scripted(served, pieces=100)

    async def main() -> None:
        transport = httpx2.ASGITransport(asgi(library, thread))
        async with httpx2.AsyncClient(transport=transport, base_url=HOME) as client:
            asked = [asyncio.create_task(client.post("/ask", json={"question": name})) for name in ("one", "two")]
            await asyncio.to_thread(library.begun.wait, 5)
            for path in ("/health", "/", "/collections", "/v1/models"):
                assert (await client.get(path)).status_code == 200
            assert library.asked == ["one"]  # and not two at once
            assert not library.ended.is_set()
            assert [(await answer).status_code for answer in asked] == [200, 200]

    asyncio.run(main())
    assert library.asked == ["one", "two"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(served: Settings, thread: Worker, stream: bool) -> None:
    library = Scripted(served)
    left = threading.Event()

    async def main() -> None:
        leave = asyncio.Event()
        body = json.dumps({**ASKED, "stream": stream}).encode()
        waiting = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            if (message := next(waiting, None)) is None:
                await leave.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            assert not left.is_set()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/ask", "headers": headers, "query_string": b""}
        call = asyncio.create_task(asgi(library, thread)(scope, receive, send))
        await asyncio.to_thread(library.begun.wait, 5)
        await asyncio.sleep(0.05)
        leave.set()
        await asyncio.wait_for(call, 2)

    asyncio.run(main())
    assert library.ended.wait(2)
    assert library.said < library.pieces / 2
    began = time.monotonic()
    assert thread.submit(lambda: "free").result(5) == "free"
    assert time.monotonic() - began < 1


def test_a_client_that_goes_away_in_the_queue_is_never_answered(served: Settings) -> None:
    library = Scripted(served, pieces=30)

    async def main() -> None:
        with Worker() as own:
            first = asyncio.create_task(own.stream(lambda say: library.ask("one", on_text=say)))
            second = asyncio.create_task(own.stream(lambda say: library.ask("two", on_text=say)))
            await asyncio.to_thread(library.begun.wait, 5)
            second.cancel()
            await first
            assert await own.do(lambda: "free") == "free"

    asyncio.run(main())
    assert library.asked == ["one"]


def test_a_full_queue_is_an_error(served: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_QUEUE", 1)
    free = threading.Event()
    with Worker() as own:
        own.submit(free.wait)
        client = TestClient(asgi(Library(served), own), base_url=HOME)
        message = fault(client.post("/search", json={"query": "rent"}), 503, "busy")
        assert message == "1 requests are waiting; try again later"
        assert client.get("/health").status_code == 200
        free.set()
        deadline = time.monotonic() + 5
        while client.post("/search", json={"query": "rent"}).status_code != 200:
            assert time.monotonic() < deadline


def test_the_end_does_not_wait_for_an_answer_that_is_being_written(served: Settings) -> None:
    library = Scripted(served)
    with Worker() as own:

        async def main() -> None:
            asked = asyncio.create_task(own.stream(lambda say: library.ask("one", on_text=say)))
            await asyncio.to_thread(library.begun.wait, 5)
            asked.cancel()

        asyncio.run(main())
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert library.ended.is_set()


# -- the command


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "l2m: other machines can reach 0.0.0.0: give --token (or L2M_TOKEN), or leave"),
        (["--token", "a b"], 2, "l2m: the token must be printable ASCII"),
        (["--host", "192.0.2.1", "--token", "t"], 1, "l2m: cannot listen on 192.0.2.1:8077: "),
        (["--host", "no.such.invalid"], 1, "l2m: cannot listen on no.such.invalid:8077: "),
        (["--model", "a", "--llm-url", "http://x"], 2, "l2m: --model and --llm-url exclude each other"),
        (["--port", "0", "-c", "nothing"], 10, "l2m: there is no collection 'nothing'"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, message: str
) -> None:
    monkeypatch.setenv("L2M_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["serve", *args], prog_name="l2m")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2M_HOME", str(tmp_path))
    with bind("127.0.0.1", 0, token="") as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--port", port], prog_name="l2m")
    line = f"l2m: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, ["serve"], prog_name="l2m")
    assert result.exit_code == MissingExtraError.code
    assert result.stderr == f"l2m: {package} is not installed; run: pip install 'l2m-rag[server]'\n"


def test_help_imports_no_server() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from l2m_rag.cli.main import app;"
        "CliRunner().invoke(app, ['--help']); CliRunner().invoke(app, ['serve', '--help']);"
        "heavy = ('fastapi', 'starlette', 'uvicorn', 'mcp', 'torch');"
        "print([module for module in heavy if module in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def start(served: Settings, *args: str, first: str = "") -> subprocess.Popen[str]:
    """Start the program with the settings of the test, after some first statement."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("L2M_")}
    names = ("home", "embedder", "model", "budget", "abstain_below", "collection")
    variables = {f"L2M_{name.upper()}": str(getattr(served, name)) for name in names}
    return subprocess.Popen(
        [sys.executable, "-c", f"{first}\n{MAIN}", "serve", "--port", "0", *args],
        env={**clean, **variables, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(served.data)},
        cwd=served.data,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_program_answers_and_sigterm_ends_it_also_in_the_middle_of_an_answer(served: Settings) -> None:
    process = start(served, "--json", "--token", "s3cret")
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())["listening"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/collections", timeout=10)

    def ask(**options: object) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
        body = json.dumps({**ASKED, "stream": True, **options}).encode()
        return urllib.request.urlopen(urllib.request.Request(f"{address}/ask", body, headers), timeout=60)

    with ask() as response:
        assert "server" not in response.headers
        assert events(response.read().decode())[-1][0] == "answer"
    with ask(free=True) as response:
        assert response.readline() == b"event: piece\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert process.communicate() == ("", "")


def test_ctrl_c_ends_it(served: Settings) -> None:
    light = "import l2m_rag.server.library as library; library.Library.warm = lambda self: None"
    process = start(served, first=light)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"l2m: listening on (http://127\.0\.0\.1:\d+), Ctrl-C ends\n", line)
    assert found, line
    with urllib.request.urlopen(f"{found[1]}/health", timeout=10) as response:
        assert json.load(response) == {"status": "ok"}
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
