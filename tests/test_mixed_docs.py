"""The program over some hundred real and hostile files of three dozen formats."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

import l2m_rag.config
from l2m_rag.errors import REASONS

ROOT = Path(l2m_rag.config.__file__).parents[1]
FILES = ROOT.parent / "shared" / "data" / "mixed_docs" / "files.tar.zst"
GIBIBYTE = 1 << 30


def unpack(folder: Path) -> list[str]:
    """Unpack the files; give their paths."""
    zstandard = pytest.importorskip("zstandard")
    with (
        FILES.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        archive.extractall(folder, filter="data")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def largest(process: psutil.Process) -> int:
    """Give the memory of the largest process of a tree."""
    sizes = [0]
    for member in (process, *children(process)):
        try:
            sizes.append(member.memory_info().rss)
        except psutil.Error:
            continue
    return max(sizes)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FILES.exists(), reason=f"{FILES.name} is not here")
def test_every_file_is_read_or_refused_with_a_reason_and_nothing_else_is_touched(
    tmp_path: Path, embedder: Path
) -> None:
    docs = tmp_path / "docs"
    files = unpack(docs)
    assert len(files) > 500
    for name in ("user", "temporary", "work"):
        (tmp_path / name).mkdir()
    before, outside = listing(docs), listing(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("L2M_", "XDG_"))}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "user"),
        "TMPDIR": str(tmp_path / "temporary"),
        "L2M_EMBEDDER": str(embedder),
        "L2M_CHUNK_SIZE": "64",
        "L2M_FILE_TIMEOUT": "300",  # however busy the machine is
    }
    program = [sys.executable, "-m", "l2m_rag.cli.main", "--home", str(tmp_path / "home")]

    def run(*args: str) -> tuple[int, dict[str, object], int]:
        """Give the exit code of the program, what it said, and the most memory that a process of it had."""
        with (
            (tmp_path / "said").open("w+") as said,
            subprocess.Popen([*program, *args], stdout=said, env=environment, cwd=tmp_path / "work") as process,
        ):
            memory, watched = 0, psutil.Process(process.pid)
            while process.poll() is None:
                memory = max(memory, largest(watched))
                time.sleep(0.05)
            said.seek(0)
            return process.returncode, json.load(said), memory

    code, report, memory = run("ingest", str(docs), "--json")
    failed = report["failed"]
    assert isinstance(failed, list)
    reasons = Counter(failure["reason"] for failure in failed)
    assert code == 3
    assert reasons.keys() <= set(REASONS)
    assert memory < 2 * GIBIBYTE

    code, info, _ = run("collections", "info", "default", "--documents", "--json")
    rows = info["rows"]
    assert isinstance(rows, list)
    read = [row["id"] for row in rows if not row["error"]]
    assert code == 0
    assert sorted([*read, *(failure["path"] for failure in failed)]) == files
    assert len(read) == report["added"]
    assert len(read) > 350  # what is refused are archives, Office files of before 2007, scans, and what is damaged
    assert reasons["timeout"] == reasons["unreadable"] == 0

    code, again, _ = run("ingest", str(docs), "--json")
    assert (code, again["added"], again["updated"], again["unchanged"]) == (3, 0, 0, len(read))
    assert again["failed"] == failed
    assert run("collections", "verify", "default", "--json")[1]["ok"]

    (tmp_path / "said").unlink()
    assert listing(docs) == before
    new = {path for path in listing(tmp_path).keys() - outside.keys() if not path.startswith("home/")}
    assert new == set()
