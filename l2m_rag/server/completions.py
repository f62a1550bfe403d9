"""The interface of OpenAI's API, for the many programs that speak it: models, chat completions, embeddings.

A collection is a model, `l2m/NAME`. What the messages of the system, temperatures and tools say is not used: an answer
is made from the passages of the collection.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from l2m_rag.errors import CollectionNotFound, UsageError
from l2m_rag.qa import Answer, abstention
from l2m_rag.server.guard import Body
from l2m_rag.server.library import Library
from l2m_rag.server.streams import EventStream, event, unless_gone
from l2m_rag.server.worker import OnText, Say, Worker

PREFIX = "l2m/"


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str = ""


class Message(BaseModel):
    """A message of a conversation."""

    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        """Give what the message says.

        Raises:
            UsageError: it holds something else than text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        other = [part.type for part in self.content if part.type != "text"]
        if other:
            raise UsageError(f"messages may hold text only, not {other[0]!r}")
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """How a completion is streamed."""

    include_usage: bool = False


class ChatBody(Body):
    """What `POST /v1/chat/completions` takes; other fields are let through and not used."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    free: bool = False
    """Let the model use its own words; no field of OpenAI's."""


class EmbeddingsBody(Body):
    """What `POST /v1/embeddings` takes."""

    input: str | list[str]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Paths:
    """What the server answers under /v1."""

    def __init__(self, library: Library, worker: Worker) -> None:
        self._library = library
        self._worker = worker
        self.router = APIRouter(prefix="/v1")
        self.router.add_api_route("/models", self.models, methods=["GET"])
        self.router.add_api_route("/models/{model:path}", self.model, methods=["GET"])
        self.router.add_api_route("/chat/completions", self.complete, methods=["POST"])
        self.router.add_api_route("/embeddings", self.embed, methods=["POST"])

    async def models(self) -> Response:
        """List the collections as models."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._library.names()]})

    async def model(self, model: str) -> Response:
        """Describe one of them."""
        name = model.removeprefix(PREFIX)
        if name not in self._library.names():
            raise CollectionNotFound(f"there is no model {model!r}; GET /v1/models lists them")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        return {"id": PREFIX + name, "object": "model", "created": self._library.made_at(name), "owned_by": "l2m"}

    async def complete(self, request: Request, body: ChatBody) -> Response:
        """Answer the last message of the user; the turns before it are the history."""
        question, history = _conversation(body.messages)
        collection = body.model.removeprefix(PREFIX)
        ask = partial(self._library.ask, question, collection=collection, free=body.free, history=history)

        def work(on_text: OnText) -> Answer:
            return ask(on_text=on_text)

        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _Chunks({**head, "object": "chat.completion.chunk"}, usage)
            return EventStream(partial(stream.produce, partial(self._worker.stream, work)))
        answer = await unless_gone(request.receive, self._worker.stream(work))
        message = {"role": "assistant", "content": _content(answer), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(answer),
                "citations": _citations(answer),
            }
        )

    async def embed(self, request: Request, body: EmbeddingsBody) -> Response:
        """Embed texts with the embedder of the settings."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not all(texts) or not 1 <= len(texts) <= 2048:
            raise UsageError(f"input must be 1 to 2,048 texts that are not empty; these are {len(texts):,}")
        work = partial(self._embed, texts, body.dimensions)
        name, vectors, tokens = await unless_gone(request.receive, self._worker.do(work))
        as_text = body.encoding_format == "base64"
        rows: list[object] = [_base64(vector) if as_text else vector.tolist() for vector in vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})

    def _embed(self, texts: list[str], dimensions: int | None) -> tuple[str, Any, int]:
        embedder = self._library.embedder()
        if dimensions not in (None, embedder.dimension):
            raise UsageError(f"dimensions ({dimensions}) must be {embedder.dimension}, which {embedder.name} gives")
        return embedder.name, embedder.encode(texts), sum(len(spans) for spans in embedder.spans(texts))


class _Chunks:
    """The chunks of one streamed completion."""

    def __init__(self, head: dict[str, object], usage: bool) -> None:
        self._head = head
        self._usage = usage
        self._begun = False

    async def produce(self, stream: Any, say: Say) -> None:
        answer: Answer = await stream(partial(self._piece, say))
        if answer.abstained:  # what was written before is not borne out by the passages
            await self._piece(say, ("\n\n" if self._begun else "") + abstention(answer))
        await say(event({**self._chunk({}, "stop"), "citations": _citations(answer)}))
        if self._usage:
            await say(event({**self._head, "choices": [], "usage": _usage(answer)}))
        await say("data: [DONE]\n\n")

    async def _piece(self, say: Say, text: str) -> None:
        if not self._begun:
            self._begun = True
            await say(event(self._chunk({"role": "assistant", "content": ""})))
        await say(event(self._chunk({"content": text})))

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk: dict[str, object] = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._usage else chunk


def _conversation(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str]]]:
    """Give the question, and the (question, answer) pairs before it, oldest first."""
    asked = [number for number, message in enumerate(messages) if message.role == "user"]
    if not asked:
        raise UsageError("messages must hold one with the role 'user': the question")
    history: list[tuple[str, str]] = []
    for message in messages[: asked[-1]]:
        if message.role == "user":
            history.append((message.text(), ""))
        elif message.role == "assistant" and history:
            question, said = history[-1]
            history[-1] = (question, f"{said}\n{message.text()}".strip())
    return messages[asked[-1]].text(), history


def _content(answer: Answer) -> str:
    return abstention(answer) if answer.abstained else answer.answer


def _citations(answer: Answer) -> list[dict[str, object]]:
    return [asdict(citation) for citation in answer.citations]


def _usage(answer: Answer) -> dict[str, int]:
    prompt, generated = answer.tokens["prompt"], answer.tokens["generated"]
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _base64(vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
