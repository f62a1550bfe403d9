"""One thread that does the blocking work of an event loop, one piece after the other.

Neither a model nor a tokenizer may be used by two threads at once, and two answers at once take as long as one after
the other. That the thread is one is the lock: nothing is held that a client who goes away could leave held.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

from l2m_rag.errors import L2MError

T = TypeVar("T")
Say = Callable[[str], Awaitable[None]]
OnText = Callable[[str], None]


async def unheard(piece: str) -> None:
    """Take a piece of what is given whole in the end."""


LONGEST_QUEUE = 64
"""Pieces of work under way or waiting; what comes on top is refused."""


class BusyError(L2MError):
    """More is waiting than will be done soon."""


class _StoppedError(Exception):
    """Ends work whose client is gone, from inside."""


class Worker:
    """A thread with a queue; a context manager that waits for the thread at its end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="l2m-worker")
        self._places = threading.BoundedSemaphore(LONGEST_QUEUE)
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work.

        Raises:
            BusyError: the queue is full.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{LONGEST_QUEUE} requests are waiting; try again later")
        future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._places.release())
        return future

    async def do(self, work: Callable[[], T]) -> T:
        """Wait for a piece of work; cancelled while it waits in the queue, it is never begun."""
        return await asyncio.wrap_future(self.submit(work))

    async def stream(self, work: Callable[[OnText], T], say: Say = unheard) -> T:
        """Wait for work that gives text on the way, and pass the pieces on.

        Args:
            work: called with what takes a piece; when this is cancelled, the next piece ends the work.
            say: awaited with each piece that is not empty.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()

        def on_text(piece: str) -> None:
            if gone.is_set() or self._closing.is_set():
                raise _StoppedError
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        done = asyncio.wrap_future(self.submit(lambda: work(on_text)))
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                if piece:
                    await say(piece)
            return await done
        finally:
            gone.set()
            done.cancel()
