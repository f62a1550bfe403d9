"""Rows of tables as lines that make sense on their own; CSV and TSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from l2m_rag.indexers.text import Source, TextBuilder, decode, parsed, squeeze
from l2m_rag.memory_tiers.records import Parsed

_NUMBER = re.compile(r"[-+(]?[$€£¥]?\s*[\d.,' ]*\d[\d.,' ]*(?:[eE][-+]?\d+)?\s*[%)€]?\Z|\d{4}-\d\d-\d\d")
_HEADER_CHARS = 100
_SNIFF_CHARS = 1 << 16
_SNIFF_ROWS = 50


def is_header(row: Sequence[str]) -> bool:
    """Whether a row names columns: at least two short different texts, none of them a number."""
    names = [cell for cell in row if cell]
    return (
        len(names) >= 2
        and len(set(names)) == len(names)
        and 2 * len(names) >= len(row)
        and not any(len(name) > _HEADER_CHARS or _NUMBER.match(name) for name in names)
    )


def row_lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """One line per row, "header: value; header: value" below a header row.

    A blank row ends a table. The next block has a header of its own if its first row looks like one and other
    columns are in use; else the header stays in force.
    """
    header: list[str] = []
    columns: set[int] = set()
    fresh = True
    for row in rows:
        cells = [squeeze(cell) for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if not cells:
            fresh = True
            continue
        used = {index for index, cell in enumerate(cells) if cell}
        if fresh and len(used) > 1:
            fresh = False
            if is_header(cells) and used != columns:
                header, columns = cells, used
                yield "; ".join(cell for cell in cells if cell)
                continue
            if not used <= columns:
                header, columns = [], set()
        # A lone cell between tables is a caption, not a value of the first column.
        yield _row_line(cells, [] if fresh else header)


def _row_line(cells: list[str], header: list[str]) -> str:
    values = []
    for index, cell in enumerate(cells):
        name = header[index] if index < len(header) else ""
        if cell:
            values.append(f"{name}: {cell}" if name else cell)
    return "; ".join(values)


def parse_csv(source: Source) -> Parsed:
    """CSV or TSV, a line per row; what is no table stays as it is."""
    text, encoding = decode(source.data)
    delimiter = sniff_delimiter(text)
    if delimiter is not None:
        builder = TextBuilder(source.max_chars)
        try:
            for line in row_lines(_reader(text, delimiter)):
                builder.line(line)
        except csv.Error:
            delimiter = None  # one quote that is never closed swallows the rest of the file
        else:
            return builder.build(source, metadata={"encoding": encoding, "delimiter": delimiter})
    return parsed(text, source, metadata={"encoding": encoding})


def _reader(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def sniff_delimiter(text: str) -> str | None:
    """The delimiter that splits the first rows most evenly, or None if there is no table."""
    head = text[:_SNIFF_CHARS]
    best: tuple[float, int, str] | None = None
    for delimiter in ",;\t|":
        widths = []
        try:
            for row in _reader(head, delimiter):
                if row:
                    widths.append(len(row))
                if len(widths) == _SNIFF_ROWS:
                    break
        except csv.Error:
            continue
        if len(head) < len(text) and len(widths) > 1:
            widths.pop()  # the sample may end in the middle of a row
        usual = max(set(widths), key=widths.count, default=0)
        if usual > 1:
            score = (widths.count(usual) / len(widths), usual, delimiter)
            best = score if best is None or score[:2] > best[:2] else best
    return None if best is None or best[0] < 0.5 else best[2]
