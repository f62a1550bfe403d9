"""OpenDocument text, sheets and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from l2m_rag.errors import LoadError
from l2m_rag.indexers.tables import row_lines
from l2m_rag.indexers.text import Source, TextBuilder, squeeze
from l2m_rag.indexers.zipped import Package, attribute, local
from l2m_rag.memory_tiers.records import Parsed, Scalar

if TYPE_CHECKING:
    from lxml import etree

_SKIPPED = frozenset(("tracked-changes", "scripts", "font-face-decls", "automatic-styles", "forms", "annotation-end"))
_SPACE = re.compile(r"[ \t\r\n]+")
_MAX_REPEAT = 1000  # sheets end with rows and cells repeated to the border of the grid


def parse_opendocument(source: Source) -> Parsed:
    """An OpenDocument file in its order: headings, sheets and slides as sections, tables a line per row."""
    package = Package(source.data)
    manifest = package.optional_xml("META-INF/manifest.xml")
    if manifest is not None and next(manifest.iter("{*}encryption-data"), None) is not None:
        raise LoadError("encrypted", "the OpenDocument file is protected by a password")
    root = package.xml("content.xml")
    body = next(root.iter("{*}body"), root)
    builder = TextBuilder(source.max_chars)
    first = _blocks(body, builder)
    metadata = _metadata(package)
    title = metadata.pop("title", None)
    return builder.build(source, title=str(title) if title else first, metadata=metadata)


def _metadata(package: Package) -> dict[str, Scalar]:
    root = package.optional_xml("meta.xml")
    wanted = {
        "title": "title",
        "creator": "author",
        "initial-creator": "author",
        "creation-date": "date",
        "date": "modified",
        "subject": "subject",
    }
    found: dict[str, Scalar] = {}
    for element in root.iter() if root is not None else ():
        key = wanted.get(local(element))
        if key and element.text and element.text.strip():
            found.setdefault(key, element.text)
    return found


def _blocks(root: etree._Element, builder: TextBuilder) -> str:
    """Add what is below an element; gives the first heading."""
    first = ""
    for element in root:
        name = local(element)
        if name == "h":
            text = _inline(element)
            if text.strip():
                builder.section(squeeze(text))
                first = first or squeeze(text)
            builder.line(text, "\n\n")
        elif name == "p":
            builder.line(_inline(element), "\n")
        elif name == "table":
            _table(element, builder)
        elif name == "page":
            builder.page()
            builder.section(_slide_title(element) or attribute(element, "name") or "", hard=True)
            first = first or _slide_title(element)
            _blocks(element, builder)
            builder.add("\n")
        elif name and name not in _SKIPPED:
            inner = _blocks(element, builder)
            first = first or inner
    return first


def _slide_title(page: etree._Element) -> str:
    for frame in page.iter("{*}frame"):
        if attribute(frame, "class") == "title":
            return squeeze(" ".join(_inline(paragraph) for paragraph in frame.iter("{*}p", "{*}h")))
    return ""


def _inline(paragraph: etree._Element) -> str:
    """The characters of a paragraph; white space in the XML itself counts as one blank."""
    pieces: list[str] = []
    stack: list[etree._Element | str] = _children(paragraph)
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            pieces.append(item)
            continue
        name = local(item)
        if name == "s":
            pieces.append(" " * min(_MAX_REPEAT, _count(item, "c")))
        elif name in ("tab", "line-break"):
            pieces.append("\t" if name == "tab" else "\n")
        elif name == "p":
            # Of a note or a frame anchored here; without a border its words would stick to those around it.
            pieces.append(" ")
            stack.append(" ")
            stack.extend(_children(item))
        elif name and name not in _SKIPPED:
            stack.extend(_children(item))
    return "".join(pieces)


def _children(element: etree._Element) -> list[etree._Element | str]:
    """The characters and elements inside, last first."""
    inside: list[etree._Element | str] = [element.text or ""]
    for child in element:
        inside.extend((child, child.tail or ""))
    return [_collapse(item) if isinstance(item, str) else item for item in reversed(inside)]


def _collapse(text: str) -> str:
    return _SPACE.sub(" ", text)


def _count(element: etree._Element, name: str) -> int:
    try:
        return max(1, int(attribute(element, name) or "1"))
    except ValueError:
        return 1


def _table(table: etree._Element, builder: TextBuilder) -> None:
    sheet = any(local(ancestor) == "spreadsheet" for ancestor in table.iterancestors())
    before = builder.length
    if sheet:
        builder.section(attribute(table, "name") or "", hard=True)
        for line in row_lines(_rows(table)):
            builder.line(line)
    else:
        for row in _rows(table):
            cells = [squeeze(cell) for cell in row]
            builder.line(" | ".join(cells) if any(cells) else "")
    if builder.length > before:
        builder.add("\n")


def _rows(table: etree._Element) -> Iterator[list[str]]:
    for row in table.iter("{*}table-row"):
        if next(row.iterancestors("{*}table")) is not table:
            continue
        cells: list[str] = []
        for cell in row:
            if local(cell) in ("table-cell", "covered-table-cell"):
                text = " ".join(_inline(paragraph) for paragraph in cell.iter("{*}p", "{*}h"))
                repeat = _count(cell, "number-columns-repeated")
                cells.extend([text or attribute(cell, "value") or ""] * min(repeat, _MAX_REPEAT))
        repeat = _count(row, "number-rows-repeated") if any(cells) else 1
        for _ in range(min(repeat, _MAX_REPEAT)):
            yield cells
