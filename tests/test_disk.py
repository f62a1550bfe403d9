"""The list of checksums: what it tells, and what it makes of damage to itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from l2m_rag.memory_tiers.disk import Ledger


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "t.lance").mkdir(exist_ok=True)
        (tmp_path / "t.lance" / name).write_bytes(name.encode() * 1000)
    (tmp_path / "beside").write_text("what does not lie in a table is not listed")
    Ledger(tmp_path).settle()
    return tmp_path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def test_a_file_that_was_altered_or_cut_short_is_named_and_one_that_is_gone_is_not(folder: Path) -> None:
    assert Ledger(folder).altered() == []
    flip(folder / "t.lance" / "a", 4711)
    assert Ledger(folder).altered() == ["t.lance/a"]
    assert Ledger(folder).altered("other") == []
    (folder / "t.lance" / "b").write_bytes(b"b" * 999)
    assert Ledger(folder).altered() == ["t.lance/a", "t.lance/b"]
    (folder / "t.lance" / "a").unlink()
    (folder / "beside").write_text("other")
    assert Ledger(folder).altered() == ["t.lance/b"]


def test_two_that_are_open_see_what_the_other_has_listed(folder: Path) -> None:
    one, other = Ledger(folder), Ledger(folder)
    one.altered()
    other.settle()
    (folder / "t.lance" / "c").write_bytes(b"c")
    other.settle()
    flip(folder / "t.lance" / "c", 1)
    one.settle()  # knows it already, and does not take what it is now for right
    assert one.altered() == other.altered() == ["t.lance/c"]


def test_a_name_that_is_taken_again_is_another_file(folder: Path) -> None:
    ledger = Ledger(folder)
    (folder / "t.lance" / "a").rename(folder / "t.lance" / "a.damaged")
    ledger.forget([folder / "t.lance" / "a", folder / "t.lance" / "unknown"])
    (folder / "t.lance" / "a").write_bytes(b"other")
    ledger.settle()
    assert ledger.altered() == Ledger(folder).altered() == []


def test_no_bit_of_the_list_can_hide_more_than_a_line_or_name_what_is_right_in_silence(folder: Path) -> None:
    path = folder / "checksums.log"
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        flip(path, at)
        found = Ledger(folder).altered()
        assert set(found) <= {"t.lance/a", "t.lance/b"}
        flip(path, at)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        (folder / "t.lance" / "c").write_bytes(b"c")
        ledger = Ledger(folder)
        ledger.settle()  # what the list does not tell is listed anew, behind what was cut short
        assert ledger.altered() == []
        flip(folder / "t.lance" / "c", 1)
        assert Ledger(folder).altered() == ["t.lance/c"]
        (folder / "t.lance" / "c").unlink()


def test_the_list_is_written_anew_when_most_of_its_files_are_gone(folder: Path) -> None:
    ledger = Ledger(folder)
    other = Ledger(folder)
    for number in range(1100):
        (folder / "t.lance" / f"{number}").write_bytes(b"x")
    ledger.settle()
    other.settle()
    long = (folder / "checksums.log").stat().st_size
    for number in range(1100):
        (folder / "t.lance" / f"{number}").unlink()
    ledger.settle()
    assert (folder / "checksums.log").stat().st_size < long / 100
    flip(folder / "t.lance" / "b", 0)
    assert ledger.altered() == other.altered() == Ledger(folder).altered() == ["t.lance/b"]
