"""What a conversation says: its turns for a prompt, what was asked last, and what tools gave since then."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.content import Citation, create_citation

from l2m_rag.config import Settings
from l2m_rag.conversation import line_of
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.records import Chunk, Passage
from l2m_rag.memory_tiers.texts import Text
from l2m_rag.models import closeness

REMEMBERED = "Said before, with its day:"
"""What a message of the system holds before lines of `remembering`."""
_LINE = re.compile(r"\[(\d{1,2} \w+ \d{4})\] (?:human: )?(.+)")
_UNREAD = ("image", "audio", "video", "file", "image_url", "input_audio", "document", "media")


@dataclass(frozen=True, slots=True)
class Asked:
    """The end of a conversation.

    Args:
        question: what the user said last; "" when nothing.
        history: (said by the user, answered) before that, oldest first.
        results: what tools gave since then, oldest first.
        remembered: what was said in earlier conversations.
    """

    question: str
    history: list[tuple[str, str]]
    results: list[ToolMessage]
    remembered: list[Passage]


def asked(messages: Sequence[BaseMessage]) -> Asked:
    """Give what was asked last.

    Raises:
        UsageError: there is no message, or one holds something that is no text.
    """
    if not messages:
        raise UsageError("there is no message to answer")
    history: list[tuple[str, str]] = []
    last = max((at for at, one in enumerate(messages) if isinstance(one, HumanMessage)), default=-1)
    for message in messages[: max(last, 0)]:
        if isinstance(message, HumanMessage):
            history.append((said(message), ""))
        elif isinstance(message, AIMessage) and history:
            question, answer = history[-1]
            history[-1] = (question, f"{answer}\n{said(message)}".strip())
    results = [one for one in messages[last + 1 :] if isinstance(one, ToolMessage)]
    systems = [said(one) for one in messages if isinstance(one, SystemMessage)]
    return Asked(said(messages[last]) if last >= 0 else "", history, results, remembered("\n".join(systems)))


def remembering(texts: Sequence[Text]) -> str:
    """Tell a model what was said in earlier conversations; `remembered` reads it."""
    return "\n".join([REMEMBERED, *map(line_of, texts)])


def remembered(text: str) -> list[Passage]:
    """Give what `remembering` told as passages to read."""
    _, _, told = text.partition(REMEMBERED)
    found = [match for line in told.splitlines() if (match := _LINE.fullmatch(line))]
    return [
        Passage(Chunk(f"said:{n}", f"said on {match[1]}", n, None, "", 0, len(match[2]), match[2]), 0.0)
        for n, match in enumerate(found)
    ]


def said(message: BaseMessage) -> str:
    """Give the text of a message.

    Raises:
        UsageError: it holds something else.
    """
    if not isinstance(message.content, str):
        kinds = [str(block.get("type")) for block in message.content if isinstance(block, dict)]
        other = [kind for kind in kinds if kind in _UNREAD]
        if other:
            raise UsageError(f"messages may hold text only, not {other[0]!r}")
    return str(message.text)


def turns(messages: Sequence[BaseMessage]) -> list[tuple[str, str]]:
    """Give (role, text) of messages; what tools were asked and gave is told as text."""
    told = []
    for message in messages:
        text = said(message)
        if isinstance(message, AIMessage):
            calls = [f"{call['name']}({json.dumps(call['args'], ensure_ascii=False)})" for call in message.tool_calls]
            told.append(("assistant", "\n".join(filter(None, [text, *calls]))))
        elif isinstance(message, ToolMessage):
            told.append(("user", f"{message.name or 'The tool'} gave: {text}"))
        else:
            told.append(("system" if isinstance(message, SystemMessage) else "user", text))
    return told


def documents_of(result: ToolMessage) -> list[Document]:
    """Give the documents that a tool found, if it is one that finds documents."""
    found = result.artifact if isinstance(result.artifact, list) else []
    return [one for one in found if isinstance(one, Document)]


def told(result: ToolMessage) -> tuple[str, list[Citation]]:
    """Give what a tool gave as the text of a reply, and what it cites."""
    if isinstance(result.artifact, dict) and result.artifact.get("citations"):  # an answer of `ask_documents`
        cited = [citation(one) for one in result.artifact["citations"]]
        return str(result.artifact["answer"]), cited
    cited = [
        create_citation(title=str(one.metadata.get("source") or one.id or ""), cited_text=one.page_content)
        for one in documents_of(result)
    ]
    return said(result).strip(), cited


def citation(one: Mapping[str, Any], start: int | None = None, end: int | None = None) -> Citation:
    """Give a citation of this library as one of LangChain.

    Args:
        one: fields of `l2m_rag.qa.Citation`.
        start: character of the reply from which on it rests on this.
        end: character just behind it.
    """
    where = {key: one[key] for key in ("document", "page", "start", "end", "score")}
    return create_citation(title=one["document"], cited_text=one["quote"], start_index=start, end_index=end, **where)


def passages(results: Sequence[ToolMessage]) -> list[Passage]:
    """Give what tools gave as passages to read: the documents of a search, else the paragraphs of its text."""
    found = []
    for number, result in enumerate(results):
        given = documents_of(result) or [
            Document(paragraph, metadata={"source": result.name or "tool"}, id=f"{result.tool_call_id}:{at}")
            for at, paragraph in enumerate(said(result).split("\n\n"))
            if paragraph.strip()
        ]
        found += [passage_of(document, at, f"{number}:{at}") for at, document in enumerate(given)]
    return found


def passage_of(document: Document, at: int, name: str = "") -> Passage:
    """Give a document as a passage to read, which no search has scored.

    Args:
        document: that was found.
        at: its place among those that were found, from 0.
        name: its id, where it has none.
    """
    facts = document.metadata
    start, page = facts.get("start"), facts.get("page")
    start = start if isinstance(start, int) else 0
    text = document.page_content
    made = Chunk(
        document.id or name or str(at),
        str(facts.get("source") or document.id or ""),
        at,
        page if isinstance(page, int) else None,
        str(facts.get("heading") or ""),
        start,
        start + len(text),
        text,
    )
    return Passage(made, 0.0)


def with_cosines(settings: Settings, question: str, found: Sequence[Passage]) -> list[Passage]:
    """Give passages with their cosines to a question, as scores too."""
    close = closeness(settings, question, [one.chunk.text for one in found])
    return [Passage(one.chunk, cosine, cosine) for one, cosine in zip(found, close, strict=True)]
