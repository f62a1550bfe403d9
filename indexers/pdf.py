"""PDF: text page by page, through PDFium, and through pypdf where PDFium gives up."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from l2m_rag.errors import LoadError
from l2m_rag.indexers.text import Source, TextBuilder, squeeze
from l2m_rag.memory_tiers.records import Parsed, Scalar

if TYPE_CHECKING:
    import pypdfium2

_PDFIUM = threading.Lock()  # PDFium may be used by one thread at a time only
_MAX_PAGES = 100_000
_MAX_OUTLINE = 5000
# PDFium marks a hyphen at the end of a line with U+0002 or U+FFFE: a word that goes on in the next line.
_BROKEN_WORD = re.compile("[\x02\ufffe](?:\r\n|\n|\r)?")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")
_DATE = re.compile(r"(?:D:)?(\d{4})(\d\d)?(\d\d)?")
_FIELDS = {"Author": "author", "CreationDate": "date", "Subject": "subject", "Keywords": "keywords"}


def parse_pdf(source: Source) -> Parsed:
    """The text layer of a PDF, its pages, and its outline as sections."""
    builder = TextBuilder(source.max_chars)
    try:
        with _PDFIUM:
            title, metadata = _with_pdfium(source.data, builder)
    except _UnreadableError:
        builder = TextBuilder(source.max_chars)
        title, metadata = _with_pypdf(source.data, builder)
    try:
        return builder.build(source, title=title, metadata=metadata)
    except LoadError as error:
        if error.reason == "no_text":
            raise LoadError("no_text", "the PDF has no text layer; it may be scanned") from None
        raise


class _UnreadableError(Exception):
    """PDFium cannot open the file."""


def _with_pdfium(data: bytes, builder: TextBuilder) -> tuple[str, dict[str, Scalar]]:
    import pypdfium2
    from pypdfium2 import raw

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == raw.FPDF_ERR_PASSWORD or "assword" in str(error):
            raise LoadError("encrypted", "the PDF is protected by a password") from error
        raise _UnreadableError from error
    try:
        count = len(document)
        if not 0 < count <= _MAX_PAGES:
            raise _UnreadableError
        headings = _outline(document, count)
        readable = 0
        for number in range(count):
            text = _page_text(document, number)
            readable += text is not None
            _add_page(builder, tidy(text or ""), headings.get(number, []))
        if not readable:
            raise _UnreadableError
        return _properties(document.get_metadata_dict())
    finally:
        document.close()


def _page_text(document: pypdfium2.PdfDocument, number: int) -> str | None:
    """The characters of a page, or None if it is damaged."""
    import pypdfium2

    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return None
    try:
        textpage = page.get_textpage()
        try:
            return str(textpage.get_text_bounded())
        finally:
            textpage.close()
    except pypdfium2.PdfiumError:
        return None
    finally:
        page.close()


def tidy(text: str) -> str:
    """The text of a page with plain line ends, broken words joined and control characters left out."""
    text = _BROKEN_WORD.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(line.rstrip() for line in _CONTROLS.sub("", text).split("\n"))


def _add_page(builder: TextBuilder, text: str, headings: list[str]) -> None:
    """Add a page, with a section where each of its headings stands, or at its top."""
    builder.page()
    position = 0
    for heading in headings:
        found = _find(text, heading, position)
        builder.add(text[position:found])
        builder.section(heading)
        position = found
    builder.add(text[position:] + "\n\n")


def _find(text: str, heading: str, start: int) -> int:
    """Where the words of a heading stand in the text, else `start`."""
    words = [re.escape(word) for word in heading.split()[:12]]
    match = re.compile(r"\s+".join(words), re.IGNORECASE).search(text, start) if words else None
    if match is None:
        return start
    return match.start()


def _outline(document: pypdfium2.PdfDocument, count: int) -> dict[int, list[str]]:
    """Titles of the outline by page."""
    import pypdfium2

    found: dict[int, list[str]] = {}
    try:
        for number, item in enumerate(document.get_toc(max_depth=6)):
            if number == _MAX_OUTLINE:
                break
            destination = item.get_dest()
            page = destination.get_index() if destination is not None else None
            title = squeeze(item.get_title())
            if page is not None and 0 <= page < count and title:
                found.setdefault(page, []).append(title)
    except pypdfium2.PdfiumError:
        return {}
    return found


def _properties(fields: dict[str, str]) -> tuple[str, dict[str, Scalar]]:
    metadata: dict[str, Scalar] = {}
    for field, key in _FIELDS.items():
        value = tidy(fields.get(field) or "").strip()
        if key == "date" and value:
            match = _DATE.match(value)
            value = "-".join(part for part in match.groups() if part) if match else value
        if value:
            metadata[key] = value
    return tidy(fields.get("Title") or ""), metadata


def _with_pypdf(data: bytes, builder: TextBuilder) -> tuple[str, dict[str, Scalar]]:
    import pypdf
    from pypdf.errors import FileNotDecryptedError, LimitReachedError

    # It reports every repair it makes; what cannot be read is told by the error below.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise LoadError("encrypted", "the PDF is protected by a password")
        for text in _pypdf_pages(reader):
            _add_page(builder, tidy(text), [])
        if not builder.length:
            raise LoadError("corrupt", "the PDF has no pages that can be read")
        return _properties({str(key).lstrip("/"): str(value) for key, value in (reader.metadata or {}).items()})
    except FileNotDecryptedError as error:
        raise LoadError("encrypted", "the PDF is protected by a password") from error
    except LimitReachedError as error:
        raise LoadError("too_large", f"the PDF unpacks to too much: {error}") from error


def _pypdf_pages(reader: Any) -> Iterator[str]:
    for number, page in enumerate(reader.pages):
        if number == _MAX_PAGES:
            raise LoadError("too_large", f"the PDF has more than {_MAX_PAGES} pages")
        yield page.extract_text() or ""
