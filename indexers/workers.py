"""Parsing in child processes, under limits of time and memory.

A child reads requests from its standard input, one JSON line each, and answers with frames: eight bytes of
lengths, a JSON header, the text in UTF-8. Nothing that comes from a child is unpickled or trusted. A child
that hangs, crashes or grows costs one file; it is replaced and the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Self

from l2m_rag import errors
from l2m_rag.errors import REASONS, L2MError, LoadError, UsageError
from l2m_rag.memory_tiers.records import Parsed, Section

Result = Parsed | LoadError

_LENGTHS = struct.Struct(">II")
_READ = 1 << 18
_PREFETCH = 2  # files in flight per worker: one that is parsed and one that waits, so that the child never idles
_START_SECONDS = 60.0
_RECYCLE_FILES = 2000
_CHECK_FILES = 20  # files between two looks at the child's memory
_CHECK_CHARS = 1 << 20


@dataclass(slots=True)
class _Job:
    path: Path
    result: Result | None = None


@dataclass(slots=True)
class _Child:
    """A running child process and what it was asked."""

    process: subprocess.Popen[bytes]
    deadline: float  # on the monotonic clock, for the answer that is due next
    jobs: deque[_Job] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False
    leaving: bool = False  # it said that it ends by its own choice


class ParserPool:
    """Parses files in child processes.

    Args:
        workers: number of child processes, >= 1.
        timeout: seconds that one file may take.
        memory: bytes of address space that a child may take on top of what it has at its start.
        max_bytes: size of the largest file that is read.
    """

    # What a child runs. The folder of the package goes to the end of the path, and -P keeps the working
    # directory off it, so that no file lying there is imported by accident.
    _BOOTSTRAP: ClassVar[str] = "from l2m_rag.indexers.workers import serve; serve()"

    def __init__(
        self, *, workers: int = 1, timeout: float = 30.0, memory: int = 1 << 30, max_bytes: int = 256 << 20
    ) -> None:
        if workers < 1 or timeout <= 0 or memory <= 0 or max_bytes <= 0:
            raise UsageError("workers, timeout, memory and max_bytes must be above 0")
        self._timeout = timeout
        self._settings = json.dumps({"timeout": timeout, "memory": memory, "max_bytes": max_bytes})
        self._children: list[_Child | None] = [None] * workers
        self._selector = selectors.DefaultSelector()
        self._parsing = False
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all children."""
        for slot in range(len(self._children)):
            self._stop(slot)
        self._selector.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that run now."""
        return [child.process.pid for child in self._children if child is not None]

    def parse(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Result]]:
        """Parse files, in their order; no more than two per worker are taken from `paths` ahead of time.

        Yields:
            Each path with its text, or with the error that kept it from being had.

        Raises:
            L2MError: if no child process can be started.
        """
        if self._parsing:
            raise UsageError("the pool is parsing already; finish or close the first iteration")
        self._parsing = True
        pending: deque[_Job] = deque()
        source = iter(paths)
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < _PREFETCH * len(self._children):
                    path = next(source, None)
                    if path is None:
                        exhausted = True
                    else:
                        pending.append(_Job(path))
                        self._assign(pending[-1])
                if not pending:
                    return
                self._wait_for(pending[0])
                job = pending.popleft()
                assert job.result is not None
                yield job.path, job.result
        finally:
            self._parsing = False
            for slot, child in enumerate(self._children):
                if child is not None and child.jobs:
                    self._stop(slot)

    def _assign(self, job: _Job) -> None:
        waiting = [0 if child is None else len(child.jobs) for child in self._children]
        self._send(waiting.index(min(waiting)), job)

    def _send(self, slot: int, job: _Job) -> None:
        child = self._children[slot] or self._start(slot)
        child.jobs.append(job)
        if len(child.jobs) == 1 and child.ready:
            child.deadline = time.monotonic() + self._timeout
        request = json.dumps(os.fspath(job.path)).encode() + b"\n"
        assert child.process.stdin is not None
        # A child that has died is noticed, and made good, where its answers are read. Writing does not block:
        # at most two requests wait in the pipe, and they are far smaller than its buffer.
        with contextlib.suppress(BrokenPipeError):
            child.process.stdin.write(request)

    def _start(self, slot: int) -> _Child:
        root = os.fspath(Path(errors.__file__).absolute().parents[1])
        code = f"import sys; sys.path.append({root!r}); {self._BOOTSTRAP}"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, self._settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        child = _Child(process, time.monotonic() + _START_SECONDS)
        self._children[slot] = child
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, slot)
        return child

    def _stop(self, slot: int) -> int:
        """Kill the child in a slot, if there is one; gives its exit code."""
        child, self._children[slot] = self._children[slot], None
        if child is None:
            return 0
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        self._selector.unregister(child.process.stdout)
        if child.process.poll() is None:
            child.process.kill()
        child.process.stdout.close()
        child.process.stdin.close()
        return child.process.wait()

    def _wait_for(self, job: _Job) -> None:
        while job.result is None:
            deadlines = [child.deadline for child in self._children if child is not None and child.jobs]
            events = self._selector.select(max(0.0, min(deadlines) - time.monotonic()))
            for key, _ in events:
                self._receive(int(key.data))
            if events:
                continue  # an answer that is there in time counts, however late it is looked at
            now = time.monotonic()
            for slot, child in enumerate(self._children):
                if child is not None and child.jobs and child.deadline <= now:
                    self._time_out(slot, child)

    def _time_out(self, slot: int, child: _Child) -> None:
        if child.ready:
            error = LoadError("timeout", f"it was not parsed within {self._timeout:g} seconds")
            self._replace(slot, child, error)
        else:
            self._start_again(slot, child)

    def _receive(self, slot: int) -> None:
        child = self._children[slot]
        if child is None:
            return
        assert child.process.stdout is not None
        piece = child.process.stdout.read(_READ)
        if piece is None:
            return
        if not piece:
            self._end_of_answers(slot, child)
            return
        child.received += piece
        try:
            while (frame := _take_frame(child.received)) is not None:
                self._answer(child, *frame)
        except (ValueError, TypeError, KeyError, IndexError):
            # Only a child that was taken over by what it parsed sends such frames.
            self._replace(slot, child, LoadError("corrupt", "the parser gave an answer that makes no sense"))
            return
        if child.received:
            child.deadline = time.monotonic() + self._timeout  # it is done, and sending

    def _answer(self, child: _Child, header: Any, text: str) -> None:
        child.deadline = time.monotonic() + self._timeout
        if header["kind"] == "ready":
            child.ready = True
            self._failed_starts = 0
        elif header["kind"] == "leaving":
            child.leaving = True
        else:
            result = _result(header, text)
            child.jobs.popleft().result = result

    def _end_of_answers(self, slot: int, child: _Child) -> None:
        if child.leaving:
            self._replace(slot, child, None)
        elif not child.ready:
            self._start_again(slot, child)
        elif child.jobs:
            code = child.process.wait()
            self._replace(slot, child, _crash(code))
        else:
            self._stop(slot)

    def _start_again(self, slot: int, child: _Child) -> None:
        self._failed_starts += 1
        jobs = child.jobs
        code = self._stop(slot)
        if self._failed_starts > 2:
            raise L2MError(f"the parser process does not start (exit code {code}); is the memory limit too low?")
        for job in jobs:
            self._send(slot, job)

    def _replace(self, slot: int, child: _Child, error: LoadError | None) -> None:
        """Put a new child into a slot; the error, if any, is for the file that the old one was at."""
        self._stop(slot)
        if error is not None:
            child.jobs.popleft().result = error
        for job in child.jobs:
            self._send(slot, job)


def _crash(code: int) -> LoadError:
    if code == -signal.SIGKILL:
        return LoadError("too_large", "the parser process was killed, most likely for its use of memory")
    if code == -signal.SIGALRM:
        return LoadError("timeout", "it was not parsed in time")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return LoadError("corrupt", f"the parser process crashed on it ({name})")


def _take_frame(received: bytearray) -> tuple[Any, str] | None:
    """Cut the first complete frame off the bytes received; None if there is none."""
    if len(received) < _LENGTHS.size:
        return None
    header_size, text_size = _LENGTHS.unpack_from(received)
    middle = _LENGTHS.size + header_size
    end = middle + text_size
    if len(received) < end:
        return None
    header = json.loads(bytes(received[_LENGTHS.size : middle]))
    text = received[middle:end].decode("utf-8")
    del received[:end]
    return header, text


def _result(header: dict[str, Any], text: str) -> Result:
    """The value that a frame stands for; anything of another shape raises an error."""
    if header["kind"] == "error":
        if header["reason"] not in REASONS:
            raise ValueError(header["reason"])
        return LoadError(header["reason"], str(header["detail"]))
    metadata = dict(header["metadata"])
    if not all(value is None or isinstance(value, str | int | float) for value in metadata.values()):
        raise ValueError("metadata are not plain")
    title = header["title"]
    return Parsed(
        text=text,
        mime=str(header["mime"]),
        title=None if title is None else str(title),
        pages=tuple(int(page) for page in header["pages"]),
        sections=tuple(Section(int(start), str(heading), bool(hard)) for start, heading, hard in header["sections"]),
        metadata=metadata,
    )


def serve() -> None:
    """Answer requests until standard input ends: what a child process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    settings = json.loads(sys.argv[1])
    # Libraries that print, and crashes that report themselves, must not reach the pipe of answers.
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    # openpyxl takes numpy along where it is installed; nothing here needs its weight.
    sys.modules["numpy"] = None  # type: ignore[assignment]
    from l2m_rag.indexers import loaders

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(int(settings["memory"]))
    _send_frame(answers, {"kind": "ready"})
    unchecked = 0
    for count, request in enumerate(requests, 1):
        # The parent keeps time too; this holds if it has died while a parser hangs.
        signal.setitimer(signal.ITIMER_REAL, settings["timeout"] + 10)
        header, text = _load(loaders.load, Path(json.loads(request)), int(settings["max_bytes"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send_frame(answers, header, text)
        unchecked += 1
        tired = count >= _RECYCLE_FILES
        if unchecked >= _CHECK_FILES or len(text) >= _CHECK_CHARS or header["kind"] == "error":
            unchecked = 0
            tired = tired or _mapped(1) > int(settings["memory"]) // 2
        if tired:
            _send_frame(answers, {"kind": "leaving"})
            return


def _load(load: Callable[..., Parsed], path: Path, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Header and text of the answer for one file."""
    try:
        parsed = load(path, max_bytes=max_bytes)
        header = {
            "kind": "parsed",
            "mime": parsed.mime,
            "title": parsed.title,
            "pages": parsed.pages,
            "sections": [(section.start, section.heading, section.hard) for section in parsed.sections],
            "metadata": parsed.metadata,
        }
        return header, parsed.text.encode()
    except LoadError as error:
        return {"kind": "error", "reason": error.reason, "detail": error.detail}, b""
    except MemoryError:
        return {
            "kind": "error",
            "reason": "too_large",
            "detail": "there is not enough memory for its text",
        }, b""


def _send_frame(answers: BinaryIO, header: dict[str, Any], text: bytes = b"") -> None:
    encoded = json.dumps(header).encode()
    answers.write(_LENGTHS.pack(len(encoded), len(text)) + encoded)
    answers.write(text)
    answers.flush()


def _mapped(column: int) -> int:
    """Bytes that this process has mapped (column 0) or in memory (1); 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[column]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def _limit_memory(memory: int) -> None:
    try:
        limit = memory + _mapped(0)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):
        pass  # a lower limit is in force already, or the system has none
