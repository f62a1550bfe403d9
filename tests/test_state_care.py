"""The states of a collection: checked, mended, made smaller, kept within a budget, exported."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_collection import members, packed
from test_states import FORM, batch, found, same
from test_tier_contract import on_disk

from l2m_rag.errors import CorruptError, DiskFullError, IncompatibleError, UsageError
from l2m_rag.memory_tiers import archive
from l2m_rag.memory_tiers.long_term import LongTermTier
from l2m_rag.memory_tiers.state_table import FRAGMENTS, StateFormat, StateTable
from l2m_rag.memory_tiers.states import StateTier

LARGE = replace(FORM, vectors=16, dim=64)  # rows so large that manifests are small beside them


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


@pytest.fixture
def tier(tmp_path: Path) -> Any:
    return on_disk(tmp_path)


def filled(folder: Path, form: StateFormat = FORM) -> None:
    for number, namespace in enumerate(("default", "other")):
        with StateTier(form, folder, namespace=namespace) as states:
            states.add(batch(6, seed=number, form=form))


def flip(path: Path, at: float = 0.4) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def alter(table: StateTable, row: int, **columns: Any) -> None:
    """Put another value into a row, as if the disk had."""
    rows = table.to_arrow()
    at = rows["row"].to_pylist().index(row)
    one = rows.slice(at, 1)
    for name, value in columns.items():
        kind = one.schema.field(name)
        one = one.set_column(one.schema.names.index(name), kind, pa.array([value], kind.type))
    table.delete([f"row = {row} AND namespace = '{one['namespace'][0]}'"])
    table.add(one)


# -- checked and mended ------------------------------------------------------------------------------------------------
def test_a_sound_table_has_no_problems_and_repair_does_nothing(folder: Path) -> None:
    filled(folder)
    table = StateTable(folder)
    version = table.version
    assert (table.verify(), table.repair(), len(table)) == ([], [], 12)
    assert StateTable(folder).version == version


@pytest.mark.parametrize(
    "columns",
    [{"stream": "t"}, {"position": 5}, {"length": 9}, {"step": 3}, {"tokens": [1]}, {"crc": 1}, {"scales": [9.0] * 3},
     {"values": [1] * 18}],
)  # fmt: skip
def test_an_altered_row_is_named_and_only_it_goes(folder: Path, columns: dict[str, Any]) -> None:
    with StateTier(FORM, folder) as states:
        states.add(batch(6))
    alter(StateTable(folder), 2, **columns)
    assert StateTable(folder).verify() == ["states: row 2 of 'default' has been altered"]
    assert StateTable(folder).repair() == ["removed 1 damaged states"]
    assert StateTable(folder).verify() == []
    again = StateTier(FORM, folder)
    assert len(again) == 5
    kept = [0, 1, 3, 4, 5]
    assert same(again.fetch(np.array(kept)), batch(6).take(kept))


def test_a_flipped_bit_in_any_file_is_told_and_mended(folder: Path, tmp_path: Path) -> None:
    filled(folder)
    kinds = (".lance", ".manifest", ".txn")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*") if path.is_file() and path.suffix in kinds)
    assert len(files) > 4
    for number, path in enumerate(files):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        flip(copy / path)
        try:
            problems = StateTable(copy).verify()
        except CorruptError:
            continue  # which the collection sets aside
        assert any(str(path) in problem for problem in problems), path
        try:
            StateTable(copy).repair()
        except CorruptError:
            continue
        assert StateTable(copy).verify() == []
        for number_, namespace in enumerate(("default", "other")):
            states = StateTier(FORM, copy, namespace=namespace)
            rows = found(states, "s")
            assert same(states.fetch(np.array(rows)), batch(6, seed=number_).take(rows))


def test_a_collection_checks_and_mends_its_states(tier: LongTermTier) -> None:
    with tier.states(FORM) as states:
        states.add(batch(4))
    assert tier.verify() == []
    assert tier.state_table() is not None
    alter(StateTable(Path(tier.place.uri) / "states"), 1, stream="x")
    assert tier.verify() == ["states: row 1 of 'default' has been altered"]
    assert "removed 1 damaged states" in tier.repair()
    assert tier.verify() == []
    flip(Path(tier.place.uri) / "states" / "states.json")
    assert any("states.json cannot be read" in problem for problem in tier.verify())
    (said,) = [line for line in tier.repair() if line.startswith("set the states aside")]
    (aside,) = Path(tier.place.uri).glob("states.damaged-*")
    assert str(aside) in said
    assert (tier.verify(), tier.state_table()) == ([], None)
    with tier.states(FORM) as states:
        assert len(states) == 0


def test_a_creation_that_was_cut_off_is_no_problem(tier: LongTermTier) -> None:
    (Path(tier.place.uri) / "states").mkdir()
    assert (tier.state_table(), tier.verify()) == (None, [])


def test_a_compaction_keeps_rows_and_gives_back_room(folder: Path) -> None:
    with StateTier(LARGE, folder) as states:
        for seed in range(20):
            states.add(batch(6, f"s{seed}", seed=seed, form=LARGE))
            states.flush()
        states.evict(np.arange(0, 120, 2))
        before = states.nbytes
        StateTable(folder).compact()
        table = StateTable(folder)
        assert (len(table), table.verify()) == (60, [])
        assert same(states.fetch(np.array([1, 3, 119])), StateTier(LARGE, folder).fetch(np.array([1, 3, 119])))
        assert states.nbytes >= before  # what readers of an hour ago may be at is still there
        table.compact(timedelta(milliseconds=1))
        assert states.nbytes < 0.7 * before


def test_without_a_budget_files_are_merged_once_there_are_many(folder: Path) -> None:
    with StateTier(FORM, folder) as states:
        for seed in range(FRAGMENTS + 6):
            states.add(batch(2, f"s{seed}", seed=seed))
            states.flush()
    assert len(list((folder / "states.lance" / "_versions").glob("*.manifest"))) > FRAGMENTS
    stats = StateTable(folder)._table.stats()
    assert stats["fragment_stats"]["num_fragments"] < 10
    assert (len(StateTier(FORM, folder)), StateTable(folder).verify()) == (2 * FRAGMENTS + 12, [])


def test_without_a_budget_the_room_of_what_was_forgotten_is_given_back(folder: Path) -> None:
    with StateTier(FORM, folder) as states:
        states.add(batch(40))
        states.flush()
        states.evict(np.arange(20))
    stats = StateTable(folder)._table.stats()
    assert (stats["fragment_stats"]["lengths"]["max"], stats["num_rows"]) == (20, 20)


@pytest.mark.parametrize("what", ["states", "chunks"])
def test_a_disk_without_room_is_left_as_it_is(tier: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tier.states(FORM) as states:
        states.add(batch(4))
    usage = shutil.disk_usage(tier.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10))
    table = tier.state_table()
    version, before = table.version, tier.version
    with pytest.raises(DiskFullError, match=r"needs [\d,]+ bytes of free disk.*10 are free.*Nothing was changed"):
        (table.compact if what == "states" else tier.compact)()
    assert (StateTable(Path(tier.place.uri) / "states").version, tier.version) == (version, before)


# -- within a budget ---------------------------------------------------------------------------------------------------
class Do(NamedTuple):
    """One thing that is done to a tier with a budget."""

    what: str
    amount: int


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    room=st.integers(1, 40),
    steps=st.lists(st.builds(Do, st.sampled_from(["add", "read", "flush", "reopen"]), st.integers(1, 30)), max_size=15),
    stored=st.booleans(),
)
def test_what_was_used_longest_ago_goes_and_the_files_stay_within_the_budget(
    tmp_path_factory: pytest.TempPathFactory, room: int, steps: list[Do], stored: bool
) -> None:
    folder = tmp_path_factory.mktemp("states") if stored else None
    budget = room * LARGE.row_bytes
    tier = StateTier(LARGE, folder, disk_bytes=budget)
    everything = batch(600, form=LARGE)
    used: list[int] = []  # longest ago first
    added = 0

    def shrink() -> None:
        if len(used) > room:
            del used[: len(used) - room * 9 // 10]

    for what, count in steps:
        if what == "add":
            part = list(range(added, added + count))
            assert tier.add(everything.take(part)).tolist() == part
            added += count
            used += part
            shrink()
        elif what == "read" and used:
            rows = [used[count * 7 % len(used)], used[count * 3 % len(used)]]
            assert same(tier.fetch(np.array(rows)), everything.take(rows))
            for row in sorted(set(rows), key=rows.index):
                used.remove(row)
            used += sorted(set(rows))
        elif what == "flush":
            tier.flush()
        elif what == "reopen" and folder:
            tier.close()
            tier = StateTier(LARGE, folder, disk_bytes=budget)
        tier._settled()  # or what is added while files are made smaller would go a little later
        assert found(tier, "s", k=600) == sorted(used)
    assert tier.displaced <= added - len(used)
    tier.close()
    if folder:
        files = [path.stat().st_size for path in folder.glob("states.lance/data/*")]
        assert sum(files) <= budget + 4096 * len(files)  # what Lance needs for a file of any size
        assert StateTable(folder).verify() == []
        assert sorted(found(StateTier(LARGE, folder), "s", k=600)) == sorted(used)


@pytest.mark.parametrize("stored", [True, False])
def test_the_router_decides_where_it_is_asked(folder: Path, stored: bool) -> None:
    budget = 10 * LARGE.row_bytes
    tier = StateTier(LARGE, folder if stored else None, disk_bytes=budget, policy="learned")
    scores = np.random.default_rng(0).permutation(30).astype(np.float32)
    for start in range(0, 30, 3):
        tier.add(batch(30, form=LARGE).take(list(range(start, start + 3))), keep=scores[start : start + 3])
        tier._settled()
    kept: list[int] = []
    for start in range(0, 30, 3):
        kept += range(start, start + 3)
        if len(kept) > 10:
            kept = sorted(kept, key=lambda row: scores[row])[-9:]
    assert found(tier, "s") == sorted(kept)
    assert tier.displaced == 30 - len(kept)
    tier.close()


def test_scores_of_the_router_must_fit(folder: Path) -> None:
    tier = StateTier(FORM, folder, disk_bytes=1 << 20, policy="learned")
    with pytest.raises(UsageError, match=r"keep must be float32 \(4\)"):
        tier.add(batch(4), keep=np.zeros(3, np.float32))
    assert len(tier) == 0
    with pytest.raises(UsageError, match=r"policy .sideways. must be lru or learned"):
        StateTier(FORM, policy="sideways")  # type: ignore[arg-type]


def test_a_budget_below_one_record_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"disk_bytes \(10\) is less than one record takes \({FORM.row_bytes}\)"):
        StateTier(FORM, folder, disk_bytes=10)
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"ARROW1 and no more", None])
def test_use_that_was_lost_does_no_harm(folder: Path, content: bytes | None) -> None:
    with StateTier(FORM, folder, disk_bytes=5 * FORM.row_bytes) as tier:
        tier.add(batch(4))
    if content is None:
        (folder / "usage.arrow").unlink()
    else:
        (folder / "usage.arrow").write_bytes(content)
    with StateTier(FORM, folder, disk_bytes=5 * FORM.row_bytes) as tier:
        assert len(tier) == 4
        tier.add(batch(8).take([4, 5]))
        assert found(tier, "s") == [2, 3, 4, 5]


def test_a_budget_is_of_one_namespace(folder: Path) -> None:
    filled(folder, LARGE)
    with StateTier(LARGE, folder, namespace="other", disk_bytes=6 * LARGE.row_bytes) as tier:
        tier.add(batch(8, seed=1, form=LARGE).take([6, 7]))
    assert len(StateTier(LARGE, folder, namespace="other")) == 5
    assert len(StateTier(LARGE, folder)) == 6


def test_nothing_waits_for_a_compaction_and_what_comes_meanwhile_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = Event(), Event()
    real = StateTable.compact

    def slow(self: StateTable, keep: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        real(self, keep)

    monkeypatch.setattr(StateTable, "compact", slow)
    tier = StateTier(LARGE, folder, disk_bytes=10 * LARGE.row_bytes)
    rows = batch(30, form=LARGE)
    tier.add(rows.take(list(range(11))))
    assert begun.wait(60)
    assert tier.compacting
    tier.add(rows.take(list(range(11, 26))))  # more than there is room for
    assert same(tier.fetch(np.array([5, 25])), rows.take([5, 25]))
    assert len(tier) == 9 + 15
    go_on.set()
    tier.close()
    assert found(StateTier(LARGE, folder), "s") == [5, *range(18, 26)]
    assert StateTable(folder).verify() == []


def test_a_compaction_that_fails_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10))
    with StateTier(LARGE, folder, disk_bytes=10 * LARGE.row_bytes) as tier:
        tier.add(batch(12, form=LARGE))
    assert "were not compacted" in caplog.text
    assert len(StateTier(LARGE, folder)) == 9


# -- exported ----------------------------------------------------------------------------------------------------------
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.dictionaries(st.sampled_from(["default", "it's", "ü"]), st.integers(0, 20), min_size=1))
def test_an_export_brings_states_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int]
) -> None:
    place = tmp_path_factory.mktemp("export")
    tier: Any = on_disk(place)
    for seed, (namespace, count) in enumerate(counts.items()):
        with tier.states(FORM, namespace=namespace) as states:
            states.add(batch(count, seed=seed))
            states.evict(np.array([0, 3]))
    archive.write_archive(tier, place / "x.l2m")
    archive.restore_archive(place / "x.l2m", place / "again")
    again = LongTermTier(place / "again")
    assert again.verify() == []
    for seed, (namespace, count) in enumerate(counts.items()):
        kept = [row for row in range(count) if row not in (0, 3)]
        with again.states(FORM, namespace=namespace) as states:
            assert found(states, "s") == kept
            assert same(states.fetch(np.array(kept, dtype=np.int64)), batch(count, seed=seed).take(kept))
            assert states.add(batch(1, "new")).tolist() == [max(kept, default=-1) + 1]
    with pytest.raises(IncompatibleError):
        again.states(replace(FORM, depth=9))


def other_rows(parts: dict[str, bytes], change: Callable[[pa.Table], pa.Table]) -> dict[str, bytes]:
    table = change(pa.ipc.open_file(parts["states.arrow"]).read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return {**parts, "states.arrow": sink.getvalue().to_pybytes()}


def other_pin(parts: dict[str, bytes], dim: bytes) -> dict[str, bytes]:
    return {**parts, "states.json": parts["states.json"].replace(b'"dim": 6', dim)}


def column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    kind = table.schema.field(name)
    return table.set_column(table.schema.names.index(name), kind, pa.array(values, kind.type))


BAD: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "only the pin": lambda parts: {name: part for name, part in parts.items() if name != "states.arrow"},
    "only the rows": lambda parts: {name: part for name, part in parts.items() if name != "states.json"},
    "a pin that is none": lambda parts: {**parts, "states.json": b"[]"},
    "a pin of another form": lambda parts: other_pin(parts, b'"dim": 7'),
    "a form that cannot be": lambda parts: other_pin(parts, b'"dim": 0'),
    "rows of other columns": lambda parts: other_rows(parts, lambda table: table.drop_columns(["crc"])),
    "an altered row": lambda parts: other_rows(parts, lambda table: column(table, "position", [7] * len(table))),
    "the same id twice": lambda parts: other_rows(parts, lambda table: pa.concat_tables([table, table])),
    "no Arrow": lambda parts: {**parts, "states.arrow": b"x"},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_an_archive_whose_states_are_not_sound_makes_nothing(
    tier: LongTermTier, tmp_path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    with tier.states(FORM) as states:
        states.add(batch(4))
    archive.write_archive(tier, tmp_path / "x.l2m")
    packed(tmp_path / "bad.l2m", change(members(tmp_path / "x.l2m")))
    with pytest.raises(CorruptError, match="is not an export of a collection, or was altered"):
        archive.restore_archive(tmp_path / "bad.l2m", tmp_path / "again")
    assert not (tmp_path / "again").exists()
