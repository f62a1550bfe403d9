"""`l2m serve`: collections over HTTP, for programs in JSON and for people as one page.

The event loop only takes requests and passes text on; what uses a model is done by the one thread of a `Worker`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, Literal

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException

from l2m_rag import __version__
from l2m_rag.config import Settings
from l2m_rag.errors import L2MError
from l2m_rag.memory_tiers.records import hits
from l2m_rag.server import completions
from l2m_rag.server.guard import Body, Guard, problem, refusal, server_names, url
from l2m_rag.server.library import Library
from l2m_rag.server.streams import ClientGoneError, EventStream, event, unexpected, unless_gone
from l2m_rag.server.worker import OnText, Say, Worker

_SECONDS_TO_END = 3  # that answers under way have when the server ends


class _Body(Body):
    model_config = ConfigDict(extra="forbid")

    collection: str | None = None
    """Name of a collection; the server's own choice when it is not given."""


class SearchBody(_Body):
    """What `POST /search` takes."""

    query: str
    k: int = Field(default=10, ge=1, le=1000)
    mode: Literal["hybrid", "dense", "text"] = "hybrid"
    where: str | None = None


class AskBody(_Body):
    """What `POST /ask` takes."""

    question: str
    free: bool = False
    stream: bool = False


class _Paths:
    """What the server answers on its own paths."""

    def __init__(self, library: Library, worker: Worker) -> None:
        self._library = library
        self._worker = worker
        self._page, self._policy = _page()
        self.router = APIRouter()
        self.router.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        self.router.add_api_route("/health", self.health, methods=["GET"])
        self.router.add_api_route("/collections", self.collections, methods=["GET"])
        self.router.add_api_route("/search", self.search, methods=["POST"])
        self.router.add_api_route("/ask", self.ask, methods=["POST"])

    async def page(self) -> Response:
        """Give the page for people."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})

    async def health(self) -> Response:
        """Say that the server is there, also while an answer is being computed."""
        return JSONResponse({"status": "ok"})

    async def collections(self) -> Response:
        """List the collections, also while an answer is being computed."""
        entries = await asyncio.to_thread(self._library.entries)
        return JSONResponse({"collections": entries, "default": self._library.settings.collection})

    async def search(self, request: Request, body: SearchBody) -> Response:
        """Find the passages that fit a text; the JSON is that of `l2m search --json`."""
        options = body.model_dump(exclude={"query"})
        work = partial(self._library.search, body.query, **options)
        passages = await unless_gone(request.receive, self._worker.do(work))
        return JSONResponse({"id": None, "query": body.query.strip(), "hits": hits(passages)})

    async def ask(self, request: Request, body: AskBody) -> Response:
        """Answer a question; the JSON is that of `l2m ask --json`.

        Streamed, it is an event `piece` with `{"text"}` for each piece of the answer and then an event `answer` with
        the whole, which holds also where pieces came before that it does not bear out.
        """

        def work(on_text: OnText) -> dict[str, object]:
            answer = self._library.ask(body.question, collection=body.collection, free=body.free, on_text=on_text)
            return {"id": None, **answer.to_json()}

        async def produce(say: Say) -> None:
            whole = await self._worker.stream(work, lambda piece: say(event({"text": piece}, "piece")))
            await say(event(whole, "answer"))

        if body.stream:
            return EventStream(produce)
        return JSONResponse(await unless_gone(request.receive, self._worker.stream(work)))


def application(library: Library, worker: Worker, *, token: str, is_own: Callable[[str], bool]) -> Guard:
    """Give the server as an ASGI application.

    Args:
        library: the collections.
        worker: the thread that works on them.
        token: bearer token that requests must carry, "" for none.
        is_own: says whether the name in a Host header is one of this server.
    """
    handlers: dict[int | type[Exception], Any] = {
        L2MError: _refuse,
        RequestValidationError: _refuse_body,
        HTTPException: _refuse_request,
        ClientGoneError: _say_nothing,
        Exception: _fail,
    }
    app = FastAPI(title="l2m", version=__version__, docs_url=None, redoc_url=None, exception_handlers=handlers)
    app.include_router(_Paths(library, worker).router)
    app.include_router(completions.Paths(library, worker).router)
    return Guard(app, token=token, is_own=is_own)


async def _refuse(request: Request, error: L2MError) -> Response:
    return refusal(error)


async def _refuse_body(request: Request, error: RequestValidationError) -> Response:
    faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
    return problem(400, "usage", "; ".join(faults[:5]), 2)


async def _refuse_request(request: Request, error: HTTPException) -> Response:
    kind = {404: "path", 405: "method"}.get(error.status_code, "usage")
    response = problem(error.status_code, kind, f"{request.method} {request.url.path}: {error.detail}")
    response.headers.update(error.headers or {})
    return response


async def _say_nothing(request: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)  # nobody hears it


async def _fail(request: Request, error: Exception) -> Response:
    return unexpected(error)


def _page() -> tuple[str, str]:
    """Give the page, and a content security policy that lets it run its own script and style and nothing else."""
    page = resources.files("l2m_rag.server").joinpath("page.html").read_text("utf-8")

    def digest(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return page, policy


def serve(
    settings: Settings,
    bound: socket.socket,
    *,
    host: str,
    token: str,
    only: str | None,
    on_ready: Callable[[str], None],
) -> None:
    """Answer requests until SIGINT or SIGTERM, which then takes its course.

    Args:
        settings: how collections are read and asked.
        bound: a socket that `guard.bind` gave.
        host: as the user gave it.
        token: see `application`.
        only: the one collection that is shown; None shows all.
        on_ready: called with the server's address once it listens.
    """
    with Worker() as worker:
        library = Library(settings, only=only)
        app = application(library, worker, token=token, is_own=server_names(host, bound))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        bound.listen()
        on_ready(url(bound))
        worker.submit(library.warm)
        uvicorn.Server(config).run(sockets=[bound])
