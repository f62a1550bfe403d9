from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from l2m_rag.errors import REASONS, L2MError, LoadError, UsageError
from l2m_rag.indexers.loaders import load
from l2m_rag.indexers.workers import ParserPool, Result
from l2m_rag.memory_tiers.records import Parsed

MIXED = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "mixed_docs" / "files.tar.zst"


class OddPool(ParserPool):
    """Its children sleep, die or lie on files of certain names."""

    _BOOTSTRAP: ClassVar[str] = """
import os, signal, sys, time
from l2m_rag.indexers import loaders, workers
real = loaders.load
def load(path, **limits):
    if path.name.startswith("sleep"):
        time.sleep(60)
    if path.name.startswith("die"):
        os.kill(os.getpid(), getattr(signal, path.stem.partition("-")[2]))
    if path.name.startswith("print"):
        print("x" * 1000, flush=True); os.write(1, b"y" * 1000)
    if path.name.startswith("lie"):
        loaders.load = None; workers._send_frame(answers, {"kind": "parsed", "pages": "none"})
    return real(path, **limits)
loaders.load = load
make = os.fdopen
def fdopen(descriptor, mode):
    global answers
    answers = make(descriptor, mode)
    return answers
os.fdopen = fdopen
workers.serve()
"""


def files(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_text(f"text of {path.name}\n")
    return paths


def texts(results: Iterator[tuple[Path, Result]]) -> list[str]:
    return [result.text if isinstance(result, Parsed) else result.reason for _, result in results]


def expected(*names: str) -> list[str]:
    return [f"text of {name}\n" for name in names]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_input(tmp_path: Path, workers: int) -> None:
    paths = files(tmp_path, *(f"{number}.txt" for number in range(40)))
    (tmp_path / "7.txt").write_text("long line\n" * 200_000)
    with ParserPool(workers=workers) as pool:
        results = list(pool.parse(paths))
    assert [path for path, _ in results] == paths
    for path, result in results:
        assert isinstance(result, Parsed)
        assert result == load(path)


def test_a_parsed_value_survives_the_pipe_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "é\udcff\n.md"
    path.write_bytes("---\ntitle: Tïtle\n---\n# One 😀\r\n\0text\n## Two\n".encode())
    with ParserPool() as pool:
        [(given, result)] = pool.parse([path])
    assert given == path
    assert result == load(path)


def test_errors_come_as_values(tmp_path: Path) -> None:
    paths = files(tmp_path, "a.txt", "b.pdf", "c.txt")
    os.mkfifo(tmp_path / "fifo.txt")
    paths += [tmp_path / "fifo.txt", tmp_path / "missing.txt", tmp_path]
    with ParserPool() as pool:
        assert texts(pool.parse(paths)) == [
            "text of a.txt\n",
            "corrupt",
            "text of c.txt\n",
            "unreadable",
            "unreadable",
            "unreadable",
        ]


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    paths = files(tmp_path, "a.txt", "sleep.txt", "b.txt", "c.txt")
    begun = time.monotonic()
    with OddPool(timeout=1.0) as pool:
        assert texts(pool.parse(paths)) == [*expected("a.txt"), "timeout", *expected("b.txt", "c.txt")]
    assert time.monotonic() - begun < 20


def test_a_slow_consumer_is_not_taken_for_a_slow_parser(tmp_path: Path) -> None:
    paths = files(tmp_path, "a.txt", "b.txt", "c.txt", "d.txt")
    (tmp_path / "b.txt").write_text("long line\n" * 100_000)  # more than a pipe holds
    with ParserPool(timeout=0.5) as pool:
        for _, result in pool.parse(paths):
            assert isinstance(result, Parsed)
            time.sleep(0.7)


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("SIGKILL", "too_large", "memory"),
        ("SIGSEGV", "corrupt", "SIGSEGV"),
        ("SIGABRT", "corrupt", "SIGABRT"),
    ],
)
def test_a_crash_costs_one_file(tmp_path: Path, name: str, reason: str, detail: str) -> None:
    paths = files(tmp_path, "a.txt", f"die-{name}.txt", "b.txt", "c.txt")
    with OddPool() as pool:
        results = [result for _, result in pool.parse(paths)]
    assert isinstance(results[1], LoadError)
    assert results[1].reason == reason
    assert detail in results[1].detail
    assert [result.text for result in results if isinstance(result, Parsed)] == expected("a.txt", "b.txt", "c.txt")


def test_killing_an_idle_child_loses_nothing(tmp_path: Path) -> None:
    paths = files(tmp_path, *(f"{number}.txt" for number in range(20)))
    seen = []
    with ParserPool() as pool:
        for path, result in pool.parse(paths):
            seen.append(path)
            if path.name == "5.txt":
                os.kill(pool.pids[0], signal.SIGKILL)
            # The file that the child was at may be lost; all others must come.
            assert isinstance(result, Parsed) or path.name in ("6.txt", "7.txt")
    assert seen == paths


def test_what_a_library_prints_does_not_reach_the_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = files(tmp_path, "print.txt", "a.txt")
    with OddPool() as pool:
        assert texts(pool.parse(paths)) == expected("print.txt", "a.txt")
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_makes_no_sense_costs_one_file(tmp_path: Path) -> None:
    paths = files(tmp_path, "lie.txt", "a.txt")
    with OddPool() as pool:
        assert texts(pool.parse(paths)) == ["corrupt", *expected("a.txt")]


def test_memory_of_a_file_is_limited(tmp_path: Path) -> None:
    bomb, after = files(tmp_path, "bomb.txt", "after.txt")
    bomb.write_bytes(b"a line of the bomb\n" * 3_000_000)
    with ParserPool(memory=100 << 20) as pool:
        assert texts(pool.parse([bomb, after])) == ["too_large", *expected("after.txt")]


def test_a_file_over_the_limit_of_size_is_not_read(tmp_path: Path) -> None:
    paths = files(tmp_path, "a.txt")
    with ParserPool(max_bytes=5) as pool:
        assert texts(pool.parse(paths)) == ["too_large"]


@pytest.mark.parametrize("workers", [1, 2])
def test_paths_are_pulled_as_they_are_needed(tmp_path: Path, workers: int) -> None:
    paths = files(tmp_path, *(f"{number}.txt" for number in range(30)))
    pulled = 0

    def pull() -> Iterator[Path]:
        nonlocal pulled
        for path in paths:
            pulled += 1
            yield path

    with ParserPool(workers=workers) as pool:
        for done, _ in enumerate(pool.parse(pull())):
            assert pulled - done <= 2 * workers


def test_children_are_replaced_before_they_grow_old(tmp_path: Path) -> None:
    path = files(tmp_path, "a.txt")[0]
    with ParserPool() as pool:
        seen = set()
        for _, result in pool.parse([path] * 4100):
            assert isinstance(result, Parsed)
            seen.update(pool.pids)
    assert 2 <= len(seen) <= 4


def test_a_pool_can_be_used_again_after_an_iteration_was_left(tmp_path: Path) -> None:
    paths = files(tmp_path, *(f"{number}.txt" for number in range(10)))
    with ParserPool() as pool:
        iteration = pool.parse(paths)
        next(iteration)
        with pytest.raises(UsageError, match="already"):
            next(pool.parse(paths))
        iteration.close()  # type: ignore[attr-defined]
        assert texts(pool.parse(paths)) == expected(*(path.name for path in paths))
        pids = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_child_that_cannot_start_is_told(tmp_path: Path) -> None:
    class BrokenPool(ParserPool):
        _BOOTSTRAP: ClassVar[str] = "raise SystemExit(7)"

    with BrokenPool() as pool, pytest.raises(L2MError, match="does not start"):
        list(pool.parse(files(tmp_path, "a.txt")))


@pytest.mark.parametrize("argument", ["workers", "timeout", "memory", "max_bytes"])
def test_limits_are_above_zero(argument: str) -> None:
    with pytest.raises(UsageError, match="above 0"):
        ParserPool(**{argument: 0})


class TellingPool(ParserPool):
    """Its children answer with the names of the modules that they have loaded by now."""

    _BOOTSTRAP: ClassVar[str] = """
import dataclasses, json, sys
from l2m_rag.indexers import loaders, workers
real = loaders.load
def load(path, **limits):
    parsed = real(path, **limits)
    names = sorted(name for name, module in sys.modules.items() if module is not None)
    return dataclasses.replace(parsed, text=json.dumps(names), sections=())
loaders.load = load
workers.serve()
"""


def test_children_import_only_what_parsing_needs(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["a", "b"])
    book.save(tmp_path / "a.xlsx")
    (tmp_path / "a.html").write_text("<p>text</p>")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 cr\xe8me")
    with TellingPool() as pool:
        *_, last = texts(pool.parse([tmp_path / "a.xlsx", tmp_path / "a.html", tmp_path / "a.txt"]))
    loaded = {name.partition(".")[0] for name in json.loads(last)}
    assert {"openpyxl", "lxml", "charset_normalizer"} <= loaded
    assert not loaded & {"torch", "numpy", "lancedb", "pyarrow", "transformers", "faiss", "pandas"}


@pytest.mark.slow
def test_mixed_documents_all_end_in_text_or_a_reason(tmp_path: Path) -> None:
    if not MIXED.exists():
        pytest.skip(f"{MIXED} is missing")
    import zstandard

    with (
        MIXED.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        archive.extractall(tmp_path, filter="data")
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(paths) > 500
    read = 0
    with ParserPool(workers=2) as pool:
        for _, result in pool.parse(paths):
            read += isinstance(result, Parsed)
            assert isinstance(result, Parsed) or result.reason in REASONS
            for pid in pool.pids:
                assert psutil.Process(pid).memory_info().rss < 2 << 30
    assert read > 0.6 * len(paths)
