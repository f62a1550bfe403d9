"""How results reach the terminal: text or JSON on stdout, progress and remarks on stderr.

Names and passages come from other people's documents, so nothing of them is printed before its control
characters are made harmless: an escape sequence in a PDF must not rewrite the screen of a terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from l2m_rag.indexers.pipeline import IngestReport, Progress
    from l2m_rag.memory_tiers.records import Passage
    from l2m_rag.qa import Answer

_HARMLESS: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},  # shown as control pictures
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),  # C1: one character long escape sequences
    # Embeddings, overrides and isolates can make a line read as what it is not.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), ""),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # lone surrogates cannot be encoded
}


def harmless(text: str) -> str:
    """Give text that can be printed: line breaks and tabs stay, other control characters become visible."""
    return text.replace("\r\n", "\n").translate(_HARMLESS)


def one_line(text: str, width: int | None = None) -> str:
    """Give text as one harmless line, cut to `width` characters when it is longer."""
    line = harmless(" ".join(text.split()))
    return line if width is None or len(line) <= width else line[: width - 1].rstrip() + "…"


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Print text on stdout, made harmless; flushed, so that a reader sees it at once."""
    typer.echo(harmless(text) + end, nl=False, err=err)


def remark(text: str) -> None:
    """Print a remark on stderr, as one line with the program's name before it."""
    say(f"l2m: {one_line(text)}", err=True)


def say_json(value: object, *, err: bool = False) -> None:
    """Print a value as one line of JSON.

    ASCII only, so it passes through any locale unharmed and carries no control characters to a terminal.
    """
    say(json.dumps(value, ensure_ascii=True, allow_nan=False), err=err)


def say_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in aligned columns; columns of numbers are flush right."""
    from rich.cells import cell_len  # characters of some scripts are two cells wide

    cells = [list(head), *([one_line(str(value)) for value in row] for row in rows)]
    widths = [max(cell_len(row[column]) for row in cells) for column in range(len(head))]
    right = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    for row in cells:
        line = []
        for cell, width, flush_right in zip(row, widths, right, strict=True):
            gap = " " * (width - cell_len(cell))
            line.append(gap + cell if flush_right else cell + gap)
        say("  ".join(line).rstrip())


def size(n: float) -> str:
    """Give a number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


@contextmanager
def ingest_bar(show: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Draw the progress of an ingest while the block runs; give None when nothing is to be shown."""
    if not show:
        yield None
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[files]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[current]}", markup=False),
    )
    with _bars(*columns) as bars:
        task = bars.add_task("", total=None, files="looking for files", current="")
        drawn = 0.0

        def show_progress(progress: Progress) -> None:
            nonlocal drawn
            if time.monotonic() - drawn < 0.1:  # it is called for every file
                return
            drawn = time.monotonic()
            bars.update(
                task,
                total=progress.files_found if progress.scan_done else None,
                completed=progress.files_done,
                files=_ingest_words(progress),
                current=one_line(progress.current, 40),
            )

        yield show_progress


def _ingest_words(progress: Progress) -> str:
    found = f"{progress.files_found:,}" + ("" if progress.scan_done else "+")
    rate = progress.chunks / progress.seconds if progress.seconds > 0 else 0.0
    failed = f", {progress.failed:,} failed" if progress.failed else ""
    return f"{progress.files_done:,} of {found} files{failed}, {progress.chunks:,} chunks, {rate:.0f}/s"


@contextmanager
def byte_bar(show: bool, name: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Draw the progress of fetching weights while the block runs; give None when nothing is to be shown."""
    if not show:
        yield None
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with _bars(*columns) as bars:
        task = bars.add_task(name, total=None)

        def show_progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=f"{name}: {stage}", completed=done, total=total)

        yield show_progress


@contextmanager
def count_bar(show: bool, name: str) -> Iterator[Callable[[int, int], object] | None]:
    """Draw how many of something are done while the block runs; give None when nothing is to be shown."""
    if not show:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bars(*columns) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _bars(*columns: object) -> Bars:
    from rich.console import Console
    from rich.progress import Progress as Bars

    return Bars(*columns, console=Console(stderr=True), transient=True)  # type: ignore[arg-type]


def report_json(report: IngestReport) -> dict[str, object]:
    """Give the report of an ingest as the command line's contract words it."""
    return {
        "collection": report.collection,
        "added": report.added,
        "updated": report.updated,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "failed": [{"path": failure.path, "reason": failure.reason} for failure in report.failed],
        "chunks": report.chunks,
        "seconds": report.seconds,
    }


def say_report(report: IngestReport, paths: Iterable[str]) -> None:
    """Print what an ingest did; the failures on stderr."""
    for failure in report.failed:
        remark(f"{failure.path}: {failure.reason}: {failure.detail}")
    counts = {name: getattr(report, name) for name in ("added", "updated", "unchanged", "removed")}
    if not any(counts.values()) and not report.failed:
        say(f"nothing to read in {', '.join(map(one_line, paths))} (0 documents)")
        return
    words = [f"{count:,} {name}" for name, count in counts.items() if count]
    if report.failed:
        words.append(f"{len(report.failed):,} failed")
    would = "would be: " if report.dry_run else ""
    say(f"{report.collection}: {would}{', '.join(words)}; {report.chunks:,} chunks in {report.seconds:.1f} s")


def say_passages(passages: Sequence[Passage]) -> None:
    """Print passages: rank, document, page and heading, and how the text begins."""
    if not passages:
        say("no passage found")
    for rank, passage in enumerate(passages, start=1):
        chunk = passage.chunk
        page = f", page {chunk.page}" if chunk.page is not None else ""
        heading = f" - {one_line(chunk.heading, 60)}" if chunk.heading else ""
        say(f"{rank}. {one_line(chunk.document)}{page}{heading}")
        say(f"   {one_line(chunk.text, 240)}")


def say_citations(answer: Answer) -> None:
    """Print what an answer quotes, one line each."""
    for citation in answer.citations:
        page = f", page {citation.page}" if citation.page is not None else ""
        place = f"[{citation.n}] {one_line(citation.document)}{page}, {citation.start}-{citation.end}"
        say(f'{place}: "{one_line(citation.quote, 400)}"')


def say_trace(answer: Answer) -> None:
    """Print on stderr what was retrieved and read for an answer, and what it cost."""
    for step in answer.steps:
        say_json(step, err=True)
    say_json({"timings": answer.timings, "tokens": answer.tokens}, err=True)


class AnswerStream:
    """Print an answer while it is being written."""

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self.shown = ""

    def write(self, piece: str) -> None:
        """Take the next piece of the answer."""
        self.shown += piece
        if self.show:
            say(piece, end="")

    def end(self, answer: Answer) -> None:
        """End the line, and print what was not streamed."""
        if answer.abstained:
            if self.shown:
                say()
            from l2m_rag.qa import abstention

            say(abstention(answer))
        else:
            say("" if self.shown else answer.answer)


def toml(value: str | int | float) -> str:
    """Give a value as TOML writes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
