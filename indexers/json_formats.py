"""JSON, JSON lines and Jupyter notebooks."""

from __future__ import annotations

import json
from collections.abc import Iterator

from l2m_rag.indexers.plain import markdown_sections
from l2m_rag.indexers.text import Source, TextBuilder, decode, lines, parsed
from l2m_rag.memory_tiers.records import Parsed

_TEXT_FIELDS = ("text", "content", "body", "passage", "context")
_TITLE_FIELDS = ("title", "headline", "subject", "name")
_ID_FIELDS = ("id", "_id", "doc_id", "docid")

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def read_json(text: str) -> Json:
    """The value of a JSON text.

    Raises:
        ValueError: if it is no JSON, or too deep to be read.
    """
    try:
        value: Json = json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    return value


def flatten(value: Json, path: str = "") -> Iterator[str]:
    """A line "path: value" for each leaf, in the order of the file, however deep it lies."""
    stack: list[tuple[str, Json]] = [(path, value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack.extend((f"{path}.{key}" if path else key, item) for key, item in reversed(value.items()))
        elif isinstance(value, list):
            stack.extend((f"{path}[{index}]", value[index]) for index in reversed(range(len(value))))
        elif value is not None and value != "":
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"{path}: {shown}" if path else shown


def parse_json(source: Source) -> Parsed:
    """JSON as "path: value" lines; what cannot be read as JSON stays as it is."""
    text, encoding = decode(source.data)
    try:
        value = read_json(text)
    except ValueError:
        # Several values in one file are JSON lines whatever the suffix says.
        return _parse_records(source, text, encoding)
    builder = TextBuilder(source.max_chars)
    for line in flatten(value):
        builder.line(line)
    title = value.get("title") if isinstance(value, dict) else None
    return builder.build(source, title=title if isinstance(title, str) else None, metadata={"encoding": encoding})


def parse_json_lines(source: Source) -> Parsed:
    """JSON lines: each record is a hard section with its title or id as the heading."""
    return _parse_records(source, *decode(source.data))


def _parse_records(source: Source, text: str, encoding: str) -> Parsed:
    builder = TextBuilder(source.max_chars)
    read = failed = 0
    for _, line in lines(text):
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except ValueError:
            failed += 1
            value = line
        else:
            read += 1
        record = _record_text(value)
        if record.strip():
            builder.section(_record_heading(value), hard=True)
            builder.add(record.strip("\n") + "\n\n")
    metadata = {"encoding": encoding}
    if failed >= read:
        return parsed(text, source, metadata=metadata)
    return builder.build(source, metadata={**metadata, "records": read})


def _field(value: Json, names: tuple[str, ...]) -> str:
    if isinstance(value, dict):
        for name in names:
            found = value.get(name)
            if isinstance(found, str | int) and not isinstance(found, bool) and str(found).strip():
                return str(found)
    return ""


def _record_text(value: Json) -> str:
    if isinstance(value, dict):
        for name in _TEXT_FIELDS:
            text = value.get(name)
            if isinstance(text, str) and text.strip():
                title = _field(value, _TITLE_FIELDS[:1])
                return f"{title}\n{text}" if title else text
    return "\n".join(flatten(value))


def _record_heading(value: Json) -> str:
    return _field(value, _TITLE_FIELDS) or _field(value, _ID_FIELDS)


def parse_notebook(source: Source) -> Parsed:
    """A Jupyter notebook: Markdown and code cells with their text outputs; sections at Markdown headings."""
    text, encoding = decode(source.data)
    try:
        notebook = read_json(text)
    except ValueError:
        return parsed(text, source, metadata={"encoding": encoding})
    builder = TextBuilder(source.max_chars)
    title = None
    for cell in _cells(notebook):
        content = _joined(cell.get("source", cell.get("input")))
        if not content.strip():
            continue
        if cell.get("cell_type") == "markdown":
            sections = tuple(markdown_sections(content))
            title = title or next((section.heading for section in sections if section.heading), None)
            builder.merge(content, sections)
        else:
            builder.add(content)
        builder.add("\n\n")
        for output in _output_texts(cell):
            builder.line(output.strip("\n"), "\n\n")
    metadata = {"encoding": encoding, "language": _language(notebook)}
    return builder.build(source, title=title, metadata=metadata)


def _cells(notebook: Json) -> Iterator[dict[str, Json]]:
    if not isinstance(notebook, dict):
        return
    sheets = notebook.get("worksheets")  # format 3 and older
    for holder in [notebook, *(sheets if isinstance(sheets, list) else [])]:
        cells = holder.get("cells") if isinstance(holder, dict) else None
        for cell in cells if isinstance(cells, list) else []:
            if isinstance(cell, dict):
                yield cell


def _joined(value: Json) -> str:
    if isinstance(value, list):
        return "".join(line for line in value if isinstance(line, str))
    return value if isinstance(value, str) else ""


def _output_texts(cell: dict[str, Json]) -> Iterator[str]:
    outputs = cell.get("outputs")
    for output in outputs if isinstance(outputs, list) else []:
        if not isinstance(output, dict):
            continue
        bundle = output.get("data")
        plain = bundle.get("text/plain") if isinstance(bundle, dict) else None
        yield _joined(output.get("text")) or _joined(plain)
        if output.get("output_type") in ("error", "pyerr"):
            yield f"{output.get('ename')}: {output.get('evalue')}"


def _language(notebook: Json) -> str:
    metadata = notebook.get("metadata") if isinstance(notebook, dict) else None
    kernel = metadata.get("kernelspec") if isinstance(metadata, dict) else None
    language = kernel.get("language") if isinstance(kernel, dict) else None
    return language if isinstance(language, str) else ""
