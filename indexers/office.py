"""Office Open XML: Word, PowerPoint and Excel files."""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from l2m_rag.errors import LoadError
from l2m_rag.indexers.markup import decode_html, render_html
from l2m_rag.indexers.tables import row_lines
from l2m_rag.indexers.text import Source, TextBuilder, squeeze
from l2m_rag.indexers.zipped import Package, attribute, local
from l2m_rag.memory_tiers.records import Parsed, Scalar

if TYPE_CHECKING:
    from lxml import etree

_HEADING_STYLE = re.compile(r"(?:heading\s*\d|title\Z)", re.IGNORECASE)
_DELETED = frozenset(("del", "moveFrom", "Fallback", "instrText", "delText", "pPr", "rPr", "tblPr", "sectPr"))
_WORD_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-", "ptab": "\t"}
_GRAPHICS = (
    "word/charts/chart",
    "word/diagrams/data",
    "xl/charts/chart",
    "xl/diagrams/data",
    "xl/drawings/drawing",
)
_SHEET_COMMENTS = ("xl/comments", "xl/threadedComments/")
_WORD_NOTES = (
    ("footnotes", "Footnotes"),
    ("endnotes", "Endnotes"),
    ("comments", "Comments"),
    ("header", "Headers"),
    ("footer", "Footers"),
)


def main_part(package: Package) -> str:
    """The member that holds the document itself."""
    for kind, name in package.relations("").values():
        if kind == "officeDocument":
            return name
    raise LoadError("corrupt", "the Office file has no main part")


def core_properties(package: Package) -> dict[str, Scalar]:
    """Title, author and dates of an Office file."""
    root = package.optional_xml("docProps/core.xml")
    wanted = {
        "title": "title",
        "creator": "author",
        "created": "date",
        "modified": "modified",
        "subject": "subject",
        "keywords": "keywords",
    }
    found: dict[str, Scalar] = {}
    for element in root if root is not None else ():
        key = wanted.get(local(element))
        if key and element.text and element.text.strip():
            found[key] = element.text
    return found


def _finish(source: Source, package: Package, builder: TextBuilder, title: str | None = None) -> Parsed:
    metadata = core_properties(package)
    own = metadata.pop("title", None)
    return builder.build(source, title=str(own) if own else title, metadata=metadata)


def parse_docx(source: Source) -> Parsed:
    """A Word file in document order, headings as sections, tables a line per row, notes at the end."""
    package = Package(source.data)
    part = main_part(package)
    root = package.xml(part)
    relations = package.relations(part)
    styles = _heading_styles(package, relations)
    builder = TextBuilder(source.max_chars)
    _word_blocks(root, builder, styles)
    title = builder.first_heading
    seen: set[str] = set()
    for kind, heading in _WORD_NOTES:
        for name in sorted(name for found, name in relations.values() if found == kind):
            notes = package.optional_xml(name)
            note = TextBuilder(source.max_chars)
            if notes is not None:
                _word_blocks(notes, note, {})
            text = note.text()
            # The same running head often stands in several parts, for first, odd and even pages.
            if text.strip() and text not in seen:
                seen.add(text)
                builder.section(heading)
                builder.add(text)
    for name in (name for kind, name in relations.values() if kind == "aFChunk" and name in package):
        # A page of another format that Word takes in when it opens the file.
        if name.lower().endswith((".html", ".htm", ".xhtml")):
            render_html(decode_html(package.read(name))[0], builder, source.max_chars)
    _graphics(package, _GRAPHICS, "Figures", builder)
    return _finish(source, package, builder, title)


def _graphics(package: Package, parts: tuple[str, ...], heading: str, builder: TextBuilder) -> None:
    """Add the words of charts, diagrams, drawings or comments as a section."""
    builder.section(heading, hard=True)
    for name in package.names:
        if name.startswith(parts):
            for text in _graphic_texts(package.optional_xml(name)):
                builder.line(text)


def _graphic_texts(root: etree._Element | None) -> Iterator[str]:
    if root is not None:
        yield from _drawing_paragraphs(root)
        for comment in root.iter("{*}comment", "{*}threadedComment"):
            yield squeeze("".join(comment.itertext()))
        names = (value.text or "" for value in root.iter("{*}v"))
        yield "; ".join(dict.fromkeys(name for name in names if not _is_number(name)))


def _heading_styles(package: Package, relations: dict[str, tuple[str, str]]) -> dict[str, bool]:
    """Which paragraph styles are headings, by their names, outline levels and ancestors."""
    name = next((name for kind, name in relations.values() if kind == "styles"), "")
    root = package.optional_xml(name)
    own: dict[str, bool] = {}
    parents: dict[str, str] = {}
    for style in root if root is not None else ():
        if local(style) != "style":
            continue
        key = attribute(style, "styleId") or ""
        for child in style.iter():
            if local(child) == "name":
                own[key] = own.get(key, False) or bool(_HEADING_STYLE.match(attribute(child, "val") or ""))
            elif local(child) == "basedOn":
                parents[key] = attribute(child, "val") or ""
            elif local(child) == "outlineLvl":
                own[key] = (attribute(child, "val") or "9") < "9"
    for key in list(own):
        ancestor, steps = key, 0
        while not own.get(ancestor) and ancestor in parents and steps < 20:
            ancestor, steps = parents[ancestor], steps + 1
        own[key] = own.get(ancestor, False)
    return own


def _word_blocks(root: etree._Element, builder: TextBuilder, styles: dict[str, bool]) -> None:
    """Add the paragraphs and tables below an element, in order."""
    for element in root:
        name = local(element)
        if name == "p":
            text, boxes = _word_paragraph(element)
            if text.strip() and _is_heading(element, styles):
                builder.section(squeeze(text))
            builder.line(text.strip("\n"), "\n\n")
            for box in boxes:
                _word_blocks(box, builder, styles)
        elif name == "tbl":
            for row in _rows(element):
                builder.line(row)
            if builder.length:
                builder.add("\n")
        elif name not in _DELETED and name:
            _word_blocks(element, builder, styles)


def _is_heading(paragraph: etree._Element, styles: dict[str, bool]) -> bool:
    properties = next((child for child in paragraph if local(child) == "pPr"), None)
    for child in properties if properties is not None else ():
        if local(child) == "pStyle":
            style = attribute(child, "val") or ""
            if styles.get(style, bool(_HEADING_STYLE.match(style))):
                return True
        elif local(child) == "outlineLvl":
            return (attribute(child, "val") or "9") < "9"
    return False


def _word_paragraph(paragraph: etree._Element) -> tuple[str, list[etree._Element]]:
    """The characters of a paragraph, and the text boxes that hang on it."""
    pieces: list[str] = []
    boxes: list[etree._Element] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        name = local(element)
        if name == "t":
            pieces.append("".join(element.itertext()))
        elif name in _WORD_MARKS:
            pieces.append(_WORD_MARKS[name])
        elif name == "txbxContent":
            boxes.append(element)
        elif name == "sym":
            pieces.append(_symbol(attribute(element, "char") or ""))
        elif name not in _DELETED:
            stack.extend(reversed(element))
    return "".join(pieces), boxes


def _symbol(code: str) -> str:
    """A character of a symbol font; those in the private area have no meaning outside of it."""
    try:
        number = int(code, 16)
    except ValueError:
        return ""
    return "•" if 0xF000 <= number <= 0xF0FF else chr(number) if 32 <= number < 0xD800 else ""


def _rows(table: etree._Element) -> Iterator[str]:
    """A line per row of a table, whatever its cells hold."""
    for row in table.iter("{*}tr"):
        if next(row.iterancestors("{*}tbl")) is not table:
            continue  # of a table inside a cell, which is rendered as part of that cell
        cells = []
        for cell in row.iter("{*}tc"):
            if next(cell.iterancestors("{*}tr")) is row:
                cells.append(squeeze(" ".join(_paragraph_texts(cell))))
        if any(cells):
            yield " | ".join(cells).rstrip(" |")


def _paragraph_texts(element: etree._Element) -> Iterator[str]:
    for paragraph in element.iter("{*}p"):
        if not any(local(ancestor) in _DELETED for ancestor in paragraph.iterancestors()):
            yield _word_paragraph(paragraph)[0]


def parse_pptx(source: Source) -> Parsed:
    """A presentation: each slide is a page and a hard section; its notes follow it."""
    package = Package(source.data)
    part = main_part(package)
    root = package.xml(part)
    relations = package.relations(part)
    builder = TextBuilder(source.max_chars)
    first = ""
    for identifier in root.iter("{*}sldId"):
        # The relation is the attribute with a namespace; the plain one is a number.
        key = next((value for name, value in identifier.attrib.items() if name.endswith("}id")), "")
        name = relations.get(str(key), ("", ""))[1]
        slide = package.optional_xml(name)
        builder.page()
        if slide is None:
            continue
        title = _slide_title(slide)
        first = first or title
        builder.section(title, hard=True)
        related = package.relations(name)
        _shapes(slide, builder, package, related)
        for notes in (target for kind, target in related.values() if kind == "notesSlide"):
            _notes(package.optional_xml(notes), builder)
        builder.add("\n")
    return _finish(source, package, builder, first)


def _placeholder(shape: etree._Element) -> str | None:
    """The kind of placeholder that a shape is, or None."""
    mark = next(shape.iter("{*}ph"), None)
    return None if mark is None else mark.get("type", "body")


def _slide_title(slide: etree._Element) -> str:
    for shape in slide.iter("{*}sp"):
        if _placeholder(shape) in ("title", "ctrTitle"):
            return squeeze(" ".join(_drawing_paragraphs(shape)))
    return ""


def _shapes(root: etree._Element, builder: TextBuilder, package: Package, related: dict[str, tuple[str, str]]) -> None:
    """Add the text of all shapes, in their order; groups and tables included."""
    for element in root:
        name = local(element)
        if name == "sp":
            if _placeholder(element) not in ("sldNum", "dt", "ftr"):
                for text in _drawing_paragraphs(element):
                    builder.line(text)
        elif name == "graphicFrame":
            _frame(element, builder, package, related)
        elif name and name != "Fallback":
            _shapes(element, builder, package, related)


def _frame(frame: etree._Element, builder: TextBuilder, package: Package, related: dict[str, tuple[str, str]]) -> None:
    """Add a table, a diagram or the words of a chart."""
    for table in frame.iter("{*}tbl"):
        for row in table.iter("{*}tr"):
            cells = [squeeze(" ".join(_drawing_paragraphs(cell))) for cell in row if local(cell) == "tc"]
            builder.line(" | ".join(cells) if any(cells) else "")
    for reference in frame.iter("{*}relIds", "{*}chart"):
        key = attribute(reference, "dm") or attribute(reference, "id") or ""
        for text in _graphic_texts(package.optional_xml(related.get(key, ("", ""))[1])):
            builder.line(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _drawing_paragraphs(root: etree._Element) -> Iterator[str]:
    """The paragraphs of DrawingML text."""
    for paragraph in root.iter("{*}p"):
        pieces = []
        for element in paragraph.iter("{*}t", "{*}br", "{*}tab"):
            pieces.append("".join(element.itertext()) if local(element) == "t" else "\v")
        text = "\n".join(line for line in map(squeeze, "".join(pieces).split("\v")) if line)
        if text:
            yield text


def _notes(root: etree._Element | None, builder: TextBuilder) -> None:
    texts: list[str] = []
    for shape in root.iter("{*}sp") if root is not None else ():
        if _placeholder(shape) == "body":
            texts.extend(_drawing_paragraphs(shape))
    if texts:
        builder.add("Notes: " + "\n".join(texts) + "\n")


def parse_xlsx(source: Source) -> Parsed:
    """A workbook: each sheet is a hard section, each row a line of its own."""
    package = Package(source.data)
    import openpyxl
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

    workbook = openpyxl.load_workbook(io.BytesIO(source.data), read_only=True, data_only=True, keep_links=False)
    builder = TextBuilder(source.max_chars)
    try:
        for sheet in workbook.worksheets:
            builder.section(sheet.title, hard=True)
            if isinstance(sheet, ReadOnlyWorksheet):
                sheet.reset_dimensions()  # what the file says of its size is often wrong
            before = builder.length
            for line in row_lines(_cells(sheet.iter_rows(values_only=True))):
                builder.line(line)
            if builder.length > before:
                builder.add("\n")
    finally:
        workbook.close()
    _graphics(package, _SHEET_COMMENTS, "Comments", builder)
    _graphics(package, _GRAPHICS, "Figures", builder)
    return _finish(source, package, builder)


def _cells(rows: Iterable[tuple[object, ...]]) -> Iterator[list[str]]:
    for row in rows:
        yield [_cell_text(value) for value in row]


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, ".15g")
    if isinstance(value, datetime.datetime):
        at_midnight = value.time() == datetime.time()
        return value.date().isoformat() if at_midnight else value.isoformat(" ", "seconds")
    return str(value)
