"""`l2m sessions`, and what `l2m chat --session` and `l2m ask --session` keep: conversations of the long-term tier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import Command, Json, ready, settings_of
from l2m_rag.config import check_name
from l2m_rag.errors import UsageError

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.config import Settings
    from l2m_rag.conversation import Conversation
    from l2m_rag.memory_tiers.records import Passage
    from l2m_rag.memory_tiers.texts import Text
    from l2m_rag.qa import Answer

RECENT = 8
"""Turns of a session that a question may refer to."""
_TOLD = 4  # things told before that are read beside the documents

app = typer.Typer(
    rich_markup_mode=None,
    help="Show what sessions hold, and forget it.\n\nExample: l2m sessions show landlord --about rent",
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the session.")]


class Session:
    """A conversation with documents, from the command line.

    Args:
        name: of the session; None for one that is forgotten when the program ends.
        settings: where it is kept.
    """

    def __init__(self, name: str | None, settings: Settings) -> None:
        self.history: list[tuple[str, str]] = []
        self._conversation = None if name is None else _conversation(name, settings)
        if self._conversation is not None:
            self.history = _turns(self._conversation.texts())[-RECENT:]

    def told(self, text: str) -> list[Passage]:
        """Give what was told in this session, however long ago, that fits a text best."""
        return [] if self._conversation is None else self._conversation.statements(text, _TOLD)

    def add(self, question: str, answer: Answer) -> None:
        """Add a turn; it is on the disk when this is over."""
        self.history.append((question, answer.answer))
        if self._conversation is not None:
            from l2m_rag.conversation import Said

            self._conversation.add([Said("human", question), Said("ai", answer.answer)])

    def took_note(self, text: str, answer: Answer) -> bool:
        """Say whether a text told something rather than asked it, so that it is kept and needs no answer."""
        return self._conversation is not None and answer.abstained and not text.rstrip().endswith("?")


@app.command("list", cls=Command)
def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """List the sessions.

    Examples:
      l2m sessions list
    """
    from l2m_rag.conversation import sessions

    found = sessions(_collection(settings_of(ctx)))
    if as_json:
        output.say_json({"sessions": [{"name": name, "messages": count} for name, count in found.items()]})
    elif found:
        output.say_table(("NAME", "MESSAGES"), list(found.items()))
    else:
        output.remark("no sessions yet; begin one with: l2m chat --session NAME")


@app.command(cls=Command)
def show(
    ctx: typer.Context,
    name: Name,
    about: Annotated[str | None, typer.Option(metavar="TEXT", help="Only what fits this best.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="With --about: how much of it.")] = 10,
    as_json: Json = False,
) -> None:
    """Show what was said in a session, with its day and its id.

    Examples:
      l2m sessions show landlord
      l2m sessions show landlord --about "the deposit" -k 3
    """
    settings = settings_of(ctx)
    conversation = _existing(name, settings)
    if about is not None:
        ready(ctx, settings, as_json=as_json)
    _say(conversation.texts() if about is None else conversation.recall(about, k), as_json, "messages")


@app.command(cls=Command)
def forget(
    ctx: typer.Context,
    name: Name,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="What to forget, as `show` gives it.")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Forget the whole session.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what was said, for good, and show what is gone: nothing of it stays in the files.

    Examples:
      l2m sessions forget landlord chat:01779...
      l2m sessions forget landlord --all
    """
    if bool(ids) == whole:
        raise UsageError("give the ids of what to forget, or --all")
    settings = settings_of(ctx)
    conversation = _existing(name, settings)
    gone = conversation.clear() if whole else conversation.forget(ids or [])
    if gone:
        _collection(settings).optimize(older_than=0)
    _say(gone, as_json, "forgotten")
    if missing := [one for one in ids or [] if one not in {text.id for text in gone}]:
        raise UsageError(f"session {name!r} holds no {missing[0]!r}; see: l2m sessions show {name}")


def _say(texts: list[Text], as_json: bool, what: str) -> None:
    if as_json:
        rows = [{"id": text.id, "said_at": text.metadata["said_at"], "text": text.text} for text in texts]
        output.say_json({what: rows})
        return
    for text in texts:
        output.say(f"{text.metadata['said_at']}  {output.one_line(text.text)}\n  {text.id}")


def _turns(texts: list[Text]) -> list[tuple[str, str]]:
    """Give (question, answer) of messages; what nobody answered has the answer ""."""
    turns: list[tuple[str, str]] = []
    for text in texts:
        _, _, words = text.text.partition(": ")
        if text.metadata["by"] == "human":
            turns.append((words, ""))
        elif turns:
            turns[-1] = (turns[-1][0], words)
    return turns


def _collection(settings: Settings) -> Collection:
    import l2m_rag.collection
    from l2m_rag.conversation import COLLECTION

    return l2m_rag.collection.open(COLLECTION, settings=settings)


def _conversation(name: str, settings: Settings) -> Conversation:
    from l2m_rag.conversation import Conversation

    return Conversation(check_name(name, "session"), _collection(settings))


def _existing(name: str, settings: Settings) -> Conversation:
    from l2m_rag.conversation import sessions

    if name not in (there := sessions(_collection(settings))):
        raise UsageError(f"there is no session {name!r}; there are: {', '.join(there) or 'none'}")
    return _conversation(name, settings)
