"""`l2m collections`: what is there, and what can be done with a whole collection."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import CollectionName, Command, Json, existing, is_quiet, opened, settings_of
from l2m_rag.config import check_name
from l2m_rag.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from l2m_rag.collection import CollectionInfo

app = typer.Typer(
    rich_markup_mode=None,
    help="List, inspect, copy, check and mend collections.\n\nExample: l2m collections list",
)


@app.command("list", cls=Command)
def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """List the collections.

    Examples:
      l2m collections list
      l2m collections list --json
    """
    from l2m_rag.collection import list_collections

    found = list_collections(settings_of(ctx))
    if as_json:
        output.say_json({"collections": [_json(info) for info in found]})
    elif found:
        head = ("NAME", "DOCUMENTS", "FAILED", "CHUNKS", "SIZE")
        rows = [(info.name, info.documents, info.failed, info.chunks, output.size(info.bytes)) for info in found]
        output.say_table(head, rows)
    elif not is_quiet(ctx):
        output.remark("no collections yet; make one with: l2m ingest FOLDER -c NAME")


@app.command(cls=Command)
def info(
    ctx: typer.Context,
    name: CollectionName,
    documents: Annotated[bool, typer.Option("--documents", help="List its documents too.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a collection holds.

    Examples:
      l2m collections info contracts
      l2m collections info contracts --documents
    """
    collection = opened(settings_of(ctx, collection=name))
    values = _json(collection.info())
    rows = collection.documents() if documents else []
    if as_json:
        output.say_json({**values, "rows": [asdict(row) for row in rows]} if documents else values)
        return
    for key, value in values.items():
        output.say(f"{key:<12}{output.one_line(str(value))}")
    if rows:
        output.say()
        output.say_table(
            ("DOCUMENT", "CHUNKS", "SIZE", "ERROR"),
            [(r.id, r.chunks, output.size(r.bytes), r.error) for r in rows],
        )


@app.command(cls=Command)
def delete(
    ctx: typer.Context,
    name: CollectionName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a collection; the documents themselves stay where they are.

    Example:
      l2m collections delete contracts --yes
    """
    collection = opened(settings_of(ctx, collection=name))
    if not yes:
        if not sys.stdin.isatty() or as_json:
            raise UsageError(f"this would delete the collection {name!r}; say --yes to do it")
        if not typer.confirm(f"Delete the collection {name!r}?", err=True):
            output.remark("nothing was deleted")
            return
    collection.delete()
    _done(f"{name}: deleted", {"collection": name, "deleted": True}, as_json)


@app.command(cls=Command)
def rename(
    ctx: typer.Context,
    name: CollectionName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    as_json: Json = False,
) -> None:
    """Give a collection another name.

    Example:
      l2m collections rename contracts contracts-2026
    """
    opened(settings_of(ctx, collection=name)).rename(check_name(new))
    _done(f"{name}: is now {new}", {"collection": new, "was": name}, as_json)


@app.command(cls=Command)
def export(
    ctx: typer.Context,
    name: CollectionName,
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="Archive to write.")],
    as_json: Json = False,
) -> None:
    """Write a collection into one archive file.

    Example:
      l2m collections export contracts contracts.l2m
    """
    path = opened(settings_of(ctx, collection=name)).export(archive)
    size = path.stat().st_size
    _done(
        f"{name}: {path} ({output.size(size)})",
        {"collection": name, "path": str(path), "bytes": size},
        as_json,
    )


@app.command("import", cls=Command)
def import_(
    ctx: typer.Context,
    archive: Annotated[str, typer.Argument(metavar="FILE", help="Archive made by export.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new collection.")],
    as_json: Json = False,
) -> None:
    """Make a collection from an exported archive.

    Example:
      l2m collections import contracts.l2m contracts
    """
    from l2m_rag.collection import import_collection

    made = import_collection(Path(existing(archive)), check_name(name), settings_of(ctx)).info()
    _done(f"{name}: {made.documents:,} documents, {made.chunks:,} chunks", _json(made), as_json)


@app.command(cls=Command)
def verify(ctx: typer.Context, name: CollectionName, as_json: Json = False) -> None:
    """Check every stored row; exit code 13 when something is damaged.

    Example:
      l2m collections verify contracts
    """
    report = opened(settings_of(ctx, collection=name)).verify()
    words = f"{name}: {report.documents:,} documents and {report.chunks:,} chunks are "
    _done(
        words + ("as they were written" if report.ok else "not all sound"),
        {"collection": name, **asdict(report)},
        as_json,
    )
    if not report.ok:
        problems = "; ".join(report.problems)
        raise CorruptError(f"{name}: {problems}. Run: l2m collections repair {name}")


@app.command(cls=Command)
def repair(ctx: typer.Context, name: CollectionName, as_json: Json = False) -> None:
    """Mend what can be mended, and say what was done.

    Example:
      l2m collections repair contracts
    """
    repaired = opened(settings_of(ctx, collection=name)).repair()
    text = "\n".join(repaired) or f"{name}: nothing to repair"
    _done(text, {"collection": name, "repaired": repaired}, as_json)


@app.command(cls=Command)
def optimize(ctx: typer.Context, name: CollectionName, as_json: Json = False) -> None:
    """Merge small files and drop old versions, for less space and quicker searches.

    Example:
      l2m collections optimize contracts
    """
    outcome = opened(settings_of(ctx, collection=name)).optimize()
    text = ", ".join(f"{key} {value}" for key, value in outcome.items())
    _done(f"{name}: {text or 'optimized'}", {"collection": name, **outcome}, as_json)


@app.command(cls=Command)
def migrate(ctx: typer.Context, name: CollectionName, as_json: Json = False) -> None:
    """Bring a collection of an older version to the present format.

    Example:
      l2m collections migrate contracts
    """
    outcome = opened(settings_of(ctx, collection=name)).migrate()
    _done(f"{name}: {outcome}", {"collection": name, "outcome": outcome}, as_json)


def _done(text: str, value: dict[str, object], as_json: bool) -> None:
    if as_json:
        output.say_json(value)
    else:
        output.say(text)


def _json(info: CollectionInfo) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(info).items()}
