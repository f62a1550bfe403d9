"""`l2m ingest`, `l2m search`, `l2m ask` and `l2m chat`: documents in, passages and answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import (
    InCollection,
    Json,
    ModelOption,
    Question,
    SessionOption,
    UrlOption,
    checked_question,
    existing,
    opened,
    read_question,
    read_questions,
    ready,
    settings_of,
    shows_progress,
)
from l2m_rag.cli.sessions import Session
from l2m_rag.errors import UsageError

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.config import Settings
    from l2m_rag.qa import Answer

PARTLY_DONE = 3
ABSTAINED = 4


def ingest(
    ctx: typer.Context,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files and folders.")],
    collection: InCollection = None,
    glob: Annotated[str | None, typer.Option(metavar="G", help="Take only files of this pattern from folders.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that parse files.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove documents whose files are gone.")] = False,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Read on a Ray cluster: local, auto, HOST:PORT or ray://..."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Read documents into a collection.

    Examples:
      l2m ingest contracts/ -c contracts
      l2m ingest notes.md report.pdf
      l2m ingest wiki/ --glob "*.md" --prune
      l2m ingest /shared/archive --ray 10.0.0.1:6379

    What is in and unchanged costs nothing. It reads PDF, DOCX, PPTX, XLSX, CSV, HTML, EPUB, ODT, RTF,
    Markdown, RST, text, source code, JSON, JSONL, mail and notebooks. Exit code 3: some files could not be
    read and are listed; the others are in.
    """
    paths = [existing(path) for path in paths]
    settings = settings_of(ctx, collection=collection, workers=workers)
    if not dry_run:
        ready(ctx, settings, as_json=as_json, new=True)
    with output.ingest_bar(shows_progress(ctx, as_json)) as progress:
        report = opened(settings).ingest(
            *paths, glob=glob, workers=workers, prune=prune, dry_run=dry_run, ray=ray, progress=progress
        )
    if as_json:
        output.say_json(output.report_json(report))
    else:
        output.say_report(report, paths)
    if report.failed:
        raise typer.Exit(PARTLY_DONE)


def search(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help='What to look for; "-" reads stdin.')] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help='Lines of {"id", "text"}; "-" for stdin.')
    ] = None,
    collection: InCollection = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, metavar="N", help="Passages to show.")] = 10,
    mode: Annotated[
        Literal["hybrid", "dense", "text"],
        typer.Option(help="By meaning and words, by meaning, or by words."),
    ] = "hybrid",
    where: Annotated[
        str | None, typer.Option(metavar="EXPR", help="Only chunks for which this SQL condition holds.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the passages that fit a text.

    Examples:
      l2m search "notice period" -c contracts -k 5
      l2m search "notice period" --where "document LIKE '%lease%'"
      l2m search --queries questions.jsonl --json > hits.jsonl
    """
    searches = _questions(text, queries, "--queries", "query")
    settings = settings_of(ctx, collection=collection)
    ready(ctx, settings, as_json=as_json, embedder=mode != "text")
    from l2m_rag.memory_tiers.records import hits

    searched = opened(settings)
    for query in searches:
        passages = searched.search(query.text, k, mode=mode, where=where)
        if as_json:
            output.say_json({"id": query.id, "query": query.text, "hits": hits(passages)})
        else:
            if queries:
                output.say(f"# {output.one_line(query.text, 100)}")
            output.say_passages(passages)


def ask(
    ctx: typer.Context,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help='What to answer; "-" reads stdin.')] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help='Lines of {"id", "text"}; "-" for stdin.')
    ] = None,
    collection: InCollection = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="FILE", help="Ask this file instead; may be repeated."),
    ] = None,
    session: SessionOption = None,
    model: ModelOption = None,
    llm_url: UrlOption = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show on stderr what was retrieved and read.")] = False,
    free: Annotated[bool, typer.Option("--free", help="Answer in the model's own words, not by quotes.")] = False,
    fail_on_abstain: Annotated[
        bool, typer.Option("--fail-on-abstain", help="Exit code 4 when there is no answer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a question from documents, with citations.

    Examples:
      l2m ask "When does the lease end?" -c contracts
      l2m ask "Who signed it?" --file lease.pdf
      l2m ask --questions questions.jsonl --json > answers.jsonl
    """
    if file and collection:
        raise UsageError("--file and --collection exclude each other: give the documents once")
    if model and llm_url:
        raise UsageError("--model and --llm-url exclude each other: give one model")
    asked = _questions(question, questions, "--questions", "question")
    settings = settings_of(ctx, collection=collection, model=model, llm_url=llm_url)
    files = [Path(existing(path)) for path in file or ()]
    ready(ctx, settings, as_json=as_json, decoder=True, new=bool(files))
    talk = Session(session, settings)
    searched = _asked(settings, files)
    abstained = False
    for one in asked:
        if questions and not as_json:
            output.say(f"> {output.one_line(one.text)}")
        stream = output.AnswerStream(show=not as_json)
        known = tuple(talk.history) if session is not None else ()
        answer = searched.ask(one.text, free=free, history=known, also=talk.told, on_text=stream.write)
        abstained |= answer.abstained
        talk.add(one.text, answer)
        if as_json:
            output.say_json({"id": one.id, **answer.to_json()})
            continue
        stream.end(answer)
        output.say_citations(answer)
        if answer.abstained:
            output.say("The nearest passages:")
            output.say_passages(searched.search(one.text, 3))
        if trace:
            output.say_trace(answer)
    if abstained and fail_on_abstain:
        raise typer.Exit(ABSTAINED)


def chat(
    ctx: typer.Context,
    collection: InCollection = None,
    session: SessionOption = None,
    model: ModelOption = None,
    llm_url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Ask one question after another.

    Examples:
      l2m chat -c contracts
      l2m chat -c contracts --session landlord
      l2m chat -c contracts < questions.txt

    A question may refer to those before it. With --session the turns are kept: what was told is found again months
    later, with its day; see `l2m sessions`. /sources shows the passages behind the last answer, /exit (or
    Ctrl-D) ends.
    """
    settings = settings_of(ctx, collection=collection, model=model, llm_url=llm_url)
    ready(ctx, settings, as_json=as_json, decoder=True)
    asked = opened(settings)
    asked.info()  # a collection that is not there is better said before the first question is typed
    talk = Session(session, settings)
    answer: Answer | None = None
    for line in _lines(sys.stdin.isatty() and not as_json):
        if line in ("/exit", "/quit"):
            return
        if line == "/sources":
            output.say_citations(answer) if answer else output.remark("nothing has been asked yet")
            continue
        try:
            question = checked_question(line)
        except UsageError as error:
            output.remark(str(error))
            continue
        stream = output.AnswerStream(show=not as_json)
        answer = asked.ask(question, history=tuple(talk.history), also=talk.told, on_text=stream.write)
        talk.add(question, answer)
        if as_json:
            output.say_json({"id": None, **answer.to_json()})
        elif talk.took_note(question, answer):
            output.say("Noted.")
        else:
            stream.end(answer)
            output.say_citations(answer)
            if answer.abstained and (told := talk.told(question)):
                output.say("What was told:")
                output.say_passages(told[:2])


def _asked(settings: Settings, files: list[Path]) -> Collection:
    """Give what is asked: the collection, or one of the files."""
    if not files:
        return opened(settings)
    from l2m_rag.collection import open_files

    return open_files(files, settings)


def _questions(text: str | None, file: str | None, option: str, what: str) -> list[Question]:
    if (text is None) == (file is None):
        raise UsageError(f'give either a {what} ("-" reads it from stdin) or {option} FILE.jsonl')
    if file is not None:
        return read_questions(file, what)
    return [Question(None, read_question(text or "", what))]


def _lines(on_terminal: bool) -> Iterator[str]:
    """Give what is typed, line by line; prompt for it on a terminal."""
    if not on_terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # gives input() its line editing
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            output.say()
            return
        if line:
            yield line
