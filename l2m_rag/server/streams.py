"""Answers over HTTP that come piece by piece, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from l2m_rag.errors import L2MError
from l2m_rag.server.guard import problem, refusal
from l2m_rag.server.worker import Say

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client did not wait for its answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for a client, and cancel it when the client goes away.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events.

    The response begins with the first event, so that what fails before it still has a status of its own.

    Args:
        produce: awaited with what takes one event (see `event`).
    """

    def __init__(self, produce: Callable[[Say], Awaitable[None]]) -> None:
        super().__init__((), media_type="text/event-stream")
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client is gone."""
        begun = False

        async def say(text: str) -> None:
            nonlocal begun
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                begun = True
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def produce() -> None:
            try:
                await self._produce(say)
            except Exception as error:
                if not begun:
                    raise
                await say(event(_worded(error), "error"))

        with suppress(ClientGoneError):
            await unless_gone(receive, produce())
            await send({"type": "http.response.body", "body": b""})


def event(value: object, name: str = "") -> str:
    """Give a server-sent event whose data is JSON, on one line."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _worded(error: Exception) -> object:
    response = refusal(error) if isinstance(error, L2MError) else unexpected(error)
    return json.loads(bytes(response.body))


def unexpected(error: Exception) -> JSONResponse:
    """Log an error that should not happen, and give the response for it, which tells no more than its type."""
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return problem(500, "internal", f"the server failed ({type(error).__name__}); its log says more", 1)
