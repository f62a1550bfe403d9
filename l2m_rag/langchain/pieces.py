"""The pieces that a reply comes in, and where it stops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from langchain_core.messages import AIMessageChunk, UsageMetadata

from l2m_rag.qa import Answer


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Give pieces of a text up to where the one of some texts begins that is the first to be whole."""
    held = ""
    keep = max(map(len, stops), default=1) - 1  # of what is held, so much may be the beginning of one
    for piece in pieces:
        held += piece
        # the first to be whole, not to begin: where the text stops must not depend on the pieces that it comes in
        ends = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if ends:
            _, at = min(ends)
            if at:
                yield held[:at]
            return
        sure = len(held) - keep
        if sure > 0:
            yield held[:sure]
            held = held[sure:]
    if held:
        yield held


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


def pieces_of(ask: Callable[..., Answer], found: list[Answer]) -> Iterator[str]:
    """Give the pieces of an answer as they come, and the answer itself in `found`."""
    queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
    gone = Event()

    def say(piece: str) -> None:
        if gone.is_set():
            raise _GoneError
        queue.put(piece)

    def work() -> None:
        try:
            found.append(ask(on_text=say))
            queue.put(None)
        except _GoneError:
            pass
        except BaseException as error:  # it is raised where it is waited for
            queue.put(error)

    Thread(target=work, name="l2m-answer", daemon=True).start()
    try:
        while (got := queue.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            if got:
                yield got
    finally:
        gone.set()


def block(text: str, annotations: Sequence[Any] = (), **more: Any) -> AIMessageChunk:
    """Give a chunk of the one text block of an answer."""
    made: dict[str, Any] = {"type": "text", "text": text, "index": 0}
    return AIMessageChunk(content=[{**made, "annotations": list(annotations)} if annotations else made], **more)


def usage(prompt: int, generated: int) -> UsageMetadata:
    """Give what a reply took, in tokens."""
    return UsageMetadata(input_tokens=prompt, output_tokens=generated, total_tokens=prompt + generated)


def last(model: str, reason: str, **more: Any) -> dict[str, Any]:
    """Give what the last chunk of a reply says besides."""
    metadata = {"model_name": model, "finish_reason": reason, **more}
    return {"response_metadata": metadata, "chunk_position": "last"}
