"""The command `l2m`: its commands, its global options, and the one place where errors become exit codes.

Every command file is imported here, so at its top none of them imports more than typer, the settings and the
errors; what does the work is imported inside the commands. A test holds `l2m --help` to that.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from l2m_rag.cli import (
    collections,
    demo,
    doctor,
    documents,
    evaluation,
    models,
    output,
    serving,
    sessions,
    settings,
    training,
)
from l2m_rag.cli.options import Command, examples_kept
from l2m_rag.errors import L2MError

BEFORE_THE_COMMAND = ("--home", "--quiet", "-q", "--debug", "--version")
READER_GONE = 141  # 128 + SIGPIPE, which Windows does not name: the reader has all it wanted
INTERRUPTED = "nothing is lost, run the same command again to go on"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that what is under way ends as cleanly."""


class _HeldError(Exception):
    """Carries (as its cause) an error past typer, which would turn it into an exit of its own."""


class Root(TyperGroup):
    """The `l2m` command with the error boundary around it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.help = examples_kept(self.help)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and exit with its code; an error is one line on stderr."""
        args = sys.argv[1:] if args is None else args
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if sys.stdout is not None:  # closed by the caller: `l2m ... >&-`
                sys.stdout.flush()
        except _HeldError as held:
            code = _report(held.__cause__ or held, args)
        except Exception as error:
            code = _report(error, args)
        sys.exit(code or 0)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the command line."""
        with _held():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was read."""
        with _held():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Root,
    name="l2m",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 some files failed, 4 abstained (--fail-on-abstain), "
    "10 no such collection, 11 locked, 12 incompatible, 13 corrupt, 130 interrupted.",
)

for command in (documents.ingest, documents.search, documents.ask, documents.chat):
    app.command(cls=Command)(command)
app.add_typer(collections.app, name="collections")
app.add_typer(sessions.app, name="sessions")
app.add_typer(models.app, name="models")
app.add_typer(settings.app, name="config")
app.add_typer(evaluation.eval_app, name="eval")
app.add_typer(evaluation.bench_app, name="bench")
app.command(cls=Command)(doctor.doctor)
app.command(cls=Command)(demo.demo)
app.command(cls=Command)(serving.serve)
app.command(cls=Command)(serving.mcp)
app.command(cls=Command)(training.train)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        output.say(f"l2m {version('l2m-rag')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of all data, or s3://BUCKET/PREFIX [env: L2M_HOME; default: see l2m config path].",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no remarks, only results and errors.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what is logged.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Real documents in, cited answers out, all on your machine.

    Examples:
      l2m demo
      l2m ingest contracts/ -c contracts
      l2m ask "When does the lease end?" -c contracts
      l2m ask "Who signed it?" --file lease.pdf
      l2m search "notice period" -c contracts -k 5 --json
    """
    if ctx.invoked_subcommand is None:
        output.say(ctx.get_help())


def main() -> None:
    """Run `l2m` as a program: set up its streams, signals and logging, then the command line."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:
            # A name or a passage must not end a command because the terminal's encoding lacks a character.
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, _on_interrupt)
    signal.signal(signal.SIGTERM, _on_terminate)
    if _flag("--debug", sys.argv):
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    else:
        # Libraries warn of things a user can do nothing about; ours is the only logger that speaks to users.
        logging.basicConfig(handlers=[logging.NullHandler()])
        ours = logging.StreamHandler()
        ours.setFormatter(_OneLine())
        logging.getLogger("l2m_rag").addHandler(ours)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    app(prog_name="l2m")


class _OneLine(logging.Formatter):
    """Prints what the library logs as the command line prints its own remarks."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line for a record."""
        return f"l2m: {output.one_line(record.getMessage())}"


def _on_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # From here on Ctrl-C ends the process at once, also in the middle of native code.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr is not None and sys.stderr.isatty():
        # The escape sequence shows the cursor again, which a progress bar has hidden.
        os.write(2, b"\x1b[?25h\nl2m: ending cleanly; press Ctrl-C again to end at once\n")
    raise KeyboardInterrupt


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


@contextmanager
def _held() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, EOFError, OSError) as error:
        raise _HeldError from error


def _flag(name: str, args: Sequence[str]) -> bool:
    """Say whether a flag was given, also on a command line that cannot be parsed."""
    options = args[: list(args).index("--")] if "--" in args else args
    return name in options


def _report(error: BaseException, args: Sequence[str]) -> int:
    """Tell the user what went wrong and give the exit code."""
    gone = isinstance(error, BrokenPipeError) and _reader_is_gone()
    _drop_unwritable()
    if gone:
        return READER_GONE
    code, text = _explain(error)
    with suppress(BrokenPipeError):
        if _flag("--debug", args):
            output.say("".join(traceback.format_exception(error)), err=True, end="")
        output.remark(text)
        if _flag("--json", args):
            output.say_json({"message_type": "exit_error", "code": code, "message": text}, err=True)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Give the exit code and the line for an error."""
    if isinstance(error, L2MError):
        return error.code, str(error)
    if isinstance(error, typer.TyperException):
        option, ctx = getattr(error, "option_name", None), getattr(error, "ctx", None)
        if option in BEFORE_THE_COMMAND:
            return error.exit_code, f"{option} belongs before the command: l2m {option} ..."
        see = f"; see: {ctx.command_path} --help" if ctx is not None else ""
        return error.exit_code, error.format_message().rstrip(".") + see
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM, f"ended by SIGTERM; {INTERRUPTED}"
    if isinstance(error, KeyboardInterrupt | EOFError | typer.Abort):
        return 128 + signal.SIGINT, f"interrupted; {INTERRUPTED}"
    return 1, _system_fault(error) or f"{type(error).__name__}: {error}; run with --debug for the traceback"


def _system_fault(error: BaseException) -> str | None:
    """Give a line for what the machine refuses (a full disk, no permission, no memory), or None."""
    if isinstance(error, MemoryError):
        return "out of memory; use fewer --workers or close other programs"
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    # LanceDB's errors come from Rust and carry the number in their text only.
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if not isinstance(number, int):
        return None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"disk is full: {path or 'free some space'}; nothing is lost, run the same command again"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{os.strerror(number)}: {path or error} (to keep the data elsewhere: l2m --home DIR)"
    return f"{os.strerror(number)}: {path}" if path else None


def _reader_is_gone() -> bool:
    """Say whether stdout is a pipe that nobody reads any more (and not some pipe inside the library)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # Windows has no poll; a stream of a test has no file descriptor
        return True


def _drop_unwritable() -> None:
    """Keep Python from writing again, at exit, to a stdout that takes no more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
