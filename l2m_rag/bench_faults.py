"""What the long-term tier does when a process is killed, the disk fails, bits flip, or two write at once: counted.

A worker process loads everything once and forks a child for each trial. A small library in front of the C library
(`data/faults.c`, compiled when it is needed) counts what a child writes below its folder, and lets the N-th such call
be its last, or fail. What is there afterwards is held against the in-memory reference of the tier: a trial may leave
the state before the operation that was cut off or the one behind it, and nothing else.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l2m_rag.errors import L2MError, UsageError
from l2m_rag.memory_tiers import nearest
from l2m_rag.memory_tiers.in_memory import InMemoryTier
from l2m_rag.memory_tiers.lance_store import Vectors
from l2m_rag.memory_tiers.long_term import LongTermTier, Manifest, Tier, create_tier
from l2m_rag.memory_tiers.records import Chunk

Fault = Literal["count", "kill", "full", "broken"]
_FAULTS: tuple[Fault, ...] = ("count", "kill", "full", "broken")  # in the order of faults.c
_DIMENSION = 8
_BASE = 120  # chunks before the operations of a trial
_SECONDS = 60.0  # after which a trial is taken for hung
_MANIFEST = Manifest(embedder="faults", fingerprint="faults", dimension=_DIMENSION, created_at=0.0)


def faults(
    *,
    points: int = 200,
    failures: int | None = None,
    flips: int = 500,
    races: int = 200,
    told: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Try the long-term tier on faults, and count what they did.

    Args:
        points: SIGKILLs, spread over all that a run of adds, evictions, compactions and index saves writes.
        failures: writes, fsyncs and renames of such a run that fail, once with EIO and once with ENOSPC and all behind
            them too; default each.
        flips: bits flipped, a stored file each in turn; and as many files cut short.
        races: of two processes that write the same ids without the lock.
        told: called with what is being done.

    Returns:
        `points` and `failures`, and of both `lost`, `duplicated`, `wrong` and `unopenable`; `calls`, what a run writes;
        `damaged`, bits flipped and files cut short, with `detected`, of these `by_verify_only`, `harmless` and
        `silent`; `races` with `race_duplicates`; `bad`, the first trials that should not have ended as they did.

    Raises:
        UsageError: not on Linux.
        L2MError: there is no C compiler.
    """
    if sys.platform != "linux":
        raise UsageError(f"bench faults needs Linux; this is {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="l2m-faults-") as scratch, _Worker(Path(scratch)) as worker:
        calls = worker.ask("run", "count", 0)["seen"]
        counted: Counter[str] = Counter()
        trials = [("run", "kill", number) for number in _spread(points, calls)]
        trials += [("run", how, number) for number in _spread(failures or calls, calls) for how in ("full", "broken")]
        trials += [(how, "count", number) for number in range(flips) for how in ("flip", "cut")]
        trials += [("race", "count", number) for number in range(races)]
        bad = []
        for done, trial in enumerate(trials):
            told(f"trial {done + 1} of {len(trials)}: {' '.join(map(str, trial))}")
            outcomes = worker.ask(*trial)["outcomes"]
            counted.update(outcomes)
            if set(outcomes) & {"lost", "duplicated", "wrong", "unopenable", "silent", "race_duplicates"}:
                bad.append([*trial, *outcomes])
    return {
        "points": points,
        "failures": 2 * (failures or calls),
        **{key: counted[key] for key in ("lost", "duplicated", "wrong", "unopenable")},
        "calls": calls,
        "damaged": 2 * flips,
        "detected": counted["detected"] + counted["by_verify"],
        "by_verify_only": counted["by_verify"],
        "harmless": counted["harmless"],
        "silent": counted["silent"],
        "races": races,
        "race_duplicates": counted["race_duplicates"],
        "bad": bad[:20],
    }


def _spread(count: int, calls: int) -> list[int]:
    """Give so many numbers of calls, as far apart as can be; more than there are come again."""
    return [1 + number * calls // count % calls for number in range(count)]


# -- the worker --------------------------------------------------------------------------------------------------------
class _Worker:
    """The process that forks a child for each trial, with the library that counts in front of the C library."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def __enter__(self) -> _Worker:
        library = _compiled(self._scratch)
        command = [sys.executable, "-W", "ignore", "-c", "from l2m_rag.bench_faults import serve; serve()"]
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*command, str(self._scratch), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes its pipes, upon which it ends
            pass

    def ask(self, trial: str, fault: str, number: int) -> dict[str, Any]:
        """Let it do a trial, and give what came of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([trial, fault, number]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise L2MError(f"the worker of bench faults ended with {self._process.wait()} at {trial} {fault} {number}")
        found: dict[str, Any] = json.loads(line)
        return found


def _compiled(scratch: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise L2MError("bench faults compiles a small C library; install a C compiler, for example: apt install gcc")
    library = scratch / "faults.so"
    with resources.as_file(resources.files("l2m_rag") / "data" / "faults.c") as source:
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def serve() -> None:
    """Do trials that are asked for on stdin, a line of JSON each; the other side of `faults`."""
    scratch, library = Path(sys.argv[1]), ctypes.CDLL(sys.argv[2])
    nearest.EXACT_UP_TO = 100  # so that what is trained and saved is an IVF index too
    trials = {"run": _run, "flip": _damage, "cut": _damage, "race": _race}
    _in_child(lambda say: _make_base(scratch))
    for line in sys.stdin:
        trial, fault, number = json.loads(line)
        place = scratch / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(scratch / "base", place)
        sys.stdout.write(json.dumps(trials[trial](library, place, trial, fault, number)) + "\n")
        sys.stdout.flush()


def _in_child(work: Callable[[Callable[[object], None]], object]) -> list[Any]:
    """Do some work in a child; give what it said, and last how it ended (0: well, 1: by an error, or a signal)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            work(lambda value: _say(writing, value))
            code = 0
        except BaseException:
            _say(writing, {"text": traceback.format_exc()})
        finally:
            os._exit(code)
    os.close(writing)
    said = b""
    until = time.monotonic() + _SECONDS
    while True:
        if not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(reading, 65_536)
        if not part:
            break
        said += part
    os.close(reading)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [*map(json.loads, said.splitlines()), ended]


def _say(pipe: int, value: object) -> None:
    os.write(pipe, json.dumps(value).encode() + b"\n")


# -- what is done to a tier --------------------------------------------------------------------------------------------
def _made(numbers: Sequence[int], version: int = 0) -> tuple[list[Chunk], Vectors]:
    chunks = []
    for number in numbers:
        text = f"w{number} v{version} m{number % 7} n{number % 11}"
        chunks.append(
            Chunk(f"{number:032x}", f"{number // 10}.txt", number % 10, None, "", 0, len(text), text, {"v": version})
        )
    drawn = np.stack([np.random.default_rng([number, version]).standard_normal(_DIMENSION) for number in numbers])
    return chunks, (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def _make_base(scratch: Path) -> None:
    tier = create_tier(scratch / "base", _MANIFEST)
    tier.add(*_made(range(_BASE)))
    tier.hot_index()


def _index(tier: Tier) -> object:
    return tier.hot_index() if isinstance(tier, LongTermTier) else None


_OPERATIONS: tuple[Callable[[Tier], object], ...] = (
    lambda tier: tier.add(*_made(range(_BASE, _BASE + 40))),
    _index,
    lambda tier: tier.evict([f"{number:032x}" for number in range(0, _BASE, 3)]),
    lambda tier: tier.add(*_made(range(50, 90), version=1)),  # some replaced, some of those evicted come back
    lambda tier: tier.compact(),
    lambda tier: tier.evict([f"{number:032x}" for number in range(51, 71)]),
    _index,
    lambda tier: tier.compact(),
)


def _reference(done: int) -> InMemoryTier:
    """Give the reference after the first operations."""
    tier = InMemoryTier(_DIMENSION)
    tier.add(*_made(range(_BASE)))
    for operation in _OPERATIONS[:done]:
        operation(tier)
    return tier


def _content(tier: Tier) -> dict[str, Any]:
    """Give what can be seen of a tier: its chunks, and what searches find."""
    chunks = tier.fetch([f"{number:032x}" for number in range(_BASE + 40)])
    _, queries = _made(range(1000, 1004))
    dense = [[hit.chunk.id for hit in tier.search("", query, 5, mode="dense")] for query in queries]
    words = [
        sorted(hit.chunk.id for hit in tier.search(f"w{number}", None, 3, mode="text")) for number in (1, 3, 60, 130)
    ]
    return {
        "rows": len(tier),
        "chunks": {chunk.id: [chunk.text, chunk.document, chunk.metadata] for chunk in chunks},
        "dense": dense,
        "words": words,
    }


def _run(library: Any, place: Path, trial: str, fault: str, number: int) -> dict[str, Any]:
    """Do the operations under a fault, and judge what is there afterwards."""

    def work(say: Callable[[object], None]) -> None:
        tier = LongTermTier(place)
        library.faults_arm(str(place).encode(), ctypes.c_long(number), _FAULTS.index(fault))
        for done, operation in enumerate(_OPERATIONS, 1):
            operation(tier)
            say(done)
        say({"seen": library.faults_seen()})

    said = _in_child(work)
    done = max((one for one in said[:-1] if isinstance(one, int)), default=0)
    seen = next((one["seen"] for one in said[:-1] if isinstance(one, dict) and "seen" in one), 0)
    return {"seen": seen, "outcomes": _judge(place, done)}


def _judge(place: Path, done: int) -> list[str]:
    """Hold a tier against the reference before and behind the operation that was cut off."""

    def work(say: Callable[[object], None]) -> None:
        tier = LongTermTier(place)
        say([one for one in tier.verify() if "altered" in one or "cut short" in one])
        say(_content(tier))
        say(_content(LongTermTier(place)))  # now from the cache that the first look has left
        tier.add(*_made([2000]))  # and it can be written to
        say(len(tier.fetch([f"{2000:032x}"])))

    said = _in_child(work)
    if said[-1] != 0 or len(said) != 5:
        told = [one["text"] for one in said if isinstance(one, dict) and "text" in one]
        return ["unopenable", *told]
    altered, *contents, added, _ = said
    before, behind = (_content(_reference(min(count, len(_OPERATIONS)))) for count in (done, done + 1))
    if not altered and added == 1 and all(content in (before, behind) for content in contents):
        return []
    kept = before["chunks"].keys() & behind["chunks"].keys()
    if kept - contents[0]["chunks"].keys():
        return ["lost"]
    return ["duplicated" if contents[0]["rows"] > len(contents[0]["chunks"]) else "wrong", *altered]


def _damage(library: Any, place: Path, trial: str, fault: str, number: int) -> dict[str, Any]:
    """Flip a bit of a stored file, or cut it short, and look whether that is told or does not matter."""
    draw = random.Random(f"{trial} {number}")
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[number % len(files)]
    content = bytearray(path.read_bytes())
    if trial == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(content)

    def use(say: Callable[[object], None]) -> None:
        warned = _Warnings()
        content = _content(LongTermTier(place))
        say([content, warned.count])

    def check(say: Callable[[object], None]) -> None:
        say(LongTermTier(place).verify())

    whole = _content(_reference(0))
    checked = _in_child(check)
    used = _in_child(use)
    if used[-1] != 0:
        return {"outcomes": ["detected"]}
    content, warnings = used[0]
    if content == whole:
        return {"outcomes": ["harmless"]}
    if warnings:
        return {"outcomes": ["detected"]}
    told = checked[-1] != 0 or any("altered" in problem or "cut short" in problem for problem in checked[0])
    return {"outcomes": ["by_verify" if told else "silent", str(path.relative_to(place))]}


class _Warnings(logging.Handler):
    """Counts what the library tells the user beside its results."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        logging.getLogger("l2m_rag").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def _race(library: Any, place: Path, trial: str, fault: str, number: int) -> dict[str, Any]:
    """Let two processes add the same new chunks at the same time, past the lock."""
    start = time.monotonic() + 0.3

    def write() -> None:
        tier = LongTermTier(place)
        time.sleep(max(0.0, start - time.monotonic()))
        with suppress(L2MError, RuntimeError, OSError):  # the one that comes too late may be told so
            tier.store.add_chunks(*_made(range(_BASE, _BASE + 40), version=number))

    def work(say: Callable[[object], None]) -> None:
        other = os.fork()  # before Lance has made threads, which a fork would lose
        if other == 0:
            signal.alarm(int(_SECONDS))
            try:
                write()
            finally:
                os._exit(0)
        write()
        say(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))

    def count(say: Callable[[object], None]) -> None:
        tier = LongTermTier(place)
        ids = [f"{one:032x}" for one in range(_BASE + 40)]
        say(len(tier) - len(tier.fetch(ids)))

    ended = _in_child(work)
    found = _in_child(count)
    if ended != [0, 0]:
        return {"outcomes": ["unopenable", str(ended)]}
    return {"outcomes": ["race_duplicates"] if found[-1] != 0 or found[0] != 0 else []}
