"""Ingest: what changes is done again, what does not is left alone, and a run that is killed is made good by the next.

Run as a program, this file is the process that the tests kill: it has all libraries loaded and forks for each run.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l2m_rag import collection as library
from l2m_rag import models
from l2m_rag.config import Settings
from l2m_rag.indexers import pipeline
from l2m_rag.indexers.pipeline import IngestReport, Limits, plan
from l2m_rag.indexers.scan import scan
from l2m_rag.memory_tiers.long_term import LongTermTier, Manifest, create_tier
from l2m_rag.memory_tiers.places import Where

LIMITS = Limits(chunk_size=16, chunk_overlap=0)
SUBJECTS = ["sheep", "goats", "horses", "cows", "hens", "geese", "dogs", "cats"]


def text(number: int, version: int = 0, paragraphs: int = 4) -> str:
    """Give a text of several chunks, of which a new version changes only one."""
    parts = [
        f"Paragraph {part} of text {number} tells at length how many {SUBJECTS[(number + part) % 8]} are on the farm."
        for part in range(paragraphs)
    ]
    parts[number % paragraphs] += f" This is version {version}."
    return "\n\n".join(parts)


def write(folder: Path, count: int = 3, version: int = 0) -> Path:
    for number in range(count):
        path = folder / f"{number // 10}" / f"text {number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(number, version))
    return folder


def no_embedder() -> Any:
    raise AssertionError("nothing was to be embedded")


def run(tier: LongTermTier, embedder: Any, *paths: Path, limits: Limits = LIMITS, **options: Any) -> IngestReport:
    work = plan(paths, tier.store, limits, **options)
    return pipeline.ingest("x", work, tier, embedder, limits)


def counts(report: IngestReport) -> tuple[int, int, int, int, int]:
    return report.added, report.updated, report.unchanged, report.removed, len(report.failed)


def content(tier: LongTermTier, embedder: Any) -> dict[str, Any]:
    """Give all that a collection holds, and what searches in it find; without times."""
    tier.store.optimize()  # BM25 counts words by parts of its index: only one that is whole gives everybody's scores
    ids = tier.store.row_ids()
    chunks = tier.store.fetch(ids.tolist())
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    vectors = tier.store.vectors(ids)
    assert tier.store.damaged() == []
    return {
        "documents": {name: replace(row, ingested_at=0) for name, row in tier.store.documents().items()},
        "chunks": {chunk.id: chunk for chunk in chunks},
        "vectors": {chunk.id: tuple(vector.tolist()) for chunk, vector in zip(chunks, vectors, strict=True)},
        "found": {
            (subject, mode): sorted(
                (-round(passage.score, 5), passage.chunk.id)
                for passage in tier.search(subject, embedder.encode([subject])[0], 1000, mode=mode)
            )
            for subject in [*SUBJECTS, "version 1"]
            for mode in ("dense", "text")
        },
    }


@pytest.fixture
def tier(tmp_path: Path, hashing: Any) -> LongTermTier:
    return new_tier(tmp_path / "collection", hashing)


def new_tier(folder: Where, embedder: Any) -> LongTermTier:
    return create_tier(
        folder, Manifest(embedder="hashing", fingerprint="x", dimension=embedder.dimension, created_at=0)
    )


def same_as_afresh(tier: LongTermTier, embedder: Any, *paths: Path, limits: Limits = LIMITS) -> bool:
    """Say whether a collection holds what a new one holds that reads the same paths."""
    afresh = new_tier(tier.folder.with_name(f"afresh {time.monotonic_ns()}"), embedder)
    run(afresh, embedder, *paths, limits=limits)
    return content(tier, embedder) == content(afresh, embedder)


# -- what is done again, and what is not


def test_a_second_ingest_adds_nothing_and_needs_no_embedder(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", 12)
    (docs / "empty.txt").touch()
    assert counts(run(tier, hashing, docs)) == (12, 0, 0, 0, 1)
    before, version = content(tier, hashing), tier.store.version
    again = run(tier, no_embedder, docs)
    assert (counts(again), again.chunks, again.failed[0].reason) == ((0, 0, 12, 0, 1), 0, "empty")
    assert counts(run(tier, no_embedder, docs, docs / "0", docs / "0" / "text 1.txt")) == (0, 0, 12, 0, 1)
    assert (content(tier, hashing), tier.store.version) == (before, version)


def test_a_changed_file_costs_the_vectors_of_its_new_texts(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    file = docs / "0" / "text 1.txt"
    run(tier, hashing, docs)
    for new in ("A new first paragraph.\n\n" + text(1), text(1, version=1), text(1, version=1, paragraphs=2)):
        before = {chunk.text for chunk in tier.store.chunks_of("0/text 1.txt")}
        hashing.encoded.clear()
        file.write_text(new)
        assert counts(run(tier, hashing, docs)) == (0, 1, 2, 0, 0)
        after = {chunk.text for chunk in tier.store.chunks_of("0/text 1.txt")}
        assert sorted(hashing.encoded) == sorted(after - before)
        assert len(hashing.encoded) <= 2
    assert same_as_afresh(tier, hashing, docs)


def test_a_touched_file_is_neither_parsed_nor_embedded(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    run(tier, hashing, docs)
    os.utime(docs / "0" / "text 1.txt", (1, 1))
    work = plan([docs], tier.store, LIMITS)
    assert (work.todo, [row.id for row in work.touched]) == ([], ["0/text 1.txt"])
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 3, 0, 0)
    assert plan([docs], tier.store, LIMITS).touched == []
    assert same_as_afresh(tier, hashing, docs)


def test_other_chunk_settings_cut_all_documents_anew(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    run(tier, hashing, docs)
    larger = Limits(chunk_size=50, chunk_overlap=0)
    assert counts(run(tier, hashing, docs, limits=larger)) == (0, 3, 0, 0, 0)
    assert same_as_afresh(tier, hashing, docs, limits=larger)
    assert counts(run(tier, no_embedder, docs, limits=larger)) == (0, 0, 3, 0, 0)


def test_a_document_longer_than_a_batch_is_replaced_whole(
    tier: LongTermTier, hashing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_BATCH", 8)
    docs = write(tmp_path / "docs")
    (docs / "long.txt").write_text(text(1, paragraphs=30))
    run(tier, hashing, docs)
    (docs / "long.txt").write_text(text(1, paragraphs=25, version=1))
    run(tier, hashing, docs)
    assert same_as_afresh(tier, hashing, docs)


def test_a_file_that_changes_while_it_is_read_is_read_again(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("The old text.")
    cut = hashing.spans

    def spans(texts: list[str]) -> Any:
        file.write_text("The new text.")  # it was parsed, and its hash is still to be taken
        return cut(texts)

    hashing.spans = spans
    run(tier, hashing, file)
    hashing.spans = cut
    assert [chunk.text for chunk in tier.store.chunks_of("a.txt")] == ["The old text."]
    assert counts(run(tier, hashing, file)) == (0, 1, 0, 0, 0)
    assert [chunk.text for chunk in tier.store.chunks_of("a.txt")] == ["The new text."]


# -- files that go, move and fail


def test_prune_removes_what_is_gone_and_nothing_else(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs, other = write(tmp_path / "docs", 12), write(tmp_path / "other", 2)
    (docs / ".hidden.txt").write_text("Hidden, and named itself.")
    (docs / "note.md").write_text("# A note")
    run(tier, hashing, docs, other, docs / ".hidden.txt")
    for gone in (docs / "0" / "text 3.txt", docs / "note.md", other / "0" / "text 1.txt"):
        gone.unlink()
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 11, 0, 0)
    assert counts(run(tier, no_embedder, docs, prune=True, glob="*.md")) == (0, 0, 0, 1, 0)
    assert counts(run(tier, no_embedder, docs / "1", prune=True)) == (0, 0, 2, 0, 0)
    assert counts(run(tier, no_embedder, docs, prune=True)) == (0, 0, 11, 1, 0)
    names = tier.store.documents().keys()
    assert names == tier.store.chunks_per_document().keys()
    assert len(names) == 11 + 2 + 1
    assert {".hidden.txt", "other/0/text 1.txt"} <= names
    assert not {"note.md", "0/text 3.txt"} & names


CLOSED = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from l2m_rag.indexers.pipeline import Limits, plan
from l2m_rag.memory_tiers.lance_store import LanceStore
store = LanceStore(Path(sys.argv[1]) / "tables", 32)
work = plan([sys.argv[2]], store, Limits(chunk_size=16, chunk_overlap=0), prune=True)
print(json.dumps([work.gone, [[found.id, str(found.error)] for found in work.todo]]))
"""


def test_prune_spares_what_lies_below_a_folder_that_cannot_be_listed(
    tier: LongTermTier, hashing: Any, tmp_path: Path
) -> None:
    docs = write(tmp_path / "docs", 12)
    run(tier, hashing, docs)
    (docs / "0" / "text 3.txt").unlink()
    (docs / "1" / "text 11.txt").unlink()
    (docs / "1").chmod(0o300)  # what is in it can be looked at by name, but the names are not told
    program = [sys.executable, "-c", CLOSED, str(tier.folder), str(docs)]
    if os.geteuid() == 0:  # root may read everything, unless it gives that up
        if not shutil.which("setpriv"):
            pytest.skip("root, and no setpriv")
        rights = "-dac_override,-dac_read_search"
        program = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *program]
    environment = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1])}
    said = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert said.returncode == 0, said.stderr
    gone, todo = json.loads(said.stdout)
    assert gone == ["0/text 3.txt"]
    assert todo == [["1", "unreadable: the folder cannot be listed: Permission denied"]]
    (docs / "1").chmod(0o755)


def test_a_folder_that_has_moved_keeps_its_documents(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    run(tier, hashing, docs)
    moved = docs.rename(tmp_path / "papers")
    assert counts(run(tier, no_embedder, moved)) == (0, 0, 3, 0, 0)
    assert {row.uri for row in tier.store.documents().values()} == {str(path) for path in moved.rglob("*.txt")}
    assert same_as_afresh(tier, hashing, moved)


def test_files_of_one_relative_name_are_told_apart(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    folders = [write(docs / name, 1) for name in ("a", "b", "c/b")]
    (folders[2] / "0" / "text 0.txt").write_text("Another text.")
    names = ["0/text 0.txt", "b/0/text 0.txt", str(folders[2] / "0" / "text 0.txt")]
    assert counts(run(tier, hashing, *folders)) == (3, 0, 0, 0, 0)
    for again in (folders, folders[::-1], [docs], [docs / "c"]):
        run(tier, no_embedder, *again)
        assert list(tier.store.documents()) == names
    afresh = new_tier(tmp_path / "one by one", hashing)
    for folder in folders:
        run(afresh, hashing, folder)
    assert content(afresh, hashing) == content(tier, hashing)


def test_names_that_are_not_unicode_keep_apart(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    names = [b"\xff.txt", b"\\xff.txt", b"\\x5cxff.txt", "n\u0303.txt".encode(), "\u00f1.txt".encode(), b"a\nb'\".txt"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            (tmp_path / folder / os.fsdecode(name)).write_text(f"Text {number} in {folder}.")
    run(tier, hashing, tmp_path / "a")
    assert counts(run(tier, hashing, tmp_path / "a", tmp_path / "b")) == (6, 0, 6, 0, 0)
    assert len({chunk.text for chunk in tier.store.fetch(tier.store.row_ids().tolist())}) == 12
    assert counts(run(tier, no_embedder, tmp_path / "b", tmp_path / "a", prune=True)) == (0, 0, 12, 0, 0)
    (tmp_path / "a" / os.fsdecode(names[0])).unlink()
    assert counts(run(tier, no_embedder, tmp_path / "a", prune=True)) == (0, 0, 5, 1, 0)


def test_a_folder_reached_through_a_link_is_not_read_twice(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    (tmp_path / "link").symlink_to(docs)
    (docs / "loop").symlink_to(docs)
    run(tier, hashing, tmp_path / "link")
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 3, 0, 0)
    assert counts(run(tier, no_embedder, docs, tmp_path / "link")) == (0, 0, 3, 0, 0)
    assert len(tier.store.documents()) == 3


def test_a_document_outlives_what_may_pass_and_not_what_stays(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    file = docs / "a.txt"
    file.write_text("A text of sheep.")
    run(tier, hashing, docs)
    before = content(tier, hashing)
    file.unlink()
    os.mkfifo(file)
    assert [failure.reason for failure in run(tier, no_embedder, docs, prune=True).failed] == ["unreadable"]
    assert content(tier, hashing) == before
    file.unlink()
    file.write_bytes(bytes(range(256)) * 20)
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 0, 0, 1)
    assert tier.store.count_chunks() == 0
    (row,) = tier.store.documents().values()
    assert (row.chunks, row.error.split(": ")[0]) == (0, "corrupt")
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 0, 0, 1)
    assert plan([docs], tier.store, LIMITS).todo == []
    file.write_text("A text of sheep.")
    assert counts(run(tier, hashing, docs)) == (1, 0, 0, 0, 0)
    assert same_as_afresh(tier, hashing, docs)


def test_a_failure_is_forgotten_with_its_file(tier: LongTermTier, hashing: Any, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", 1)
    os.mkfifo(docs / "pipe.txt")
    (docs / "dangling.txt").symlink_to("nowhere")
    (docs / "empty.txt").touch()
    run(tier, hashing, docs)
    assert len(tier.store.documents()) == 4
    (docs / "empty.txt").unlink()
    (docs / "pipe.txt").unlink()
    assert counts(run(tier, no_embedder, docs)) == (0, 0, 1, 0, 1)
    assert sorted(tier.store.documents()) == ["0/text 0.txt", "dangling.txt"]


# -- killed


@pytest.mark.parametrize("orphan", ["a new file", "a file that has gone"])
def test_chunks_that_are_one_too_many_here_and_one_too_few_there_are_noticed(
    tier: LongTermTier, hashing: Any, tmp_path: Path, orphan: str
) -> None:
    docs = write(tmp_path / "docs")
    run(tier, hashing, docs)
    (docs / "new.txt").write_text("The first text of a file.")
    (half,) = run_half(tier, hashing, docs / "new.txt")
    if orphan == "a new file":
        (docs / "new.txt").write_text("The second text of a file.")
    else:
        (docs / "new.txt").unlink()
    lost = tier.store.chunks_of("0/text 1.txt")[0]
    tier.store.delete_chunks([lost.id])
    assert tier.store.count_chunks() == sum(row.chunks for row in tier.store.documents().values())
    run(tier, hashing, docs)
    assert half not in tier.store.chunk_ids(["new.txt"])
    assert same_as_afresh(tier, hashing, docs)


def run_half(tier: LongTermTier, embedder: Any, path: Path) -> list[str]:
    """Write the chunks of a new file and no row, as a run does that is killed in between."""
    other = new_tier(tier.folder.with_name("half"), embedder)
    run(other, embedder, path)
    chunks = other.store.chunks_of(path.name)
    tier.store.add_chunks(chunks, embedder.encode([chunk.text for chunk in chunks]))
    return [chunk.id for chunk in chunks]


STORE = "l2m_rag.memory_tiers.lance_store:LanceStore"
CREATION = [
    "lancedb.db:LanceDBConnection.create_table:1:after",
    "lancedb.table:LanceTable.set_unenforced_primary_key:2:before",
    "lancedb.table:LanceTable.create_index:1:after",
    "os:fsync:1:before",  # the owner of the lock is half written
    "l2m_rag.memory_tiers.places:write_json:2:before",
    "l2m_rag.memory_tiers.places:write_json:2:after",
]
WORKING = [
    f"{STORE}.add_chunks:1:after",
    f"{STORE}.add_chunks:3:after",
    f"{STORE}.put_documents:3:after",
    f"{STORE}.optimize:1:during",
    "l2m_rag.memory_tiers.nearest:engine:1:after",
    "l2m_rag.memory_tiers.hot_index:digest:1:before",
    "l2m_rag.memory_tiers.hot_index:_save:1:after",
]
REPLACING = [
    f"{STORE}.put_documents:3:after",  # the rows are marked, the chunks are the old ones
    f"{STORE}.add_chunks:1:after",
    f"{STORE}.drop_stale_chunks:2:after",
    f"{STORE}.remove_documents:1:after",
    "0.3",
    "0.7",
]
FRACTIONS = [str(round((i + 0.5) / 6, 3)) for i in range(6)]


def settings_in(home: Path) -> Settings:
    return Settings(home=home, embedder="hashing", chunk_size=16, chunk_overlap=0)


def arm(point: str) -> None:
    """Let this process be killed before, after or during the n-th call of a function."""
    module, name, number, when = point.replace(":", " ").split()
    owner: Any = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    call = getattr(owner, name)
    left = int(number)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            die()
        if left == 0 and when == "during":
            threading.Timer(0.004, die).start()
        result = call(*args, **options)
        if left == 0:
            die()
        return result

    setattr(owner, name, wrapped)


def serve() -> None:
    """Fork for each order: a process that ingests a folder, and dies where the order says."""
    sys.path.append(str(Path(__file__).parent))
    made = importlib.import_module("conftest").HashingEmbedder()
    models._load_embedder = lambda *_: made  # type: ignore[assignment]
    pipeline._BATCH = 24
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            code = 1
            try:
                if ":" in order["point"]:
                    arm(order["point"])
                Path(order["home"], "began").touch()
                library.open("x", settings=settings_in(Path(order["home"]))).ingest(order["docs"], prune=order["prune"])
                code = 0
            except KeyboardInterrupt:
                code = 130
            finally:
                os._exit(code)
        sys.stdout.write(f"{process}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
        sys.stdout.flush()


class Killer:
    """Starts ingests in another process and ends them by force."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.seconds = 0.0  # that an undisturbed run takes

    def ingest(self, home: Path, docs: Path, point: str = "", *, prune: bool = False, by: int = signal.SIGKILL) -> int:
        """Ingest a folder, killed at a call or after a share of the usual time; give the exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        home.mkdir(exist_ok=True)
        (home / "began").unlink(missing_ok=True)
        order = {"home": str(home), "docs": str(docs), "point": point, "prune": prune}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        process = int(self._process.stdout.readline())
        if point and ":" not in point:
            while not (home / "began").exists():
                time.sleep(0.001)
            time.sleep(float(point) * self.seconds)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(process, by)
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three dozen texts; the second version of it changes, removes and adds some."""
    root = tmp_path_factory.mktemp("farm")
    write(root / "docs", 36)
    shutil.copytree(root / "docs", root / "later")
    for number in range(0, 36, 3):
        (root / "later" / f"{number // 10}" / f"text {number}.txt").write_text(text(number, version=1))
    (root / "later" / "0" / "text 4.txt").unlink()
    (root / "later" / "new.txt").write_text(text(99))
    return root


@pytest.fixture(scope="module")
def killer(farm: Path) -> Iterator[Killer]:
    environment = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        killer = Killer(process)
        assert killer.ingest(farm / "warm", farm / "docs") == 0
        began = time.monotonic()
        assert killer.ingest(farm / "whole", farm / "docs") == 0
        killer.seconds = time.monotonic() - began
        yield killer
        assert process.stdin is not None
        process.stdin.close()


Check = Callable[[Path, Path], dict[str, Any]]


@pytest.fixture
def finish(by_hashing: Any) -> Check:
    """Ingests what is left, and gives what the collection then holds."""

    def run(home: Path, docs: Path) -> dict[str, Any]:
        collection = library.open("x", settings=settings_in(home))
        assert collection.ingest(docs, prune=True).failed == []
        assert collection.verify().ok
        assert no_scratch(collection.path)
        words = collection.tier().store._chunks.index_stats("text_idx")
        assert words.num_unindexed_rows <= 100
        found = content(collection.tier(), by_hashing)
        by_hashing.encoded.clear()
        again = collection.ingest(docs, prune=True)
        assert (again.added, again.updated, again.removed, by_hashing.encoded) == (0, 0, 0, [])
        return found

    return run


def no_scratch(folder: Where) -> bool:
    """Say whether a collection's folder holds nothing that a killed run has left (but for what a next save sweeps)."""
    left = {path.name for path in Path(str(folder)).iterdir() if not path.name.startswith(".hot-")}
    return left - {"hot"} == {"manifest.json", "tables", "writer.lock"}


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """What undisturbed collections hold, by the folder they read."""
    return {}


def whole(finish: Check, known: dict[str, dict[str, Any]], docs: Path) -> dict[str, Any]:
    if docs.name not in known:
        known[docs.name] = finish(docs.with_name(f"home of {docs.name}"), docs)
    return known[docs.name]


@pytest.mark.parametrize("point", CREATION + WORKING + FRACTIONS)
def test_a_run_that_was_killed_is_made_good_by_the_next(
    killer: Killer, finish: Check, known: dict[str, dict[str, Any]], farm: Path, tmp_path: Path, point: str
) -> None:
    code = killer.ingest(tmp_path / "home", farm / "docs", point)
    assert code == -signal.SIGKILL or (code == 0 and ":" not in point)
    assert finish(tmp_path / "home", farm / "docs") == whole(finish, known, farm / "docs")


@pytest.mark.parametrize("point", REPLACING)
def test_a_run_that_was_killed_while_it_replaced_is_made_good_by_the_next(
    killer: Killer, finish: Check, known: dict[str, dict[str, Any]], farm: Path, tmp_path: Path, point: str
) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(farm / "docs", docs)  # keeps the times of the files
    assert killer.ingest(tmp_path / "home", docs) == 0
    shutil.rmtree(docs)
    shutil.copytree(farm / "later", docs)
    code = killer.ingest(tmp_path / "home", docs, point, prune=True)
    assert code == -signal.SIGKILL or (code == 0 and ":" not in point)
    if ":" in point:
        shutil.copytree(tmp_path / "home", tmp_path / "reverted")
    there = finish(tmp_path / "home", docs)
    assert moved(there, docs, farm / "later") == whole(finish, known, farm / "later")
    if ":" in point:  # and had the old files come back instead, with the times they had
        shutil.rmtree(docs)
        shutil.copytree(farm / "docs", docs)
        back = finish(tmp_path / "reverted", docs)
        assert moved(back, docs, farm / "docs") == whole(finish, known, farm / "docs")


def moved(held: dict[str, Any], here: Path, there: Path) -> dict[str, Any]:
    """Give what a collection would hold if it had read another folder of the same files."""
    rows = {
        name: replace(row, uri=row.uri.replace(str(here), str(there)), root=row.root.replace(str(here), str(there)))
        for name, row in held["documents"].items()
    }
    return {**held, "documents": rows}


def test_several_runs_that_were_killed_one_after_another_are_made_good(
    killer: Killer, finish: Check, known: dict[str, dict[str, Any]], farm: Path, tmp_path: Path
) -> None:
    for point in [*CREATION[::2], *WORKING[:3], *FRACTIONS[2:4], *WORKING[:1]]:
        killer.ingest(tmp_path / "home", farm / "docs", point)
    assert finish(tmp_path / "home", farm / "docs") == whole(finish, known, farm / "docs")


@pytest.mark.parametrize("point", ["0.2", "0.6"])
def test_a_run_that_was_interrupted_goes_on_in_the_next(
    killer: Killer, finish: Check, known: dict[str, dict[str, Any]], farm: Path, tmp_path: Path, point: str
) -> None:
    assert killer.ingest(tmp_path / "home", farm / "docs", point, by=signal.SIGINT) in (130, 0)
    assert finish(tmp_path / "home", farm / "docs") == whole(finish, known, farm / "docs")


def test_a_scan_of_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder: .*gone"):
        scan([tmp_path, tmp_path / "gone"], {})


if __name__ == "__main__":
    serve()
