"""The states table: one contract, in memory and on Lance; what is found is exact, and damage is noticed."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2m_rag.errors import CorruptError, DiskFullError, IncompatibleError, UsageError
from l2m_rag.memory_tiers import disk, state_table, states
from l2m_rag.memory_tiers.state_table import StateFormat, StateRows, StateTable
from l2m_rag.memory_tiers.states import StateTier

FORM = StateFormat(
    key_dim=8, dim=6, vectors=3, ratio=4, dtype="int8", backbone="b0", depth=3, key_version="k0"
)  # fmt: skip
LATE = np.iinfo(np.int64).max

Make = Callable[..., StateTier]


def keys(count: int, seed: int = 0) -> Any:
    drawn = np.random.default_rng(seed).normal(size=(count, FORM.key_dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def batch(count: int, stream: str | Sequence[str] = "s", *, seed: int = 0, form: StateFormat = FORM) -> StateRows:
    """Records of 10 tokens each, one behind the other."""
    rng = np.random.default_rng(seed)
    shape = (count, form.vectors, form.dim)
    int8 = form.dtype == "int8"
    return StateRows(
        streams=(stream,) * count if isinstance(stream, str) else tuple(stream),
        steps=np.arange(count, dtype=np.int64) + seed,
        positions=10 * np.arange(count, dtype=np.int64),
        lengths=np.full(count, 10, dtype=np.int32),
        keys=keys(count, seed),
        values=rng.integers(-127, 128, shape, dtype=np.int8) if int8 else rng.normal(size=shape).astype(np.float16),
        scales=rng.random((count, form.vectors), dtype=np.float32) if int8 else np.ones(shape[:2], dtype=np.float32),
        tokens=tuple(tuple(range(at, at + 10)) if at % 3 else () for at in range(count)),
    )


def same(left: StateRows, right: StateRows) -> bool:
    arrays = ("steps", "positions", "lengths", "keys", "values", "scales")
    pairs = [(getattr(left, name), getattr(right, name)) for name in arrays]
    equal = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return equal and left.streams == right.streams and left.tokens == right.tokens


def query(seed: int = 100, count: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(count, FORM.key_dim)).astype(np.float32)


def found(tier: StateTier, stream: str, before: int = LATE, k: int = 100) -> list[int]:
    """Give the rows that a search sees of a stream."""
    rows, _ = tier.search(query(), [stream], np.array([before]), k)
    return sorted(row for row in rows[0].tolist() if row >= 0)


@pytest.fixture(params=["memory", "lance"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Give what opens a tier, on one folder or on none."""
    folder = tmp_path / "states" if request.param == "lance" else None

    def opened(form: StateFormat = FORM, **options: Any) -> StateTier:
        return StateTier(form, folder, **options)

    return opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


# -- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_what_was_added_is_fetched_in_the_order_asked_for(make: Make, dtype: Any) -> None:
    form = replace(FORM, dtype=dtype)
    rows = batch(7, form=form)
    tier = make(form)
    numbers = tier.add(rows)
    for _ in range(2):  # before the commit and after it
        assert same(tier.fetch(numbers), rows)
        order = [5, 0, 5, 2]
        assert same(tier.fetch(numbers[order]), rows.take(order))
        tier.flush()
    assert len(tier.fetch(np.empty(0, dtype=np.int64))) == 0
    assert tier.fetch(np.empty(0, dtype=np.int64)).values.shape == (0, form.vectors, form.dim)


def test_what_is_added_is_seen_at_once(make: Make) -> None:
    tier = make()
    numbers = tier.add(batch(3))
    assert found(tier, "s") == numbers.tolist() == [0, 1, 2]
    assert len(tier) == 3


def test_a_later_change_of_the_batch_changes_nothing(make: Make) -> None:
    tier, rows = make(), batch(2)
    numbers = tier.add(rows)
    rows.values[:] = 0
    rows.keys[:] = 0
    assert same(tier.fetch(numbers), batch(2))


def test_adding_twice_adds_once(make: Make) -> None:
    tier, rows = make(), batch(4)
    numbers = tier.add(rows)
    assert tier.add(rows).tolist() == numbers.tolist()
    tier.flush()
    assert tier.add(rows.take([3, 3, 0])).tolist() == numbers[[3, 3, 0]].tolist()
    tier.flush()
    assert len(tier) == len(found(tier, "s")) == 4
    twins = replace(rows.take([0, 0]), positions=np.array([70, 70]))
    assert len(set(tier.add(twins).tolist())) == 1
    assert len(tier) == 5


def test_records_that_differ_in_place_or_key_are_different(make: Make) -> None:
    tier, row = make(), batch(1)
    others = [
        replace(row, streams=("t",)),
        replace(row, positions=row.positions + 1),
        replace(row, lengths=row.lengths + 1, tokens=()),
        replace(row, keys=-row.keys),
    ]
    assert [int(tier.add(other)[0]) for other in [row, *others]] == [0, 1, 2, 3, 4]


def test_a_stream_is_not_seen_from_another(make: Make) -> None:
    tier = make()
    names = ["a", "b", "a", "it's", "", 'say "no"', "a\0b", "漢字", "%_\\", "a"]
    numbers = tier.add(batch(10, names))
    for _ in range(2):
        for name in names:
            assert found(tier, name) == [row for row, of in zip(numbers.tolist(), names, strict=True) if of == name]
        assert found(tier, "A") == []
        tier.flush()
    assert tier.forget("it's") == tier.forget("a\0b") == tier.forget("漢字") == 1
    assert tier.forget("a") == 3
    assert len(tier) == 4


def test_a_record_is_seen_from_behind_its_last_token_on(make: Make) -> None:
    tier = make()
    tier.add(batch(3))
    assert [found(tier, "s", before) for before in (-5, 0, 9, 10, 19, 20, 30)] == [
        [], [], [], [0], [0], [0, 1], [0, 1, 2],
    ]  # fmt: skip


def test_equal_scores_come_by_row_and_do_not_depend_on_the_batch(make: Make) -> None:
    tier = make()
    rows = batch(40)
    rows.keys[:] = rows.keys[0]
    tier.add(rows)
    asked = query(count=17)
    together = tier.search(asked, ["s"] * 17, np.full(17, LATE), 5)
    assert together[0].tolist() == [[0, 1, 2, 3, 4]] * 17
    for at in range(17):
        alone = tier.search(asked[at : at + 1], ["s"], np.array([LATE]), 5)
        assert np.array_equal(alone[1][0], together[1][at])
        assert len(set(alone[1][0].tolist())) == 1


def test_many_queries_are_scored_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    tier.add(batch(9))
    asked, before = query(count=7), np.full(7, LATE)
    whole = tier.search(asked, ["s"] * 7, before, 4)
    monkeypatch.setattr(states, "_PART", 20)
    parts = tier.search(asked, ["s"] * 7, before, 4)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


def test_forget_and_evict_delete_and_no_number_comes_back(make: Make) -> None:
    tier = make()
    tier.add(batch(6, ["a", "b"] * 3))
    tier.flush()
    tier.add(batch(2, "a", seed=1))
    assert tier.evict(np.array([7, 2, 2, 99, -1])) == 2
    assert found(tier, "a") == [0, 4, 6]
    assert tier.forget("b") == 3
    assert tier.forget("b") == tier.forget("nobody") == 0
    assert tier.evict(np.empty(0, dtype=np.int64)) == 0
    assert found(tier, "b") == []
    assert len(tier) == 3
    for row in (1, 2, 7):
        with pytest.raises(UsageError, match=f"row {row} is not among the states of 'default'"):
            tier.fetch(np.array([row]))
    assert tier.add(batch(1, "b")).tolist() == [8]
    assert tier.forget("a") == 3
    assert found(tier, "b") == [8]


def test_only_a_search_is_a_look_up(make: Make) -> None:
    with make() as tier:
        numbers = tier.add(batch(3))
        tier.flush()
        tier.fetch(numbers)
        tier.evict(numbers[:1])
        tier.forget("s")
        assert tier.lookups == 0
        tier.search(query(count=2), ["s", "t"], np.array([LATE, LATE]), 1)
        assert tier.lookups == 1


def test_an_empty_tier_and_an_empty_batch(make: Make) -> None:
    tier = make()
    assert tier.add(batch(0)).tolist() == []
    rows, scores = tier.search(query(count=2), ["s", "t"], np.array([LATE, LATE]), 3)
    assert (rows == -1).all()
    assert (scores == -np.inf).all()
    assert [str(rows.dtype), str(scores.dtype)] == ["int64", "float32"]
    assert tier.search(query(count=0), [], np.empty(0, dtype=np.int64), 3)[0].shape == (0, 3)
    tier.flush()
    assert len(tier) == tier.hot_nbytes == 0


def test_bytes_grow_with_what_is_held(make: Make) -> None:
    tier = make()
    before = tier.nbytes
    tier.add(batch(50))
    tier.flush()
    assert tier.nbytes > before + batch(50).values.nbytes


# -- against brute force ----------------------------------------------------------------------------------------------
def brute_force(
    rows: StateRows, kept: Sequence[int], asked: Any, streams: Sequence[str], before: Any, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    numbers, values = [], []
    for at, stream in enumerate(streams):
        scored = [
            (-float(np.einsum("ij,j->i", rows.keys[row : row + 1].astype(np.float32), asked[at])[0]), row)
            for row in kept
            if rows.streams[row] == stream and rows.positions[row] + rows.lengths[row] <= before[at]
        ]
        best = sorted(scored)[:k] + [(np.inf, -1)] * k
        numbers.append([row for _, row in best[:k]])
        values.append([-below for below, _ in best[:k]])
    return numbers, values


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_search_equals_brute_force_whatever_happened(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 30))
    rows = batch(count, data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count)))
    alike = data.draw(st.lists(st.integers(0, count - 1), max_size=10))
    rows.keys[alike] = rows.keys[0]
    path = tmp_path_factory.mktemp("states")
    tiers = [StateTier(FORM), StateTier(FORM, path, hot_bytes=data.draw(st.sampled_from([0, 5000, 1 << 20])))]
    kept: set[int] = set()
    start = 0
    while start < count:
        stop = data.draw(st.integers(start + 1, count))
        for tier in tiers:
            assert tier.add(rows.take(list(range(start, stop)))).tolist() == list(range(start, stop))
        kept |= set(range(start, stop))
        start = stop
        match data.draw(st.sampled_from(["nothing", "flush", "evict", "forget", "reopen"])):
            case "flush":
                tiers[1].flush()
            case "evict":
                gone = data.draw(st.lists(st.integers(0, count), max_size=4))
                assert {tier.evict(np.array(gone, dtype=np.int64)) for tier in tiers} == {len(kept & set(gone))}
                kept -= set(gone)
            case "forget":
                assert len({tier.forget("a") for tier in tiers}) == 1
                kept -= {row for row in kept if rows.streams[row] == "a"}
            case "reopen":
                tiers[1].close()
                tiers[1] = StateTier(FORM, path)
        streams, k = ["a", "b", "c", "a"], data.draw(st.integers(1, 8))
        before = np.array(data.draw(st.lists(st.integers(0, 10 * count), min_size=4, max_size=4)))
        asked = query(data.draw(st.integers(0, 99)), 4)
        expected = brute_force(rows, sorted(kept), asked, streams, before, k)
        for tier in tiers:
            numbers, scores = tier.search(asked, streams, before, k)
            assert (numbers.tolist(), scores.tolist()) == expected
            assert len(tier) == len(kept)
            assert same(tier.fetch(np.array(sorted(kept), dtype=np.int64)), rows.take(sorted(kept)))


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["keys", "values", "scales"])
def test_entries_that_are_not_numbers_are_refused(make: Make, name: str, value: float) -> None:
    form = replace(FORM, dtype="float16")
    tier, rows = make(form), batch(3, form=form)
    getattr(rows, name)[1].flat[2] = value
    with pytest.raises(
        UsageError, match=rf"the {name} of record 1 \(stream 's', position 10\) have entries that are not"
    ):
        tier.add(rows)
    assert len(tier) == 0
    assert found(tier, "s") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": keys(2).astype(np.float32)}, r"keys must be float16 \(2, 8\); it is float32 \(2, 8\)"),
        ({"values": np.zeros((2, 3, 5), np.int8)}, r"values must be int8 \(2, 3, 6\); it is int8 \(2, 3, 5\)"),
        ({"values": np.zeros((2, 3, 6), np.float16)}, r"values must be int8 \(2, 3, 6\); it is float16"),
        ({"scales": np.zeros((2, 3))}, r"scales must be float32 \(2, 3\); it is float64 \(2, 3\)"),
        ({"steps": np.zeros(3, np.int64)}, r"steps must be int64 \(2\); it is int64 \(3,\)"),
        ({"positions": [0, 10]}, r"positions must be int64 \(2\); it is list"),
        ({"positions": np.array([0, -1])}, "the length .10. of record 1 .* the position at least 0"),
        ({"positions": np.array([0, LATE])}, "of record 1 "),
        ({"lengths": np.array([10, 0], np.int32)}, "the length .0. of record 1 .* must be at least 1"),
        ({"lengths": np.array([10, 10])}, r"lengths must be int32 \(2\); it is int64"),
        ({"keys": 2 * keys(2)}, "the key of record 0 .* has length 2; keys must have length 1"),
        ({"keys": 0 * keys(2)}, "has length 0; keys must have length 1"),
        ({"tokens": ((),)}, "tokens must have 2 entries, one a record; it has 1"),
        ({"tokens": ((), (1, 2))}, r"2 tokens of record 1 .* do not fit its length \(10\)"),
        ({"tokens": ((), (1 << 31,) * 10)}, r"the tokens of record 1 .* from 0 to 2\*\*31 - 1"),
        ({"streams": ("s", "\ud800")}, "must be text that UTF-8 can encode"),
        ({"streams": ("s", 7)}, r"stream \(7\) must be text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(make: Make, change: dict[str, Any], message: str) -> None:
    tier = make()
    with pytest.raises(UsageError, match=message):
        tier.add(replace(batch(2), **change))
    assert len(tier) == 0


def test_questions_that_do_not_fit_are_refused(make: Make) -> None:
    tier, late = make(), np.array([LATE])
    with pytest.raises(UsageError, match=r"queries must be float32 \(1, 8\); it is float32 \(1, 7\)"):
        tier.search(query()[:, :7], ["s"], late, 1)
    with pytest.raises(UsageError, match=r"before must be int64 \(1\); it is int64 \(2,\)"):
        tier.search(query(), ["s"], np.array([1, 2]), 1)
    with pytest.raises(UsageError, match=r"k \(0\) must be at least 1"):
        tier.search(query(), ["s"], late, 0)
    with pytest.raises(UsageError, match="the queries to search for have entries that are not numbers"):
        tier.search(query() * np.float32(np.nan), ["s"], late, 1)
    with pytest.raises(UsageError, match=r"rows must be int64 \(N\); it is list"):
        tier.fetch([0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"rows must be int64 \(N\); it is float64 \(1,\)"):
        tier.evict(np.zeros(1))  # type: ignore[arg-type]
    assert tier.lookups == 0


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("ratio", -1), ("dtype", "int4")])
def test_a_format_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"{name} \({value}\) must be"):
        replace(FORM, **{name: value})


# -- on the disk ------------------------------------------------------------------------------------------------------
def test_reopened_it_is_the_same(folder: Path) -> None:
    rows = batch(20, ["a", "b"] * 10)
    with StateTier(FORM, folder) as tier:
        numbers = tier.add(rows)
        before = tier.search(query(), ["a"], np.array([150]), 4)
    again = StateTier(FORM, folder)
    assert len(again) == 20
    after = again.search(query(), ["a"], np.array([150]), 4)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert same(again.fetch(numbers), rows)
    assert again.add(rows).tolist() == numbers.tolist()
    assert again.add(batch(1, "c")).tolist() == [20]


def test_rows_are_committed_in_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "GROUP", 4)
    tier = StateTier(FORM, folder)
    rows = batch(6)
    tier.add(rows.take([0, 1, 2]))
    assert len(StateTier(FORM, folder)) == 0
    tier.add(rows.take([3, 4]))
    assert len(StateTier(FORM, folder)) == 5
    tier.add(rows.take([5]))
    assert len(StateTier(FORM, folder)) == 5  # as after a crash
    tier.close()
    assert len(StateTier(FORM, folder)) == 6


def test_the_number_of_a_deleted_row_does_not_come_back_after_reopening(folder: Path) -> None:
    with StateTier(FORM, folder) as tier:
        tier.add(batch(3))
        tier.flush()
        tier.evict(np.array([2]))
    with StateTier(FORM, folder) as tier:
        assert tier.add(batch(1, "t")).tolist() == [3]
        assert tier.forget("t") == 1
    with StateTier(FORM, folder) as tier:
        assert tier.add(batch(1, "u")).tolist() == [4]


def test_namespaces_share_a_table_and_nothing_else(folder: Path) -> None:
    tiers = [StateTier(FORM, folder, namespace=name) for name in ("it's", "b")]
    for seed, tier in enumerate(tiers):
        assert tier.add(batch(3, seed=seed)).tolist() == [0, 1, 2]  # both open, and both write
        tier.flush()
    assert tiers[0].evict(np.array([1])) == 1
    assert tiers[0].add(batch(1)).tolist() == [0]
    tiers = [StateTier(FORM, folder, namespace=name) for name in ("it's", "b")]
    assert [found(tier, "s") for tier in tiers] == [[0, 2], [0, 1, 2]]
    assert same(tiers[1].fetch(np.array([1])), batch(3, seed=1).take([1]))
    assert tiers[0].forget("s") == 2
    assert len(StateTier(FORM, folder, namespace="b")) == 3
    assert len(StateTier(FORM, folder)) == 0
    with pytest.raises(UsageError, match="namespace"):
        StateTier(FORM, namespace="\ud800")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20_000), st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=9), max_size=8))
def test_the_hot_set_stays_within_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, budget: int, asked: list[list[int]]
) -> None:
    rows = batch(20)
    tier = StateTier(FORM, tmp_path_factory.mktemp("states"), hot_bytes=budget)
    tier.add(rows)
    tier.flush()
    for wanted in asked:
        assert tier.hot_nbytes <= budget
        assert same(tier.fetch(np.array(wanted)), rows.take(wanted))
    assert tier.hot_nbytes <= budget
    tier.forget("s")
    assert tier.hot_nbytes == 0


def test_what_was_used_last_stays_hot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StateTier(FORM, folder) as tier:
        tier.add(batch(4))
    one = batch(4).take([1]).nbytes
    tier = StateTier(FORM, folder, hot_bytes=3 * one)
    for row in (1, 2, 1, 3, 0):
        tier.fetch(np.array([row]))
    read: list[list[int]] = []
    real = tier._read

    def reading(table: StateTable, rows: list[int]) -> dict[int, StateRows]:
        read.append(rows)
        return real(table, rows)

    monkeypatch.setattr(tier, "_read", reading)
    tier.fetch(np.array([0, 1, 2, 3]))
    assert read == [[2]]


def test_a_wrong_checksum_names_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = state_table.crc_of
    monkeypatch.setattr(state_table, "crc_of", lambda name, row, record: right(name, row, record) ^ (row == 1))
    with StateTier(FORM, folder) as tier:
        tier.add(batch(3))
    monkeypatch.undo()
    tier = StateTier(FORM, folder)
    assert same(tier.fetch(np.array([0, 2])), batch(3).take([0, 2]))
    with pytest.raises(CorruptError, match=r"row 1 of .*states\.lance is damaged"):
        tier.fetch(np.array([0, 1]))


def test_a_flipped_byte_of_a_value_is_noticed(folder: Path) -> None:
    form = replace(FORM, vectors=8, dim=64)
    rows = batch(3, form=form)
    with StateTier(form, folder) as tier:
        tier.add(rows)
    flipped = 0
    for path in (folder / "states.lance" / "data").iterdir():
        content = bytearray(path.read_bytes())
        at = content.find(rows.values[1].tobytes()[100:120])
        if at >= 0:
            content[at] ^= 1
            path.write_bytes(content)
            flipped += 1
    assert flipped == 1
    tier = StateTier(form, folder)
    assert same(tier.fetch(np.array([0, 2])), rows.take([0, 2]))
    with pytest.raises(CorruptError, match="row 1 of"):
        tier.fetch(np.array([1]))


def test_a_file_that_is_gone_or_cut_short_is_an_error_not_a_wrong_answer(folder: Path) -> None:
    with StateTier(FORM, folder) as tier:
        tier.add(batch(3))
    tier = StateTier(FORM, folder)
    for path in (folder / "states.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CorruptError, match="Delete that folder to have the states made again"):
        tier.fetch(np.array([0]))
    with pytest.raises(CorruptError, match="Delete that folder to have the states made again"):
        StateTier(FORM, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("key_dim", 16), ("dim", 5), ("vectors", 2), ("ratio", 16), ("dtype", "float16"), ("backbone", "b1"),
     ("depth", 4), ("key_version", "k1")],
)  # fmt: skip
def test_another_format_is_refused(folder: Path, name: str, value: Any) -> None:
    StateTier(FORM, folder).close()
    with pytest.raises(IncompatibleError) as error:
        StateTier(replace(FORM, **{name: value}), folder)
    assert f"were made with {name} {getattr(FORM, name)!r}; this run has {value!r}" in str(error.value)
    assert "delete that folder" in str(error.value)


def test_a_newer_schema_is_refused(folder: Path) -> None:
    StateTier(FORM, folder).close()
    pinned = json.loads((folder / "states.json").read_text())
    pinned["form"]["schema"] = 99
    del pinned["digest"]
    (folder / "states.json").write_text(json.dumps(pinned))
    with pytest.raises(IncompatibleError, match="schema 99; this run has 1"):
        StateTier(FORM, folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"form": 1, "next": {}}', "\xff"])
def test_a_pin_that_cannot_be_read_is_damage(folder: Path, content: str) -> None:
    StateTier(FORM, folder).close()
    (folder / "states.json").write_text(content, encoding="latin-1")
    with pytest.raises(CorruptError, match=r"states\.json cannot be read"):
        StateTier(FORM, folder)


def test_a_pin_with_a_flipped_bit_is_damage(folder: Path) -> None:
    StateTier(FORM, folder).close()
    whole = (folder / "states.json").read_bytes()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (folder / "states.json").write_bytes(flipped)
        with pytest.raises((CorruptError, IncompatibleError)):
            StateTier(FORM, folder)


def test_nothing_is_made_over_states_without_a_pin(folder: Path) -> None:
    with StateTier(FORM, folder) as tier:
        tier.add(batch(3))
    pin = (folder / "states.json").read_bytes()
    (folder / "states.json").unlink()
    with pytest.raises(CorruptError, match=r"holds states but no states\.json"):
        StateTier(FORM, folder)
    (folder / "states.json").write_bytes(pin)
    assert len(StateTier(FORM, folder)) == 3


def test_a_creation_that_was_cut_off_is_begun_again(folder: Path) -> None:
    StateTier(FORM, folder).close()
    (folder / "states.json").unlink()
    with StateTier(FORM, folder) as tier:
        tier.add(batch(3))
    assert len(StateTier(FORM, folder)) == 3


def test_a_table_that_is_gone_is_damage(folder: Path) -> None:
    StateTier(FORM, folder).close()
    (folder / "states.lance").rename(folder / "elsewhere")
    with pytest.raises(CorruptError, match="cannot be opened"):
        StateTier(FORM, folder)


@pytest.mark.parametrize("left", [0, 16])
def test_a_newest_manifest_without_content_costs_the_last_commit_only(folder: Path, left: int) -> None:
    rows = batch(6)
    tier = StateTier(FORM, folder)
    tier.add(rows.take([0, 1, 2]))
    tier.flush()
    tier.add(rows.take([3, 4, 5]))
    tier.flush()
    newest = min((folder / "states.lance" / "_versions").glob("*.manifest"))
    newest.write_bytes(bytes(left))
    healed = StateTier(FORM, folder)
    assert same(healed.fetch(np.array([0, 1, 2])), rows.take([0, 1, 2]))
    assert len(healed) == 3
    assert healed.add(rows).tolist() == [0, 1, 2, 3, 4, 5]
    healed.flush()
    assert same(StateTier(FORM, folder).fetch(np.arange(6)), rows)


def test_a_commit_that_failed_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = StateTier(FORM, folder)
    tier.add(batch(3))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.Ledger, "settle", full)
    with pytest.raises(DiskFullError, match="is full; nothing is lost"):
        tier.flush()
    monkeypatch.undo()
    assert len(tier) == len(found(tier, "s")) == 3
    tier.close()
    again = StateTier(FORM, folder)
    assert len(again) == 3
    assert same(again.fetch(np.array([0, 1, 2])), batch(3))


def test_a_commit_waits_until_its_files_have_reached_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = StateTier(FORM, folder)
    before = {path for path in folder.rglob("*") if path.is_file()}
    synced: set[Path] = set()
    real = disk.fsync

    def syncing(path: str | Path) -> None:
        synced.add(Path(path))
        real(path)

    monkeypatch.setattr(disk, "fsync", syncing)
    tier.add(batch(3))
    tier.flush()
    written = {path for path in folder.rglob("*") if path.is_file()} - before
    assert written
    assert written <= synced
    assert {path.parent for path in written} <= synced


def test_torch_is_not_needed() -> None:
    code = "import sys, l2m_rag.memory_tiers.states; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
