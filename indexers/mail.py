"""Mail: single messages and mailboxes."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.header import decode_header
from email.message import Message

from l2m_rag.errors import LoadError
from l2m_rag.indexers.markup import decode_html, render_html
from l2m_rag.indexers.text import Source, TextBuilder, decode, decode_as, one_line, squeeze
from l2m_rag.memory_tiers.records import Parsed

_HEADERS = ("From", "To", "Cc", "Date", "Subject")
_MESSAGE_START = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\r\n\r\n)|(?<=\r\r))From [^\r\n]*\r?\n?")
_MAX_PARTS = 1000


def parse_eml(source: Source) -> Parsed:
    """One message: headers, text, names of the attachments."""
    builder = TextBuilder(source.max_chars)
    message = _message(source.data)
    if not message.keys():
        raise LoadError("corrupt", "the file is no mail message")
    subject = _add_message(message, builder)
    metadata = {"author": _header(message, "From"), "date": _header(message, "Date")}
    return builder.build(source, title=subject, metadata=metadata)


def parse_mbox(source: Source) -> Parsed:
    """A mailbox: each message is a hard section with its subject as the heading."""
    starts = [match.span() for match in _MESSAGE_START.finditer(source.data)]
    if not starts:
        return parse_eml(source)
    builder = TextBuilder(source.max_chars)
    ends = [start for start, _ in starts[1:]] + [len(source.data)]
    title = ""
    for (_, begin), end in zip(starts, ends, strict=True):
        subject = _add_message(_message(source.data[begin:end]), builder)
        title = title or subject
    return builder.build(source, title=title, metadata={"messages": len(starts)})


def _message(data: bytes) -> Message:
    # The old policy keeps headers as they came; the new one raises on many that are malformed.
    return email.message_from_bytes(data.lstrip(b"\r\n"), policy=email.policy.compat32)


def _header(message: Message, name: str) -> str:
    """A header, decoded as well as it can be."""
    value = message.get(name)
    if value is None:
        return ""
    try:
        # A header with raw bytes comes as an object whose text has lost them.
        raw = next(text for key, text in message.raw_items() if key.lower() == name.lower())
        parts = decode_header(str(raw).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    except (ValueError, StopIteration, LookupError):
        return one_line(str(value))
    return one_line("".join(_header_part(part, charset) for part, charset in parts))


def _header_part(part: str | bytes, charset: str | None) -> str:
    if isinstance(part, str):
        return part
    try:
        return decode_as(part, charset)[0] if part else ""
    except LoadError:
        return part.decode("latin-1")


def _add_message(message: Message, builder: TextBuilder) -> str:
    """Add a message as a hard section; gives its subject."""
    subject = _header(message, "Subject")
    builder.section(subject, hard=True)
    for name in _HEADERS:
        value = _header(message, name)
        builder.line(f"{name}: {value}" if value else "")
    builder.add("\n")
    attachments: list[str] = []
    parts = [0]
    for text in _bodies(message, attachments, parts):
        builder.line(text.strip("\n"), "\n\n")
    if attachments:
        builder.add(f"Attachments: {', '.join(attachments)}\n\n")
    return subject


def _bodies(message: Message, attachments: list[str], parts: list[int]) -> Iterator[str]:
    """The texts of a message, of alternatives the plain one; the names of other parts go to `attachments`."""
    parts[0] += 1
    if parts[0] > _MAX_PARTS:
        return
    payload: object = message.get_payload()
    name = message.get_filename()
    kind = message.get_content_type()
    if kind == "message/rfc822" and isinstance(payload, list) and isinstance(inner := payload[0], Message):
        heads = ((header, _header(inner, header)) for header in _HEADERS)
        yield "\n".join(f"{header}: {value}" for header, value in heads if value)
        yield from _bodies(inner, attachments, parts)
    elif isinstance(payload, list):
        children = [part for part in payload if isinstance(part, Message)]
        if kind == "multipart/alternative":
            children = _preferred(children)
        for part in children:
            yield from _bodies(part, attachments, parts)
    elif name or message.get_content_disposition() == "attachment":
        attachments.append(one_line(_header_text(name or "unnamed")))
    elif kind.startswith("text/"):
        yield _text(message, kind)


def _header_text(value: str) -> str:
    try:
        return "".join(_header_part(part, charset) for part, charset in decode_header(value))
    except ValueError:
        return value


def _preferred(parts: list[Message]) -> list[Message]:
    """The plain text among alternatives; if it is empty, the last one that is not."""
    for part in parts:
        if part.get_content_type() == "text/plain" and _text(part, "text/plain").strip():
            return [part]
    return parts[-1:]


def _text(message: Message, kind: str) -> str:
    payload = message.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    charset = message.get_content_charset()
    if kind == "text/html":
        text = decode_as(payload, charset)[0] if charset else decode_html(payload)[0]
        page = TextBuilder(10 * len(text) + 1000)
        render_html(text, page, 10 * len(text) + 1000)
        return page.text()
    try:
        text = decode_as(payload, charset)[0] if charset else decode(payload)[0]
    except LoadError:
        text = payload.decode("cp1252", "replace")
    return "\n".join(line.rstrip() for line in text.splitlines())


def looks_like_mail(head: bytes) -> bool:
    """Whether the first bytes of a file are the headers of a message."""
    names = re.findall(rb"^(From|To|Subject|Date|Received|Message-ID|MIME-Version|Return-Path):", head, re.M | re.I)
    lines = head.split(b"\n", 1)
    return len({squeeze(name.decode()).lower() for name in names}) >= 3 and b":" in lines[0]
