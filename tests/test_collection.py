"""Collections as a whole: made, moved, checked, mended, locked; and what is damaged or strange is refused.

Run as a program, this file is the other process of these tests.
"""

import hashlib
import importlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_states import FORM, batch

from l2m_rag import collection as library
from l2m_rag import models
from l2m_rag.collection import Collection, import_collection, list_collections
from l2m_rag.config import Settings
from l2m_rag.errors import (
    CollectionNotFound,
    CorruptError,
    IncompatibleError,
    L2MError,
    LockedError,
    ModelError,
    UsageError,
)
from l2m_rag.memory_tiers.places import writing

TEXTS = {
    "lease.txt": "The lease of the red house ends on 30 April 2029.\n\nThe tenant pays the rent each month.",
    "farm/sheep.txt": "There are forty sheep on the farm.\n\nThe shepherd counts the sheep each night.",
    "farm/geese.md": "# Geese\n\nThe geese guard the house.\n\n## Food\n\nThey eat grass and corn.",
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "docs"


@pytest.fixture
def settings(by_hashing: Any, tmp_path: Path) -> Settings:
    return settings_in(tmp_path / "home")


def settings_in(home: Path) -> Settings:
    return Settings(home=home, embedder="hashing", chunk_size=12, chunk_overlap=0)


@pytest.fixture
def kb(settings: Settings, docs: Path) -> Collection:
    kb = library.open("x", settings=settings)
    assert kb.ingest(docs).added == 3
    return kb


def content(kb: Collection) -> dict[str, Any]:
    """Give what a collection holds and finds, without times."""
    store = kb.tier().store
    store.refresh()
    return {
        "documents": [replace(row, ingested_at=0) for row in kb.documents()],
        "chunks": sorted(store.fetch(store.row_ids().tolist()), key=lambda chunk: chunk.id),
        "found": [found(kb, words) for words in ("sheep", "the house", "corn")],
    }


def found(kb: Collection, words: str) -> list[str]:
    return [passage.chunk.text for passage in kb.search(words, 20)]


def folder_of(kb: Collection) -> Path:
    assert isinstance(kb.path, Path)
    return kb.path


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Give every path below a folder with its time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def alter(kb: Collection, text: str, new: str) -> None:
    """Change the text of a stored chunk behind the collection's back; its checksum stays."""
    store = kb.tier().store
    chunks = store.to_arrow()["chunks"]
    texts = [value.replace(text, new) for value in chunks["text"].to_pylist()]
    at = chunks.schema.names.index("text")
    store.add_arrow(store.to_arrow()["documents"], chunks.set_column(at, "text", pa.array(texts)))


# -- whole collections


def test_a_collection_is_made_with_the_first_document_and_not_before(settings: Settings, tmp_path: Path) -> None:
    kb = library.open("x", settings=settings)
    (tmp_path / "empty").mkdir()
    assert kb.ingest(tmp_path / "empty").added == 0
    for use in (kb.documents, kb.info, kb.verify, kb.repair, kb.optimize, kb.delete, kb.tier, lambda: kb.rename("y")):
        with pytest.raises(CollectionNotFound, match="'x'"):
            use()
    with pytest.raises(CollectionNotFound, match="'x'"):
        kb.export(tmp_path / "x.l2m")
    with pytest.raises(CollectionNotFound, match="'x'"):
        kb.search("sheep")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
    assert list_collections(settings) == []


def test_an_embedder_that_cannot_be_loaded_leaves_no_collection(
    settings: Settings, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("no such model")

    monkeypatch.setattr(models, "_load_embedder", fail)
    with pytest.raises(ModelError):
        library.open("x", settings=settings).ingest(docs)
    assert not settings.data.exists()


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(kb: Collection, docs: Path, tmp_path: Path) -> None:
    new = library.open("y", settings=kb.settings)
    before = tree(tmp_path)
    report = new.ingest(docs, dry_run=True)
    assert (report.added, report.dry_run, tree(tmp_path)) == (3, True, before)
    (docs / "lease.txt").write_text("Another lease.")
    (docs / "new.txt").write_text("A new text.")
    (docs / "farm" / "geese.md").unlink()
    os.utime(docs / "farm" / "sheep.txt", (1, 1))
    before = tree(tmp_path)
    report = kb.ingest(docs, prune=True, dry_run=True)
    assert (report.added, report.updated, report.unchanged, report.removed) == (1, 1, 1, 1)
    assert tree(tmp_path) == before
    done = kb.ingest(docs, prune=True)
    assert (done.added, done.updated, done.unchanged, done.removed) == (1, 1, 1, 1)


def test_a_collection_is_deleted_whole(kb: Collection, docs: Path, settings: Settings) -> None:
    other = library.open("y", settings=settings)
    other.ingest(docs)
    (settings.data / "collections" / ".deleted-before" / "collection").mkdir(parents=True)
    kb.delete()
    assert [path.name for path in (settings.data / "collections").iterdir()] == ["y"]
    assert [info.name for info in list_collections(settings)] == ["y"]
    with pytest.raises(CollectionNotFound):
        kb.delete()
    with pytest.raises(CollectionNotFound):
        kb.search("sheep")
    assert kb.ingest(docs).added == 3


@pytest.mark.parametrize("harm", ["{", "", '{"format": 99}'])
def test_a_damaged_collection_can_be_deleted(kb: Collection, harm: str) -> None:
    (folder_of(kb) / "manifest.json").write_text(harm)
    library.open("x", settings=kb.settings).delete()
    assert not folder_of(kb).exists()


def test_a_renamed_collection_is_the_same_under_its_new_name(kb: Collection, docs: Path) -> None:
    before = content(kb)
    renamed = kb.rename("y")
    assert content(renamed) == content(library.open("y", settings=kb.settings)) == before
    assert {path.name for path in folder_of(renamed).iterdir()} == {"hot", "manifest.json", "tables", "writer.lock"}
    with pytest.raises(CollectionNotFound):
        kb.search("sheep")
    assert kb.ingest(docs).added == 3
    with pytest.raises(UsageError, match="there is a collection 'y' already"):
        kb.rename("y")
    for name in ("", "../z", "Z", ".z"):
        with pytest.raises(UsageError, match="name"):
            kb.rename(name)
    assert content(renamed)["documents"] == content(kb)["documents"] == before["documents"]


def test_a_handle_notices_what_others_do_with_the_collection(kb: Collection, docs: Path) -> None:
    other = library.open("x", settings=kb.settings)
    (docs / "new.txt").write_text("A zebra.")
    other.ingest(docs)
    assert (len(kb.documents()), kb.info().documents, kb.verify().documents) == (4, 4, 4)
    assert found(kb, "zebra")[0] == "A zebra."
    other.delete()
    with pytest.raises(CollectionNotFound):
        kb.search("zebra")
    other.ingest(docs / "lease.txt")
    assert [row.id for row in kb.documents()] == ["lease.txt"]
    assert "A zebra." not in found(kb, "zebra")


def test_a_collection_tells_what_it_holds(kb: Collection, docs: Path) -> None:
    (docs / "empty.txt").touch()
    kb.ingest(docs)
    info = kb.info()
    assert (info.name, info.documents, info.failed) == ("x", 3, 1)
    assert (info.embedder, info.dimension, info.format) == ("hashing", 32, 2)
    assert info.chunks == len(content(kb)["chunks"]) == 6
    assert info.bytes == sum(path.stat().st_size for path in folder_of(kb).rglob("*") if path.is_file())
    assert list_collections(kb.settings) == [info]
    assert kb.text("lease.txt") == TEXTS["lease.txt"]


def test_optimizing_changes_nothing_but_the_files(kb: Collection, docs: Path) -> None:
    (docs / "lease.txt").write_text("Another lease.")
    kb.ingest(docs)
    before = content(kb)
    kb.optimize()
    assert {**content(kb), "found": None} == {**before, "found": None}


def test_a_query_with_broken_characters_is_searched_for(kb: Collection) -> None:
    assert found(kb, "\udcff sheep")[0].startswith("There are forty sheep")


# -- check and repair


def test_what_was_altered_is_found_removed_and_brought_back(kb: Collection, docs: Path) -> None:
    before = content(kb)
    assert kb.verify().ok
    alter(kb, "forty sheep", "fifty sheep")
    report = kb.verify()
    assert not report.ok
    assert [problem.endswith("has been altered") for problem in report.problems] == [True]
    assert (report.documents, report.chunks) == (3, 6)
    done = kb.repair()
    assert done[:2] == [
        "removed 1 damaged chunks",
        "removed 1 incomplete documents; ingest again to bring them back: farm/sheep.txt",
    ]
    assert kb.verify().ok
    assert kb.ingest(docs).added == 1
    assert content(kb) == before


def test_chunks_and_rows_that_were_lost_are_found_and_brought_back(kb: Collection, docs: Path) -> None:
    before = content(kb)
    store = kb.tier().store
    store.delete_chunks([store.chunks_of("lease.txt")[0].id])
    store._documents.delete("id = 'farm/geese.md'")
    assert library.open("x", settings=kb.settings).verify().problems == [
        "farm/geese.md: 2 chunks are stored, 0 are expected",
        "lease.txt: 1 chunks are stored, 2 are expected",
    ]
    assert kb.repair()[0].endswith("farm/geese.md, lease.txt")
    assert (kb.verify().ok, kb.verify().documents) == (True, 1)
    kb.ingest(docs)
    assert content(kb) == before


def test_an_ingest_by_itself_brings_back_what_was_lost(kb: Collection, docs: Path) -> None:
    before = content(kb)
    store = kb.tier().store
    store.delete_chunks([store.chunks_of("lease.txt")[0].id])
    assert kb.ingest(docs).updated == 1
    assert content(kb) == before


def test_a_text_index_that_is_gone_is_an_error_and_is_made_again(kb: Collection) -> None:
    before = content(kb)
    kb.optimize()
    shutil.rmtree(folder_of(kb) / "tables" / "chunks.lance" / "_indices")
    fresh = library.open("x", settings=kb.settings)
    with pytest.raises(CorruptError, match="l2m collections repair"):
        fresh.search("sheep", mode="text")
    assert fresh.repair() == ["built the search indexes again"]
    assert content(fresh) == before


def test_a_hot_index_that_is_damaged_changes_no_answer(kb: Collection) -> None:
    before = content(kb)
    for path in (folder_of(kb) / "hot").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert content(library.open("x", settings=kb.settings)) == before


def test_tables_that_cannot_be_read_are_corrupt(kb: Collection, docs: Path) -> None:
    for path in (folder_of(kb) / "tables" / "chunks.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(folder_of(kb) / "hot")
    fresh = library.open("x", settings=kb.settings)
    for use in (fresh.verify, fresh.repair, lambda: fresh.search("sheep"), lambda: fresh.ingest(docs)):
        with pytest.raises(CorruptError, match="delete the collection and ingest again"):
            use()


def test_a_power_cut_that_emptied_the_newest_manifests_costs_one_commit(
    kb: Collection, docs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (docs / "new.txt").write_text("A zebra runs with the sheep.")
    kb.ingest(docs)
    whole = content(kb)
    for table in ("chunks", "documents"):
        min((folder_of(kb) / "tables" / f"{table}.lance" / "_versions").glob("*.manifest")).write_bytes(b"")
    fresh = library.open("x", settings=kb.settings)
    with caplog.at_level(logging.WARNING):
        assert "A zebra runs with the sheep." not in found(fresh, "zebra")
    assert caplog.text.count("was cut short, as by a power cut") == 2
    fresh.ingest(docs)
    assert fresh.verify().ok
    assert content(fresh) == whole


def test_the_beginning_of_the_only_document_that_is_found_is_read_too(kb: Collection, tmp_path: Path) -> None:
    tale = tmp_path / "tale.txt"
    tale.write_text(
        "An old tale.\n\n" + "\n\n".join(f"The wolf of hill {at} ate the hen number {at}." for at in range(9))
    )
    kb.ingest(tale)
    only = library.of_document(kb.search("which wolf ate a hen?", 1)[0].chunk.document)
    found = kb.search("which wolf ate a hen?", 5, where=only)
    assert all(passage.chunk.ordinal for passage in found)
    read = kb.evidence("which wolf ate a hen?", 5, only)
    assert [passage.chunk.text for passage in read][2].startswith("An old tale.")
    assert [one for one in read if one.chunk.ordinal] == found[:4]
    assert kb.evidence("which wolf ate a hen?", 1, only) == found[:1]
    whole = kb.search(
        "which wolf ate a hen?", 20, where=only
    )  # and where it was found, but later, it is not found anew
    again = kb.evidence("which wolf ate a hen?", 20, only)
    assert again[2].chunk.ordinal == 0
    assert sorted(again, key=whole.index) == whole
    assert kb.evidence("which wolf ate a hen?", 5, f"{only} AND start > 100") == kb.search(
        "which wolf ate a hen?", 5, where=f"{only} AND start > 100"
    )
    assert kb.evidence("sheep wolf", 5) == kb.search("sheep wolf", 5)  # of several documents


# -- what was made otherwise


def test_another_embedder_is_refused(kb: Collection, by_hashing: Any, docs: Path) -> None:
    other = library.open("x", settings=replace(kb.settings, embedder="other"))
    for use in (lambda: other.search("sheep"), lambda: other.ingest(docs)):
        with pytest.raises(IncompatibleError, match=r"made with the embedder 'hashing'; the settings say 'other'"):
            use()
    by_hashing.fingerprint = "fedcba9876543210"
    (docs / "new.txt").write_text("A zebra.")
    for use in (lambda: kb.search("sheep"), lambda: kb.ingest(docs)):
        with pytest.raises(IncompatibleError, match=r"other weights of 'hashing' \(0123456789abcdef, 32-d; now fedc"):
            use()
    assert kb.search("sheep", mode="text") != []
    assert [info.name for info in list_collections(replace(kb.settings, embedder="other"))] == ["x"]


def test_a_newer_format_is_refused(kb: Collection, docs: Path) -> None:
    manifest = folder_of(kb) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 3}))
    before = tree(folder_of(kb) / "tables")
    for use in (lambda: kb.search("sheep"), lambda: kb.ingest(docs), kb.verify):
        with pytest.raises(IncompatibleError, match="Upgrade l2m-rag"):
            use()
    assert tree(folder_of(kb) / "tables") == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\0\0\0", '{"format": 1}', '{"format": "x"}', '{"format": 1, "size": 3}', "\udcff"]
)
def test_a_manifest_of_garbage_is_corrupt(
    kb: Collection, docs: Path, settings: Settings, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    other = library.open("y", settings=settings)
    other.ingest(docs)
    (folder_of(kb) / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = tree(folder_of(kb) / "tables")
    fresh = library.open("x", settings=settings)
    for use in (lambda: fresh.search("sheep"), lambda: fresh.ingest(docs), lambda: kb.search("sheep")):
        with pytest.raises(CorruptError, match="cannot be read"):
            use()
    assert tree(folder_of(kb) / "tables") == before
    assert [info.name for info in list_collections(settings)] == ["y"]  # the others are listed all the same
    assert "cannot be read" in caplog.text


def test_data_without_a_manifest_is_never_written_over(kb: Collection, docs: Path) -> None:
    manifest = (folder_of(kb) / "manifest.json").read_text()
    (folder_of(kb) / "manifest.json").unlink()
    before = tree(folder_of(kb) / "tables")
    for handle in (kb, library.open("x", settings=kb.settings)):
        with pytest.raises(CorruptError, match="holds data but no manifest"):
            handle.ingest(docs)
    with pytest.raises(CollectionNotFound):
        kb.search("sheep")
    assert tree(folder_of(kb) / "tables") == before
    (folder_of(kb) / "manifest.json").write_text(manifest)
    assert library.open("x", settings=kb.settings).ingest(docs).unchanged == 3


# -- export and import


def test_an_export_comes_back_as_it_was(kb: Collection, docs: Path, by_hashing: Any, tmp_path: Path) -> None:
    (docs / "empty.txt").touch()
    kb.ingest(docs)
    assert kb.export(tmp_path / "x.l2m") == tmp_path / "x.l2m"
    copy = import_collection(tmp_path / "x.l2m", "copy", kb.settings)
    assert content(copy) == content(kb)
    assert copy.verify().ok
    by_hashing.encoded.clear()
    assert (copy.ingest(docs).unchanged, by_hashing.encoded) == (3, [])
    assert {path.name for path in folder_of(copy).iterdir()} == {"hot", "manifest.json", "tables", "writer.lock"}
    assert {path.name for path in folder_of(copy).parent.iterdir()} == {"x", "copy"}
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "home", "x.l2m"}
    with pytest.raises(UsageError, match="there is a collection 'copy' already"):
        import_collection(tmp_path / "x.l2m", "copy", kb.settings)
    assert content(copy) == content(kb)


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as source:
        return {entry.filename: source.read(entry) for entry in source.infolist()}


def packed(path: Path, parts: dict[str, bytes], *, fitting: bool = True, method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive, with checksums that fit."""
    if fitting:
        digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items() if name != "checksums.json"}
        parts = {**parts, "checksums.json": json.dumps(digests).encode()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def manifest(parts: dict[str, bytes], **values: object) -> dict[str, bytes]:
    return {**parts, "manifest.json": json.dumps({**json.loads(parts["manifest.json"]), **values}).encode()}


def chunks(parts: dict[str, bytes], change: Callable[[pa.Table], pa.Table]) -> dict[str, bytes]:
    return {**parts, "chunks.arrow": arrow(change(pa.ipc.open_file(parts["chunks.arrow"]).read_all()))}


def other_text(table: pa.Table) -> pa.Table:
    texts = [text.upper() for text in table["text"].to_pylist()]
    return table.set_column(table.schema.names.index("text"), "text", pa.array(texts))


HOSTILE: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "a member more": lambda parts: {**parts, "readme.txt": b"x"},
    "a path that climbs": lambda parts: {**parts, "../../evil.txt": b"x"},
    "an absolute path": lambda parts: {**parts, "/tmp/evil.txt": b"x"},
    "a member less": lambda parts: {name: part for name, part in parts.items() if name != "documents.arrow"},
    "no manifest": lambda parts: {name: part for name, part in parts.items() if name != "manifest.json"},
    "a manifest that is no JSON": lambda parts: {**parts, "manifest.json": b"\xff{"},
    "a manifest that is a list": lambda parts: {**parts, "manifest.json": b"[1]"},
    "a manifest with a strange key": lambda parts: manifest(parts, evil=1),
    "a dimension that is none": lambda parts: manifest(parts, dimension="32"),
    "a dimension below 0": lambda parts: manifest(parts, dimension=-1),
    "a dimension beyond measure": lambda parts: manifest(parts, dimension=1 << 40),
    "another dimension": lambda parts: manifest(parts, dimension=16),
    "tables that are none": lambda parts: {**parts, "chunks.arrow": b"ARROW1\0\0" + b"x" * 100},
    "tables that are empty": lambda parts: {**parts, "documents.arrow": b""},
    "tables of other columns": lambda parts: {**parts, "chunks.arrow": arrow(pa.table({"id": ["a"]}))},
    "tables in each other's place": lambda parts: {**parts, "chunks.arrow": parts["documents.arrow"]},
    "rows that are there twice": lambda parts: chunks(parts, lambda table: pa.concat_tables([table, table])),
    "rows that were altered": lambda parts: chunks(parts, other_text),
}


@pytest.fixture
def nothing_left(kb: Collection, tmp_path: Path) -> Iterator[None]:
    """What is refused leaves everything as it was."""
    before = {str(path) for path in tmp_path.rglob("*")}
    yield
    assert {str(path) for path in tmp_path.rglob("*")} - before <= {str(tmp_path / "x.l2m"), str(tmp_path / "bad.l2m")}
    assert not Path("/tmp/evil.txt").exists()


@pytest.mark.usefixtures("nothing_left")
def test_a_hostile_archive_is_refused_though_its_checksums_fit(kb: Collection, tmp_path: Path) -> None:
    parts = members(kb.export(tmp_path / "x.l2m"))
    for name, change in HOSTILE.items():
        packed(tmp_path / "bad.l2m", change(parts))
        with pytest.raises(CorruptError, match="is not an export of a collection, or was altered") as raised:
            import_collection(tmp_path / "bad.l2m", "y", kb.settings)
        assert "\n" not in str(raised.value), name
    packed(tmp_path / "bad.l2m", manifest(parts, format=3))
    with pytest.raises(IncompatibleError, match="Upgrade l2m-rag"):
        import_collection(tmp_path / "bad.l2m", "y", kb.settings)


@pytest.mark.usefixtures("nothing_left")
def test_an_archive_that_was_altered_is_refused(kb: Collection, tmp_path: Path) -> None:
    whole = kb.export(tmp_path / "x.l2m").read_bytes()
    parts = members(tmp_path / "x.l2m")
    bad = tmp_path / "bad.l2m"
    packed(bad, chunks(parts, other_text), fitting=False)
    refused(kb, bad)
    packed(bad, {**parts, "checksums.json": b"{}"}, fitting=False)
    refused(kb, bad)
    packed(bad, parts, method=zipfile.ZIP_DEFLATED)  # a bomb would be packed
    refused(kb, bad)
    packed(bad, parts)
    with zipfile.ZipFile(bad, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("chunks.arrow", parts["chunks.arrow"])
    refused(kb, bad)
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        bad.write_bytes(whole[:length])
        refused(kb, bad)
    heads = [at + byte for at in range(len(whole)) if whole[at : at + 2] == b"PK" for byte in range(60)]
    draw = random.Random(0)
    for number in range(45):
        altered = bytearray(whole)
        at = draw.choice(heads) if number % 3 else draw.randrange(len(whole))
        altered[at % len(whole)] ^= 1 << draw.randrange(8)
        bad.write_bytes(altered)
        try:
            copy = import_collection(bad, "y", kb.settings)
        except CorruptError:
            continue
        assert content(copy) == content(kb)  # a bit of the archive's own dates and flags
        copy.delete()


def refused(kb: Collection, archive: Path) -> None:
    with pytest.raises(CorruptError, match="is not an export of a collection, or was altered"):
        import_collection(archive, "y", kb.settings)


def test_an_archive_that_is_not_there_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_collection(tmp_path / "gone.l2m", "y", settings)
    with pytest.raises(UsageError, match="name"):
        import_collection(tmp_path / "gone.l2m", "../y", settings)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# -- two at once


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def busy(home: Path, docs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that ingests a folder, and waits in the middle of it for a file `go` in the home."""
    environment = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1])}
    with subprocess.Popen([sys.executable, __file__, "ingest", str(home), str(docs)], env=environment) as process:
        try:
            wait_for(home / "waiting")
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_who_writes_and_readers_do_not_wait(
    kb: Collection, docs: Path, settings: Settings, tmp_path: Path
) -> None:
    (docs / "new.txt").write_text("A zebra.")
    before = content(kb)["found"]
    with busy(settings.data, docs) as process:
        fresh = library.open("x", settings=settings)
        for use in (
            lambda: fresh.ingest(docs),
            lambda: fresh.export(tmp_path / "x.l2m"),
            fresh.delete,
            fresh.repair,
            fresh.optimize,
            lambda: fresh.rename("y"),
        ):
            with pytest.raises(LockedError, match=f"process {process.pid} on "):
                use()
        assert content(fresh)["found"] == content(kb)["found"] == before
        assert fresh.ingest(docs, dry_run=True).added == 1
        (settings.data / "go").touch()
        assert process.wait(timeout=60) == 0
    assert kb.verify().ok
    assert found(kb, "zebra")[0] == "A zebra."
    assert fresh.ingest(docs).unchanged == 4


def test_the_lock_of_a_dead_process_blocks_nobody(kb: Collection, docs: Path, settings: Settings) -> None:
    (docs / "new.txt").write_text("A zebra.")
    with busy(settings.data, docs) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert (folder_of(kb) / "writer.json").exists()
    assert kb.ingest(docs).added == 1
    assert not (folder_of(kb) / "writer.json").exists()
    assert kb.verify().ok


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux namespaces")
def test_a_disk_that_fills_up_costs_nothing_that_was_in(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    for number in range(400):
        (tmp_path / "big" / f"{number}.txt").write_text(
            "\n\n".join(f"Sentence {i} of text {number} is about the weather at sea." for i in range(100))
        )
    home = tmp_path / "full"
    home.mkdir()
    program = f'"{sys.executable}" "{__file__}" fill "{home}" "{docs}" "{tmp_path / "big"}"'
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=4m tmpfs "{home}" || exit 77; exec {program}'],
        env={**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip("no namespaces here")
    assert ran.returncode == 0, ran.stderr
    error, *answers = json.loads(ran.stdout)
    assert "is full; nothing is lost" in error
    assert answers[0] == answers[1] != []
    assert answers[2] == []


# -- the other process


def ingest(embedder: Any, home: Path, docs: Path) -> None:
    encode = embedder.encode

    def wait(texts: list[str], **options: Any) -> Any:
        (home / "waiting").touch()
        wait_for(home / "go")
        return encode(texts, **options)

    embedder.encode = wait
    library.open("x", settings=settings_in(home)).ingest(docs)


def fill(embedder: Any, home: Path, docs: Path, big: Path) -> None:
    """Ingest until the disk is full; print the error, what was found before and after, and what a check says."""
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    first = [passage.chunk.text for passage in kb.search("sheep", where="document LIKE 'farm/%'")]
    error = ""
    try:
        kb.ingest(big)
    except (OSError, RuntimeError, L2MError) as raised:
        error = str(raised).replace("Errno 28", "os error 28")
    after = library.open("x", settings=settings_in(home))
    then = [passage.chunk.text for passage in after.search("sheep", where="document LIKE 'farm/%'")]
    problems = [problem for problem in after.verify().problems if "are expected" not in problem]
    sys.stdout.write(json.dumps([error, first, then, problems]))


def main() -> None:
    sys.path.append(str(Path(__file__).parent))
    made = importlib.import_module("conftest").HashingEmbedder()
    models._load_embedder = lambda *_: made  # type: ignore[assignment]
    home, docs, *big = map(Path, sys.argv[2:])
    if sys.argv[1] == "ingest":
        ingest(made, home, docs)
    else:
        fill(made, home, docs, *big)


if __name__ == "__main__":
    main()


# -- states of a model -------------------------------------------------------------------------------------------------
def test_states_of_a_model_lie_in_the_collection_within_the_budget_of_the_settings(kb: Collection) -> None:
    kb.settings = replace(kb.settings, disk_budget=10 * FORM.row_bytes)
    with kb.states(FORM, namespace="ada") as states:
        states.add(batch(12))
        with pytest.raises(LockedError), writing(kb.path):
            pass
    with kb.states(FORM, namespace="ada") as states:
        assert (len(states), states.disk_bytes) == (9, 10 * FORM.row_bytes)
    with kb.states(FORM) as states:
        assert len(states) == 0  # those of another are never seen
    assert kb.verify().ok
    kb.settings = replace(kb.settings, disk_budget=1)
    with pytest.raises(UsageError, match="less than one record takes"), kb.states(FORM):
        pass
    with pytest.raises(CollectionNotFound), library.open("none", settings=kb.settings).states(FORM):
        pass
