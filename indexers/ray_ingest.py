"""An ingest whose files are read and whose texts are embedded on a Ray cluster; this process plans and commits.

The workers get paths, not files, and texts in the very batches that one process would embed; what they give back is
taken in the order of the files. So the one way of committing (`pipeline`) is left as it is, and what it promises holds:
see docs/decisions/0011-ray.md.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

from l2m_rag.errors import IncompatibleError, L2MError, LoadError, Reason
from l2m_rag.indexers.ray_cluster import check_reachable, connect, import_ray, said, shares
from l2m_rag.indexers.readers import Embedder, Limits, Read, read_files, row_of
from l2m_rag.indexers.scan import Found
from l2m_rag.memory_tiers.lance_store import Vectors
from l2m_rag.memory_tiers.records import Chunk, DocumentRow

logger = logging.getLogger(__name__)

_AHEAD = 2  # calls of either kind per worker: one that runs and one that waits, so that no worker idles
_FILES = 32  # most files of a call
_BYTES = 1 << 20  # and most bytes of them together: a larger file goes by itself
_TEXT = 8 << 20  # characters after which a call gives back what it has: an archive may hold far more than its size
_ATTEMPTS = 4  # workers that may die over a call before the run ends
_REMARK = 30.0  # seconds without a free worker after which it is said


class _Done(NamedTuple):
    """A file that a worker has looked at; plain values only, as they travel between machines."""

    row: DocumentRow
    chunks: list[Chunk]
    failure: tuple[Reason, str] | None
    unseen_by: str  # name of the machine when there was no such path on it


class _Worker:
    """What runs on the machines of the cluster: an embedder and a parser pool, both made on first use.

    Args:
        load: gives the embedder.
        limits: of parsing and cutting.
        most: characters of text after which `read` gives back what it has.
    """

    def __init__(self, load: Callable[[], Embedder], limits: Limits, most: int) -> None:
        self._load = load
        self._limits = limits
        self._most = most
        self._pool = limits.pool()
        self._embedder: Embedder | None = None

    def introduce(self) -> tuple[str, str]:
        """Give the version of the library and the fingerprint of the embedder, which is loaded."""
        return version("l2m-rag"), str(getattr(self._model(), "fingerprint", ""))

    def read(self, files: Sequence[Found]) -> list[_Done]:
        """Read files in their order; not all of them when their texts are long."""
        done: list[_Done] = []
        characters = 0
        for read in read_files(files, self._pool, self._limits, self._model):
            chunks = list(read.chunks)
            failure = (read.error.reason, read.error.detail) if read.error else None
            unseen = failure is not None and not os.path.lexists(read.file.path)
            done.append(_Done(read.row(len(chunks)), chunks, failure, socket.gethostname() if unseen else ""))
            characters += sum(len(chunk.text) for chunk in chunks)
            if characters >= self._most:
                break
        return done

    def encode(self, texts: list[str]) -> Vectors:
        """Give (N, E) float32 vectors of unit length."""
        return self._model().encode(texts)

    def _model(self) -> Embedder:
        if self._embedder is None:
            self._embedder = self._load()
        return self._embedder


@dataclass(eq=False, slots=True)
class _Place:
    """A share of the cluster, and the worker that has it.

    Args:
        worker: the actor.
        share: its resources.
        calls: that it has yet to answer.
        dead: it has been given up.
    """

    worker: Any
    share: dict[str, float]
    calls: int = 0
    dead: bool = False


@dataclass(eq=False, slots=True)
class _Call:
    """Something that a worker was asked for, and another one can be asked for again: calls change nothing.

    Args:
        method: of `_Worker`.
        argument: of it.
        attempts: how often it was sent.
        place: whom it was sent to.
        answer: reference to what will come back.
    """

    method: Literal["read", "encode"]
    argument: Any
    attempts: int = 0
    place: _Place | None = None
    answer: Any = None


class RayWorkers:
    """The workers of a Ray cluster, until `close`.

    Args:
        address: `local` starts a Ray on this machine; `auto`, `HOST:PORT` or `ray://HOST:PORT` is a running one.
        load: gives the embedder, on the worker.
        limits: of parsing and cutting; `workers` parsing processes for each worker.
        threads: CPUs of a worker; 0 for at most 4 of its machine.

    Raises:
        MissingExtraError: ray is not installed.
        UsageError: the address has none of these forms.
        L2MError: nothing answers there.
    """

    def __init__(self, address: str, load: Callable[[], Embedder], limits: Limits, *, threads: int = 0) -> None:
        self.address = address
        self._ray = import_ray()
        check_reachable(address)
        self._load = load
        self._limits = limits
        self._threads = threads
        self._fingerprint = ""
        self._connected = False  # by us, so that it ends with us
        self._size = 0  # places
        self._starting: dict[Any, _Place] = {}  # reference to the answer to `introduce` -> who gives it
        self._serving: list[_Place] = []
        self._deaths = 0  # of workers, since one last answered

    def start(self, fingerprint: str) -> None:
        """Connect and ask for workers, if that has not been done.

        Args:
            fingerprint: that their embedder must have.

        Raises:
            L2MError: the cluster does not take us.
        """
        if self._size:
            return
        self._fingerprint = fingerprint
        self._connected = connect(self._ray, self.address)
        found = shares([node["Resources"] for node in self._ray.nodes() if node["Alive"]], self._threads)
        if not found:
            raise L2MError(f"the Ray cluster at {self.address!r} has no CPUs; add a machine to it")
        self._size = len(found)
        for share in found:
            self._engage(share)

    def close(self) -> None:
        """Let the workers go, and what was started here."""
        for place in (*self._serving, *self._starting.values()):
            self._kill(place)
        self._serving, self._starting, self._size = [], {}, 0
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    # -- what the pipeline asks for ----------------------------------------------------------------------------------
    @property
    def ahead(self) -> int:
        """Batches of texts that may be on their way while the next one is put together."""
        return _AHEAD * self._size

    def read(self, files: Sequence[Found]) -> Iterator[Read]:
        """Read files on the workers; they come back in their order.

        Raises:
            L2MError: the workers cannot be used, or died again and again.
            IncompatibleError: a worker has another embedder, or another version of the library.
        """
        groups = _groups(files)
        waiting: deque[tuple[list[Found], _Call | None]] = deque()
        exhausted = False
        while True:
            while not exhausted and len(waiting) < max(1, self.ahead):
                group = next(groups, None)
                exhausted = group is None
                if group is not None:
                    waiting.append((group, None if group[0].error else self._send(_Call("read", group))))
            if not waiting:
                return
            group, call = waiting.popleft()
            if call is None:
                yield from (self._unreadable(file) for file in group)
                continue
            done: list[_Done] = self._answer(call)
            yield from (_read(file, one) for file, one in zip(group, done, strict=False))
            if rest := group[len(done) :]:
                waiting.appendleft((rest, self._send(_Call("read", rest))))

    def encode(self, texts: list[str], progress: Callable[[int], None]) -> Callable[[], Vectors]:
        """Have texts embedded by a worker; what is given waits for the (N, E) float32 vectors.

        Raises:
            L2MError: the workers cannot be used, or died again and again.
        """
        call = self._send(_Call("encode", texts))

        def vectors() -> Vectors:
            found: Vectors = self._answer(call)
            progress(len(texts))
            return found

        return vectors

    def _unreadable(self, file: Found) -> Read:
        return Read(file, file.error, iter(()), lambda _: row_of(file, None, file.error, self._limits, 0))

    # -- workers -----------------------------------------------------------------------------------------------------
    def _engage(self, share: dict[str, float]) -> None:
        # Ray must not start a dead worker again by itself: it would wait for the very machine that may be gone, and
        # hold back the calls that any other worker can answer.
        worker = self._ray.remote(_Worker).options(max_restarts=0, **share).remote(self._load, self._limits, _TEXT)
        self._starting[worker.introduce.remote()] = _Place(worker, share)

    def _welcome(self, timeout: float) -> None:
        """Take on the workers that have introduced themselves, waiting for the first of them."""
        if not self._starting:
            return
        ready, _ = self._ray.wait(list(self._starting), num_returns=1, timeout=timeout)
        for answer in ready:
            place = self._starting.pop(answer)
            try:
                self._check(*self._get(answer))
            except self._ray.exceptions.RayError as error:
                self._replace(place, error)
            else:
                self._serving.append(place)

    def _check(self, release: str, fingerprint: str) -> None:
        if release != version("l2m-rag"):
            raise IncompatibleError(
                f"a worker of the Ray cluster at {self.address!r} has l2m-rag {release}, this process "
                f"{version('l2m-rag')}; install the same version on all machines"
            )
        if fingerprint != self._fingerprint:
            raise IncompatibleError(
                f"a worker of the Ray cluster at {self.address!r} has other weights of the embedder ({fingerprint}) "
                f"than the collection ({self._fingerprint}); copy the models folder to all machines"
            )

    def _kill(self, place: _Place) -> None:
        place.dead = True
        with suppress(Exception):  # it may be gone, or the cluster
            self._ray.kill(place.worker)

    def _replace(self, place: _Place, error: Exception) -> None:
        """Put another worker in the place of one that has died, once for all of its calls."""
        if place.dead:
            return
        self._kill(place)  # one that only does not answer must not hold on to its share
        if place in self._serving:
            self._serving.remove(place)
        logger.info("a worker of the Ray cluster has died: %s", said(error))
        self._deaths += 1
        if self._deaths > _ATTEMPTS * self._size:
            raise L2MError(
                f"the workers of the Ray cluster at {self.address!r} die again and again ({said(error)}). Is l2m-rag "
                f"installed there, and is there enough memory? Nothing is lost, run it again to go on"
            ) from error
        self._engage(place.share)

    def _send(self, call: _Call) -> _Call:
        """Give a call to the worker that has the fewest."""
        self._welcome(0)
        while not self._serving:
            self._welcome(_REMARK)
            if not self._serving:
                logger.warning("waiting for a free worker of the Ray cluster at %r", self.address)
        call.place = min(self._serving, key=lambda place: place.calls)
        call.place.calls += 1
        call.attempts += 1
        call.answer = getattr(call.place.worker, call.method).remote(call.argument)
        return call

    def _answer(self, call: _Call) -> Any:
        """Wait for what a worker answers; when it dies, ask another one."""
        while True:
            assert call.place is not None
            try:
                answer = self._get(call.answer)
            except self._ray.exceptions.RayError as error:
                self._replace(call.place, error)
                if call.attempts >= _ATTEMPTS:
                    about = f"{call.argument[0].id} or a file after it" if call.method == "read" else "some texts"
                    raise L2MError(
                        f"{call.attempts} workers of the Ray cluster at {self.address!r} have died over {about} "
                        f"({said(error)}). Nothing is lost, run it again to go on"
                    ) from error
                self._send(call)
            else:
                call.place.calls -= 1
                self._deaths = 0
                return answer

    def _get(self, answer: Any) -> Any:
        """Wait for an answer.

        Raises:
            L2MError: the worker has raised it, or something else; or the cluster is gone.
            RayError: the worker has died.
        """
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, L2MError):
                raise cause from error
            raise L2MError(f"a worker of the Ray cluster at {self.address!r} failed: {said(cause)}") from error
        except ConnectionError as error:
            raise L2MError(
                f"the Ray cluster at {self.address!r} is gone ({said(error)}). Nothing is lost, run it again to go on"
            ) from error


def _groups(files: Sequence[Found]) -> Iterator[list[Found]]:
    """Give runs of files that go together: small ones, or those that cannot be read; never both."""
    group: list[Found] = []
    size = 0
    for file in files:
        full = len(group) >= _FILES or size + file.bytes > _BYTES
        if group and (full or (file.error is None) != (group[0].error is None)):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.bytes
    if group:
        yield group


def _read(file: Found, done: _Done) -> Read:
    """Give what a worker has read, as this process would have."""
    error = LoadError(*done.failure) if done.failure else None
    if error and done.unseen_by and os.path.lexists(file.path):
        error = LoadError("unreadable", f"{done.unseen_by} does not have it: paths must be the same on all workers")

    def row(chunks: int) -> DocumentRow:
        return replace(done.row, chunks=chunks, error=str(error) if error else "")

    return Read(file, error, iter(done.chunks), row)
