"""What older versions of the library have written can be read, and brought to the present format, for ever."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l2m_rag.collection import Collection, import_collection
from l2m_rag.config import load_settings
from l2m_rag.errors import CorruptError, IncompatibleError
from l2m_rag.memory_tiers import long_term
from l2m_rag.memory_tiers.long_term import FORMAT, LongTermTier, migrate, read_manifest

DATA = Path(__file__).parent / "data"
CHUNKS = {
    "tides.md": "# Tides\n\nThe tide mill at Eling has ground flour since 1785. It stops for two hours around high "
    "water.\n\n## Moon\n\nSpring tides come with the new and the full moon.",
    "lighthouse.txt": "The keeper counted forty-two ships in June 1902.",
}


def says(tier: LongTermTier) -> dict[str, str]:
    return {passage.chunk.document: passage.chunk.text for passage in tier.search("moon ships", None, 5, mode="text")}


@pytest.fixture
def mills(tmp_path: Path) -> Path:
    """A collection of format 1: three files read, one of them then changed and one pruned."""
    with zipfile.ZipFile(DATA / "format-1.zip") as archive:
        archive.extractall(tmp_path / "collections")
    return tmp_path / "collections" / "mills"


def test_the_first_format_is_read_as_it_is_and_not_written_into(mills: Path) -> None:
    tier = LongTermTier(mills)
    assert (tier.manifest.format, len(tier), tier.verify()) == (1, 2, [])
    assert says(tier) == CHUNKS
    chunks = tier.fetch([passage.chunk.id for passage in tier.search("moon", None, 1, mode="text")])
    for write in (
        lambda: tier.add(chunks, np.ones((1, 384), np.float32)),
        lambda: tier.evict([chunks[0].id]),
        tier.compact,
        tier.repair,
    ):
        with pytest.raises(IncompatibleError, match="l2m collections migrate mills"):
            write()
    assert read_manifest(mills).format == 1
    assert says(LongTermTier(mills)) == CHUNKS


def test_the_first_format_is_brought_to_the_present_one(mills: Path) -> None:
    settings = replace(load_settings()[0], home=mills.parents[1])
    collection = Collection("mills", mills, settings)
    assert collection.info().format == 1
    assert collection.migrate() == f"was brought from format 1 to {FORMAT}"
    assert collection.migrate() == f"is in format {FORMAT} already"
    assert collection.info().format == FORMAT
    tier = LongTermTier(mills)
    assert tier.verify() == []
    assert says(tier) == CHUNKS
    tier.compact()
    tier.add(
        tier.fetch([passage.chunk.id for passage in tier.search("moon", None, 1, mode="text")]),
        np.eye(1, 384, dtype=np.float32),
    )
    assert says(LongTermTier(mills)) == CHUNKS
    assert tier.evict([tier.search("moon", None, 1, mode="text")[0].chunk.id]) == 1
    assert len(LongTermTier(mills)) == 1


def test_a_migration_that_was_killed_is_done_again(mills: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(long_term, "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            migrate(mills)
    assert says(LongTermTier(mills)) == CHUNKS
    assert (migrate(mills), migrate(mills)) == (1, FORMAT)
    assert (LongTermTier(mills).verify(), says(LongTermTier(mills))) == ([], CHUNKS)


def test_an_export_of_the_first_format_is_imported(tmp_path: Path) -> None:
    settings = replace(load_settings()[0], home=tmp_path)
    collection = import_collection(DATA / "format-1.l2m", "mills", settings)
    assert (collection.info().format, collection.info().documents, collection.info().chunks) == (FORMAT, 2, 2)
    assert collection.verify().ok
    assert says(LongTermTier(collection.path)) == CHUNKS


def test_no_bit_of_a_manifest_can_change_unseen(mills: Path) -> None:
    migrate(mills)
    path = mills / "manifest.json"
    whole, right = path.read_bytes(), read_manifest(mills)
    for at in range(8 * len(whole)):
        content = bytearray(whole)
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        try:
            found = read_manifest(mills)
        except (CorruptError, IncompatibleError):
            continue
        assert found == right, whole[at // 8 :][:20]
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            read_manifest(mills)
    path.write_text(json.dumps({**json.loads(whole), "format": FORMAT + 1}))
    with pytest.raises(IncompatibleError, match=f"has format {FORMAT + 1}"):
        read_manifest(mills)


KINDS = ["data/*.lance", "_versions/*.manifest", "_transactions/*"]


@pytest.mark.parametrize(
    ("table", "what"),
    [(table, kind) for table in ("chunks", "documents") for kind in KINDS] + [("chunks", "_indices/*/*")],
)
def test_a_file_that_was_altered_is_found_and_mended(mills: Path, table: str, what: str) -> None:
    migrate(mills)
    files = sorted((mills / "tables" / f"{table}.lance").glob(what))
    newest = files[0] if "manifest" in what else files[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 1
    newest.write_bytes(content)
    try:
        tier = LongTermTier(mills)
        problems = tier.verify()
    except CorruptError:  # it cannot be read at all, which is told too
        return
    assert any(f"{table}.lance/{what.split('/')[0]}" in problem for problem in problems)
    assert any("wrote the tables anew" in done for done in tier.repair())
    assert tier.verify() == []
    assert says(tier).items() <= CHUNKS.items()
