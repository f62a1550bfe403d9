"""An OpenAI-compatible endpoint, over a real loopback server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from l2m_rag.endpoint import Endpoint
from l2m_rag.errors import ConfigError, ModelError


class Handler(BaseHTTPRequestHandler):
    """Answers as such servers do, with what `behaviour` says."""

    behaviour = "good"
    seen: list[dict[str, Any]]

    def do_GET(self) -> None:
        body = {"data": [{"id": "big"}]} if self.behaviour != "empty" else {"data": []}
        self._send(200, json.dumps(body).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({**body, "authorization": self.headers.get("Authorization")})
        if self.behaviour == "refuse":
            self._send(401, b"no such key")
            return
        if self.behaviour == "garbage":
            self._send(200, b"data: {not json\n\n")
            return
        chunks = [
            {"choices": [{"delta": {"role": "assistant"}}]},
            *({"choices": [{"delta": {"content": c}}]} for c in ("Oslo", ", ", "Zürich")),
        ]
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ": ping\n\ndata: [DONE]\n\n"
        self._send(200, lines.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.behaviour, Handler.seen = "good", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_reply_is_streamed_with_model_and_key(url: str) -> None:
    endpoint = Endpoint(url + "/", key="secret")
    assert endpoint.name == "big"
    assert list(endpoint.reply("system", "user", most=9)) == ["Oslo", ", ", "Zürich"]
    sent = Handler.seen[0]
    assert (sent["model"], sent["max_tokens"], sent["authorization"]) == ("big", 9, "Bearer secret")
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]


def test_a_refusal_says_what_the_endpoint_said(url: str) -> None:
    Handler.behaviour = "refuse"
    with pytest.raises(ModelError, match="401: no such key"):
        list(Endpoint(url, model="m").reply("s", "u", most=1))


def test_garbage_is_an_error_and_not_an_answer(url: str) -> None:
    Handler.behaviour = "garbage"
    with pytest.raises(ModelError, match="broke off its reply"):
        list(Endpoint(url, model="m").reply("s", "u", most=1))


def test_an_endpoint_without_models_says_so(url: str) -> None:
    Handler.behaviour = "empty"
    with pytest.raises(ModelError, match="set llm_model"):
        Endpoint(url)


def test_nobody_there_is_one_clear_error() -> None:
    with pytest.raises(ModelError, match="cannot be reached"):
        list(Endpoint("http://127.0.0.1:9/v1", model="m").reply("s", "u", most=1))


def test_an_address_must_be_http() -> None:
    with pytest.raises(ConfigError, match="must begin with http"):
        Endpoint("file:///etc/passwd", model="m")
