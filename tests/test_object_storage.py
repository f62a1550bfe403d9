"""A collection on object storage: everything that one in a folder can do, one writer at a time, and what goes wrong."""

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import s3_server
import test_tier_contract as contract
from typer.testing import CliRunner, Result

from l2m_rag import collection as library
from l2m_rag import models
from l2m_rag.cli.main import app
from l2m_rag.config import Settings, Url, load_settings
from l2m_rag.errors import (
    CollectionNotFound,
    ConfigError,
    CorruptError,
    IncompatibleError,
    LockedError,
    MissingExtraError,
    StorageError,
    UsageError,
)
from l2m_rag.memory_tiers import places
from l2m_rag.memory_tiers.long_term import LongTermTier, Manifest, create_tier
from l2m_rag.memory_tiers.places import Prefix, writing

ROOT = Path(__file__).parent.parent
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with s3_server.serving() as address:
        yield address


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.clear_aws(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("L2M_HOME", raising=False)


def lead_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in s3_server.environment(address).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def home(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Url:
    """A prefix in a bucket of its own."""
    lead_to(monkeypatch, endpoint)
    bucket = f"l2m-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(endpoint, bucket)
    return Url(bucket, "team/data")


def in_bucket(where: Url, name: str = "x") -> LongTermTier:
    made = Manifest(embedder="none", fingerprint="x", dimension=contract.DIMENSION, created_at=time.time())
    return create_tier(where / "collections" / name, made)


@pytest.fixture
def tier(home: Url) -> LongTermTier:
    return in_bucket(home)


# -- the contract of the tier

LAWS = {
    name: law
    for name, law in vars(contract).items()
    if name.startswith("test_") and "tier" in inspect.signature(law).parameters and "states" not in name
}
globals().update(LAWS)


@pytest.mark.slow
def test_whatever_is_done_it_finds_what_the_reference_finds(
    home: Url, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(contract, "on_disk", lambda folder: in_bucket(home, folder.name))
    contract.test_whatever_is_done_the_tier_on_disk_finds_what_the_reference_finds(tmp_path_factory)


def test_the_contract_has_laws() -> None:
    assert len(LAWS) >= 12


def test_states_of_a_model_are_refused(tier: LongTermTier) -> None:
    with pytest.raises(UsageError, match=r"kept on the disk.*s3://l2m-"):
        tier.states(contract.FORM)
    assert tier.state_table() is None


def test_a_second_look_is_from_the_cache_on_this_machine(tier: LongTermTier, tmp_path: Path) -> None:
    made = contract.filled(tier)
    tier.search("", made[0], 1)
    (cache,) = (tmp_path / "cache" / "l2m" / "hot").iterdir()
    again = LongTermTier(tier.folder)
    assert again.hot_index().chunks is not None
    assert contract.ids(again.search("", made[5], 1)) == [5]
    for path in cache.iterdir():
        path.write_bytes(b"nonsense")
    assert contract.ids(LongTermTier(tier.folder).search("", made[7], 1)) == [7]


def test_a_commit_of_another_is_seen(tier: LongTermTier) -> None:
    contract.filled(tier)
    other = LongTermTier(tier.folder)
    assert len(other) == 12
    tier.evict([contract.chunk(3).id])
    tier.add([contract.chunk(50, "zebra")], contract.vectors(1, 7))
    assert contract.ids(other.search("zebra", contract.vectors(1, 7)[0], 1)) == [50]
    assert other.fetch([contract.chunk(3).id]) == []


RACER = """
import sys, time
from l2m_rag.config import parse_url
from l2m_rag.memory_tiers.long_term import LongTermTier
import test_tier_contract as contract
tier = LongTermTier(parse_url(sys.argv[1]))
open(sys.argv[2], "w").close()
import os
while not os.path.exists(sys.argv[3]):
    time.sleep(0.005)
for race in range(4):
    tier.add([contract.chunk(50 * race + i) for i in range(50)], contract.vectors(50, race))
"""


def child(code: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_that_write_the_same_ids_leave_each_once(tier: LongTermTier, tmp_path: Path) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    racers = [child(RACER, tier.folder, *order) for order in (names, names[::-1])]
    for racer in racers:
        _, told = racer.communicate(timeout=120)
        assert racer.returncode == 0, told
    stored = tier.store._scan(["id"])["id"].to_pylist() if tier.version else []
    assert sorted(stored) == [contract.chunk(number).id for number in range(200)]
    assert tier.store.damaged() == []


# -- one writer


def lock_of(tier: LongTermTier) -> Any:
    return json.loads(tier.place.read("writer.json"))


def test_a_second_writer_is_told_who_writes_and_until_when(tier: LongTermTier) -> None:
    with writing(tier.folder):
        until = time.strftime("%H:%M:%S", time.localtime(lock_of(tier)["until"]))
        with pytest.raises(LockedError) as told, writing(tier.folder):
            pass
        for part in ("'x'", f"process {os.getpid()} on {socket.gethostname()}", f"its lock ends at {until}"):
            assert part in str(told.value)
    with writing(tier.folder):
        pass


def test_of_many_that_want_to_write_one_does(tier: LongTermTier) -> None:
    outcomes: list[str] = []

    def want() -> None:
        try:
            with writing(tier.folder):
                outcomes.append("in")
                while len(outcomes) < 6:
                    time.sleep(0.01)
        except LockedError:
            outcomes.append("out")

    for _ in range(2):  # with no lock there, and with one that was given back
        outcomes.clear()
        threads = [Thread(target=want) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == ["in", *["out"] * 5]


def test_a_lock_that_nobody_renews_is_taken_over(tier: LongTermTier) -> None:
    held = {"id": "z", "pid": 7, "host": "far", "since": time.time() - 300, "until": time.time() + 100}
    tier.place.write_json("writer.json", held)
    with pytest.raises(LockedError, match="process 7 on far"), writing(tier.folder):
        pass
    tier.place.write_json("writer.json", {**held, "until": time.time() - 1})
    with writing(tier.folder):
        assert lock_of(tier)["pid"] == os.getpid()
    harm: object
    for harm in ("nonsense", [], {"until": "never"}):
        tier.place.write_json("writer.json", harm)
        with writing(tier.folder):
            assert lock_of(tier)["pid"] == os.getpid()


def test_a_lock_is_renewed_while_it_is_held(tier: LongTermTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LEASE", 1.5)
    with writing(tier.folder):
        first = lock_of(tier)["until"]
        time.sleep(2)
        assert lock_of(tier)["until"] > first
        with pytest.raises(LockedError), writing(tier.folder):
            pass


def test_who_loses_the_lock_is_told(tier: LongTermTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LEASE", 1.0)
    other = {"id": "z", "pid": 7, "host": "far", "since": time.time(), "until": time.time() + 100}

    def write_for_long() -> None:
        with writing(tier.folder):
            tier.place.write_json("writer.json", other)
            time.sleep(1)

    with pytest.raises(LockedError, match="taken over by another"):
        write_for_long()
    assert lock_of(tier) == other


KILLED = """
import os, signal, sys
from l2m_rag.config import parse_url
from l2m_rag.memory_tiers import places
from l2m_rag.memory_tiers.long_term import LongTermTier
import test_tier_contract as contract
places.LEASE = float(sys.argv[2])
with places.writing(parse_url(sys.argv[1])):
    tier = LongTermTier(parse_url(sys.argv[1]))
    tier.add([contract.chunk(number) for number in range(30)], contract.vectors(30))
    print("added", flush=True)
    number = 30
    while True:
        tier.add([contract.chunk(number + i) for i in range(10)], contract.vectors(10, number))
        number += 10
"""


def test_a_killed_writer_leaves_its_last_commit_and_a_lock_that_ends(tier: LongTermTier) -> None:
    racer = child(KILLED, tier.folder, 4.0)
    assert racer.stdout is not None
    assert racer.stdout.readline() == "added\n"
    time.sleep(0.3)
    racer.kill()
    racer.communicate(timeout=30)
    with pytest.raises(LockedError, match=f"process {racer.pid} on"), writing(tier.folder):
        pass
    again = LongTermTier(tier.folder)
    assert len(again) >= 30
    assert len(again) % 10 == 0
    assert again.store.damaged() == []
    made = contract.vectors(30)
    assert contract.ids(again.search("", made[4], 1)) == [4]
    time.sleep(max(0.0, lock_of(tier)["until"] - time.time()))
    with writing(tier.folder):
        again.add([contract.chunk(9000)], contract.vectors(1, 9))
    assert len(again) % 10 == 1


# -- collections


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, hashing: Any) -> Any:
    monkeypatch.setattr(models, "load_embedder", lambda settings: hashing)
    monkeypatch.setattr(library, "load_embedder", lambda settings: hashing)
    return hashing


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "lease.md").write_text("# Lease\n\nThe lease ends on 30 April 2029.\n\nThe rent is 900 euros.\n" * 3)
    (folder / "garden.txt").write_text("A zebra crosses the garden behind the house, and nobody minds it.")
    return folder


def settings_in(home: Any) -> Settings:
    return Settings(home=home, embedder="hashing", chunk_size=12, chunk_overlap=0)


def content(kb: library.Collection) -> tuple[Any, Any]:
    rows = [{**asdict(row), "ingested_at": 0} for row in kb.documents()]
    return rows, [(row["id"], kb.text(row["id"])) for row in rows if row["chunks"]]


def test_a_collection_is_the_same_as_in_a_folder(home: Url, docs: Path, made: Any, tmp_path: Path) -> None:
    there, here = (library.open("x", settings=settings_in(place)) for place in (str(home), tmp_path / "home"))
    assert there.ingest(docs).added == here.ingest(docs).added
    assert content(there) == content(here)
    for mode in ("hybrid", "dense", "text"):
        assert there.search("the rent", 5, mode=mode) == here.search("the rent", 5, mode=mode)
    made.encoded.clear()
    again = there.ingest(docs)
    assert (again.unchanged, again.added, made.encoded) == (2, 0, [])
    assert there.verify().ok
    (docs / "garden.txt").unlink()
    there.ingest(docs, prune=True)
    there.optimize()
    assert [row.id for row in there.documents()] == ["lease.md"]
    assert there.verify().ok
    assert there.repair() == ["built the search indexes again"]
    assert there.migrate() == "is in format 2 already"
    info = there.info()
    assert info.path == f"{home}/collections/x"
    assert info.bytes == sum(size for _, size in Prefix(home / "collections" / "x").files())


def test_an_export_comes_back_as_it_was(home: Url, docs: Path, made: Any, tmp_path: Path) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    kb.export(tmp_path / "x.l2m")
    for place in (home, tmp_path / "home"):
        copy = library.import_collection(tmp_path / "x.l2m", "copy", settings_in(place))
        assert content(copy) == content(kb)
        assert copy.verify().ok
        assert copy.search("rent", 3) == kb.search("rent", 3)
    with pytest.raises(UsageError, match="there is a collection 'copy' already"):
        library.import_collection(tmp_path / "x.l2m", "copy", settings_in(home))
    assert [info.name for info in library.list_collections(settings_in(home))] == ["copy", "x"]


def test_an_import_that_fails_leaves_nothing(home: Url, docs: Path, made: Any, tmp_path: Path) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    before, whole = content(kb), kb.export(tmp_path / "x.l2m").read_bytes()
    (tmp_path / "x.l2m").write_bytes(whole[:-200])
    with pytest.raises(CorruptError, match="is not an export"):
        library.import_collection(tmp_path / "x.l2m", "copy", settings_in(home))
    assert list(Prefix(home / "collections" / "copy").files()) == []
    kb.tier().store._chunks.update(where="document = 'garden.txt'", values={"text": "A tiger"})
    kb.export(tmp_path / "altered.l2m")
    with pytest.raises(CorruptError, match="some chunks has been altered"):
        library.import_collection(tmp_path / "altered.l2m", "copy", settings_in(home))
    assert not [path for path, _ in Prefix(home).files() if "/copy/" in path]
    left = library.open("copy", settings=settings_in(home))
    Prefix(home / "collections" / "copy").write_json("tables/left.json", {})  # as of a run that was killed
    (tmp_path / "x.l2m").write_bytes(whole)
    with pytest.raises(UsageError, match=r"there is something at s3://.*l2m collections delete copy --yes"):
        library.import_collection(tmp_path / "x.l2m", "copy", settings_in(home))
    left.delete()
    assert content(library.import_collection(tmp_path / "x.l2m", "copy", settings_in(home))) == before


def test_a_deleted_collection_leaves_nothing(home: Url, docs: Path, made: Any, tmp_path: Path) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    kb.search("rent", 3)
    library.open("xy", settings=settings_in(home)).ingest(docs)
    kb.delete()
    api = Prefix(home)
    assert {path.split("/")[1] for path, _ in api.files()} == {"xy"}
    assert list((tmp_path / "cache" / "l2m" / "hot").iterdir()) == [Prefix(home / "collections" / "xy").hot]
    with pytest.raises(CollectionNotFound):
        kb.search("rent", 3)
    kb.ingest(docs)
    assert len(kb.search("rent", 3)) == 3


def test_a_rename_says_what_to_do_instead(home: Url, docs: Path, made: Any) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    with pytest.raises(UsageError, match=r"export x x\.l2m; l2m collections import x\.l2m y; l2m collections delete x"):
        kb.rename("y")
    assert kb.verify().ok


def test_damage_is_found_and_mended(home: Url, docs: Path, made: Any) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    tier = kb.tier()
    (row,) = (row for row in kb.documents() if row.id == "garden.txt")
    tier.store._chunks.update(where="document = 'garden.txt'", values={"text": "A tiger"})
    assert not kb.verify().ok
    assert any("damaged" in line for line in kb.repair())
    assert kb.verify().ok
    assert kb.ingest(docs).added
    assert row.sha256 in {row.sha256 for row in kb.documents()}


def test_a_newer_format_and_an_altered_manifest_are_refused(home: Url, docs: Path, made: Any) -> None:
    kb = library.open("x", settings=settings_in(home))
    kb.ingest(docs)
    place = Prefix(home / "collections" / "x")
    manifest = json.loads(place.read("manifest.json"))
    place.write_json("manifest.json", {**manifest, "format": 99})
    with pytest.raises(IncompatibleError, match=r"has format 99.*Upgrade"):
        library.open("x", settings=settings_in(home)).search("rent", 3)
    place.write_json("manifest.json", {**manifest, "dimension": 33})
    with pytest.raises(CorruptError, match=r"manifest\.json cannot be read \(it has been altered\)"):
        library.open("x", settings=settings_in(home)).search("rent", 3)


# -- the command line


def l2m(home: object, *args: object) -> Result:
    return CliRunner().invoke(app, ["--home", str(home), *map(str, args)], prog_name="l2m")


def test_the_command_line_works_on_object_storage(
    home: Url, docs: Path, embedder: Path, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EMBEDDER": embedder, "MODEL": language_model, "CHUNK_SIZE": 32, "CHUNK_OVERLAP": 8}.items():
        monkeypatch.setenv(f"L2M_{name}", str(value))
    monkeypatch.setenv("L2M_ABSTAIN_BELOW", "0")

    def told(*args: object, at: object = home) -> Any:
        ran = l2m(at, *args, "--json")
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.stdout)

    found = {}
    for place in (home, tmp_path / "home"):
        told("ingest", docs, "-c", "x", at=place)
        found[place] = [told("search", "rent", "-c", "x", "--mode", mode, at=place) for mode in ("hybrid", "text")]
        found[place].append(told("ask", "When does the lease end?", "-c", "x", at=place)["citations"])
    assert found[home] == found[tmp_path / "home"]
    assert found[home][0]["hits"]
    assert told("ask", "What is the rent?", "--file", docs / "lease.md", "--session", "s")["citations"]
    (said, _) = told("sessions", "show", "s")["messages"]
    assert said["text"] == "human: What is the rent?"
    assert told("sessions", "forget", "s", "--all")["forgotten"][0] == said
    assert told("sessions", "list") == {"sessions": []}
    assert [one["name"] for one in told("collections", "list")["collections"]] == ["conversations", "x"]
    assert told("collections", "info", "x")["path"] == f"{home}/collections/x"
    assert told("collections", "verify", "x")["ok"]
    assert told("collections", "repair", "x")["repaired"] == ["built the search indexes again"]
    assert told("collections", "optimize", "x")["bytes_after"] > 0
    told("collections", "export", "x", tmp_path / "x.l2m")
    assert told("collections", "import", tmp_path / "x.l2m", "y")["chunks"] > 0
    assert told("collections", "delete", "x", "--yes")["deleted"]
    renamed = l2m(home, "collections", "rename", "y", "z")
    assert (renamed.exit_code, "cannot" in renamed.output or "nothing can be renamed" in renamed.output) == (2, True)
    gone = l2m(home, "search", "rent", "-c", "x")
    assert (gone.exit_code, gone.stdout) == (10, "")
    assert "home     s3://l2m-" in l2m(home, "config", "path").stdout
    checks = {check["name"]: check for check in json.loads(l2m(home, "doctor", "--json").stdout)["checks"]}
    assert checks["home"]["ok"]
    assert checks["home"]["detail"] == f"{home} can be written"
    assert checks["collection y"]["ok"]
    assert all(path.startswith(("collections/y/", "collections/conversations/")) for path, _ in Prefix(home).files())


# -- what goes wrong


def test_a_home_may_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    assert load_settings(environ={"L2M_HOME": "s3://bucket/a//b/"})[0].home == Url("bucket", "a/b")
    (tmp_path / "l2m.toml").write_text('home = "s3://bucket"\n')
    settings = load_settings(cwd=tmp_path, environ={})[0]
    assert (str(settings.home), settings.data) == ("s3://bucket", tmp_path / "data" / "l2m")


@pytest.mark.parametrize(
    ("home", "told"),
    [
        ("s3://", "3 to 63"),
        ("s3://ab", "3 to 63"),
        ("s3://Bucket/x", "3 to 63"),
        ("s3:///x", "3 to 63"),
        ("s3:/bucket/x", "no other kind"),
        ("s3://bucket/../x", "prefix"),
        ("s3://bucket/a b?c", "prefix"),
        ("gs://bucket/x", "no other kind"),
        ("https://host/x", "no other kind"),
        ("file:///tmp/x", "no other kind"),
    ],
)
def test_an_address_that_is_none_is_a_usage_error(home: str, told: str) -> None:
    ran = l2m(home, "collections", "list")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert told in ran.stderr
    assert f"home ({home!r})" in ran.stderr


def test_an_address_with_a_password_is_not_repeated() -> None:
    ran = l2m("s3://key:hidden@bucket/x", "collections", "list")
    assert ran.exit_code == 2
    assert "hidden" not in ran.output


def test_an_address_as_a_path_or_for_models_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match="give it as a string"):
        Settings(home=Path("s3://bucket/x"))
    with pytest.raises(ConfigError, match=r"models .* must be a folder on this machine"):
        Settings(models="s3://bucket/x")  # type: ignore[arg-type]


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match=r"obstore is not installed; run: pip install 'l2m-rag\[s3\]'"):
        library.list_collections(Settings(home="s3://bucket/x"))  # type: ignore[arg-type]


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def uses(home: Any, docs: Path, tmp_path: Path) -> list[Callable[[], object]]:
    kb = library.open("x", settings=settings_in(home))
    return [
        lambda: kb.ingest(docs),
        lambda: kb.search("rent"),
        kb.info,
        kb.verify,
        kb.repair,
        kb.optimize,
        kb.delete,
        lambda: kb.export(tmp_path / "x.l2m"),
        lambda: library.list_collections(settings_in(home)),
    ]


def test_an_endpoint_that_is_down_is_named(
    docs: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead_to(monkeypatch, NOWHERE)
    for use in uses(Url("bucket", "x"), docs, tmp_path):
        with pytest.raises(StorageError, match=rf"{NOWHERE} cannot be reached.*check AWS_ENDPOINT_URL"):
            use()


@pytest.mark.timeout(60)
def test_an_endpoint_that_never_answers_is_named_in_time(
    silent: str, docs: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_ANSWER", 1)
    monkeypatch.setattr(places, "_RETRY", 1)
    lead_to(monkeypatch, silent)
    for use in uses(Url("bucket", "x"), docs, tmp_path):
        with pytest.raises(StorageError, match=rf"{silent} cannot be reached, or does not answer"):
            use()


@pytest.mark.timeout(90)
def test_the_command_line_ends_when_an_endpoint_never_answers(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, silent)
    ran = l2m("s3://bucket/x", "collections", "info", "x")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert silent in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_an_endpoint_that_falls_silent_later_is_an_error_in_time(
    tier: LongTermTier, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead_to(monkeypatch, silent)
    with pytest.raises(StorageError, match=f"{silent} cannot be reached"):
        open_tables(tier)


def open_tables(tier: LongTermTier) -> None:
    """Open tables when our own first request, which would tell at once, has been made already."""
    from l2m_rag.memory_tiers.lance_store import LanceStore

    LanceStore(tier.folder / "tables", contract.DIMENSION)


def test_a_bucket_that_is_not_there_is_named(
    endpoint: str, docs: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead_to(monkeypatch, endpoint)
    for use in uses(Url("no-such-bucket", "x"), docs, tmp_path):
        with pytest.raises(StorageError, match=f"there is no bucket 'no-such-bucket' at {endpoint}"):
            use()


def test_without_credentials_it_is_told_which_to_set(
    home: Url, docs: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for use in uses(home, docs, tmp_path):
        with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            use()


def test_an_http_address_needs_leave(home: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match="set AWS_ALLOW_HTTP=true"):
        library.list_collections(settings_in(home))


def test_no_secret_is_ever_told(
    home: Url, silent: str, docs: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in (NOWHERE, os.environ["AWS_ENDPOINT_URL"]):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for args in (["collections", "list"], ["--debug", "collections", "info", "x"], ["doctor", "--json"]):
            assert "very-secret" not in l2m(Url("no-such-bucket"), *args).output


def test_the_vectors_that_come_back_are_those_that_went_in(tier: LongTermTier) -> None:
    made = contract.filled(tier)
    rows = tier.store.row_ids()
    assert np.array_equal(tier.store.vectors(rows), made)
