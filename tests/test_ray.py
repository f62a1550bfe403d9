"""Ingest on a Ray cluster: it gives what one process gives, also when workers die, and says plainly when it cannot."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import HashingEmbedder
from test_pipeline import LIMITS, content, counts, new_tier, run, text, write
from typer.testing import CliRunner

from l2m_rag import collection as library
from l2m_rag import models
from l2m_rag.cli.main import app
from l2m_rag.config import Settings
from l2m_rag.errors import IncompatibleError, L2MError, MissingExtraError, UsageError
from l2m_rag.indexers import pipeline, ray_ingest
from l2m_rag.indexers.pipeline import IngestReport, plan
from l2m_rag.indexers.ray_cluster import check_reachable, shares
from l2m_rag.indexers.ray_ingest import RayWorkers
from l2m_rag.indexers.readers import row_of
from l2m_rag.indexers.scan import Found
from l2m_rag.memory_tiers.long_term import LongTermTier

HEAD = """
import logging, ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level=logging.ERROR)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


pytestmark = pytest.mark.skipif(not (find_spec("ray") and find_spec("grpc")), reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """A token that our cluster wants to see; Ray reads it when it is imported, which no other test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def cluster(token: None) -> Iterator[str]:
    """The address of a Ray of two CPUs, which another process has started."""
    import ray

    for model in (HashingEmbedder, Mortal):  # no worker could import what lies among the tests
        ray.cloudpickle.register_pickle_by_value(sys.modules[model.__module__])
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", HEAD]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True) as head:
        assert head.stdout is not None
        assert head.stdin is not None
        yield head.stdout.readline().strip()
        head.stdin.close()


class Mortal(HashingEmbedder):
    """Ends its process by force the first times it is used, as many as there are tickets in a folder."""

    def __init__(self, tickets: Path, when: str) -> None:
        super().__init__()
        self.tickets = tickets
        self.when = when

    def _die(self, when: str) -> None:
        for ticket in self.tickets.iterdir() if when == self.when else ():
            ticket.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        self._die("reading")
        return super().spans(texts)

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Any:
        self._die("embedding")
        return super().encode(texts, progress=progress)


def run_on(
    address: str,
    tier: LongTermTier,
    *paths: Path,
    load: Callable[[], Any] = HashingEmbedder,
    fingerprint: str = HashingEmbedder.fingerprint,
    progress: Callable[[pipeline.Progress], None] | None = None,
    limits: pipeline.Limits = LIMITS,
    **options: Any,
) -> IngestReport:
    """Ingest with two workers."""
    with closing(RayWorkers(address, load, limits, threads=1)) as workers:
        work = plan(paths, tier.store, limits, **options)
        workers.start(fingerprint)
        return pipeline.ingest("x", work, tier, unused, limits, progress, workforce=workers)


def unused() -> Any:
    raise AssertionError("the embedder of this process was used")


def told(report: IngestReport) -> IngestReport:
    return replace(report, seconds=0)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Texts, and files that cannot be read."""
    docs = write(tmp_path / "docs", 24)
    (docs / "long.txt").write_text(text(1, paragraphs=60))
    (docs / "a.pdf").write_bytes(b"%PDF-1.4 and no more")
    (docs / "b.bin").write_bytes(bytes(range(256)) * 20)
    (docs / "c.txt").touch()
    (docs / "dangling.txt").symlink_to("nowhere")
    (docs / "large.txt").write_text("sheep " * 40_000)
    os.mkfifo(docs / "pipe.txt")
    return docs


@pytest.fixture
def tiers(tmp_path: Path, hashing: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[LongTermTier, LongTermTier]:
    """Two empty tiers, for what one process reads and what a cluster reads; a batch is 24 chunks."""
    monkeypatch.setattr(pipeline, "_BATCH", 24)
    return new_tier(tmp_path / "one process", hashing), new_tier(tmp_path / "cluster", hashing)


SMALL = replace(LIMITS, max_bytes=100_000)


# -- the same as in one process


def test_a_cluster_gives_what_one_process_gives(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], hashing: Any, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_ingest, "_FILES", 5)
    monkeypatch.setattr(ray_ingest, "_TEXT", 1000)
    one, many = tiers
    first = run(one, hashing, docs, limits=SMALL)
    assert {failure.reason for failure in first.failed} >= {"empty", "corrupt", "too_large", "unreadable"}
    assert told(run_on(cluster, many, docs, limits=SMALL)) == told(first)
    assert content(many, hashing) == content(one, hashing)

    (docs / "0" / "text 3.txt").write_text(text(3, version=1))
    (docs / "0" / "text 4.txt").unlink()
    (docs / "long.txt").write_text(text(1, paragraphs=40, version=1))
    (docs / "c.txt").write_text("No longer empty.")
    (docs / "new.txt").write_text(text(99))
    hashing.encoded.clear()
    second = run(one, hashing, docs, limits=SMALL, prune=True)
    assert counts(second)[:2] == (2, 2)
    assert told(run_on(cluster, many, docs, limits=SMALL, prune=True)) == told(second)
    assert content(many, hashing) == content(one, hashing)
    assert told(run_on(cluster, many, docs, limits=SMALL)) == told(run(one, unused, docs, limits=SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["reading", "embedding"])
def test_workers_that_are_killed_cost_nothing(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], hashing: Any, docs: Path, tmp_path: Path, when: str
) -> None:
    tickets = tmp_path / "tickets"
    tickets.mkdir()
    for number in range(3):
        (tickets / str(number)).touch()
    one, many = tiers
    report = run(one, hashing, docs)
    assert told(run_on(cluster, many, docs, load=partial(Mortal, tickets, when))) == told(report)
    assert list(tickets.iterdir()) == []
    assert content(many, hashing) == content(one, hashing)


@pytest.mark.slow
def test_a_run_that_is_interrupted_or_loses_all_its_workers_goes_on_in_the_next(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], hashing: Any, docs: Path, tmp_path: Path
) -> None:
    one, many = tiers
    run(one, hashing, docs)

    def interrupt(progress: pipeline.Progress) -> None:
        if progress.chunks > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on(cluster, many, docs, progress=interrupt)
    written = many.store.count_chunks()
    assert 0 < written < one.store.count_chunks()
    tickets = tmp_path / "tickets"
    tickets.mkdir()
    for number in range(100):
        (tickets / str(number)).touch()
    with pytest.raises(L2MError, match=r"die again and again|have died over"):
        run_on(cluster, many, docs, load=partial(Mortal, tickets, "embedding"))
    run_on(cluster, many, docs)
    assert content(many, hashing) == content(one, hashing)


@pytest.mark.slow
def test_nothing_is_imported_from_the_folder_that_documents_lie_in(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "l2m_rag", "torch", "lancedb"):
        (docs / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(docs)
    assert run_on(cluster, tiers[1], docs).added == 30


# -- what cannot be used


@pytest.mark.slow
def test_workers_with_another_embedder_are_refused(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], docs: Path
) -> None:
    with pytest.raises(IncompatibleError, match=r"other weights .* \(0123456789abcdef\).* \(another\)"):
        run_on(cluster, tiers[1], docs, fingerprint="another")
    assert tiers[1].store.count_documents() == 0


@pytest.mark.slow
def test_an_error_of_a_worker_is_told_as_ours(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], docs: Path
) -> None:
    with pytest.raises(L2MError, match=r"^a worker of the Ray cluster at .* failed: AssertionError: the embedder"):
        run_on(cluster, tiers[1], docs, load=unused)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "localhost:1"])
def test_an_address_where_nothing_listens_is_one_line(tmp_path: Path, address: str) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    home = tmp_path / "home"
    ran = CliRunner().invoke(app, ["--home", str(home), "ingest", str(tmp_path / "a.txt"), "--ray", address, "--json"])
    assert ran.exit_code == L2MError.code
    assert isinstance(ran.exception, SystemExit)
    said = json.loads(ran.stderr.splitlines()[-1])["message"]
    assert said.startswith(f"no Ray cluster answers at '{address}' (")
    assert "ray start --head" in said
    assert not (home / "collections").exists()


def test_a_port_that_speaks_something_else_is_told_from_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("l2m_rag.indexers.ray_cluster._PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(L2MError, match="what listens there is not Ray"):
            check_reachable(address)


@pytest.mark.parametrize(
    "address", ["", "somewhere", "host:", "host:0", "host:99999", ":6379", "http://host:80", "a b:1"]
)
def test_what_is_no_address_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match=r"must be local, auto, HOST:PORT or ray://HOST:PORT"):
        check_reachable(address)


@pytest.mark.parametrize("package", ["ray", "grpc"])
def test_without_the_extra_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.txt").write_text("A text.")
    collection = library.open("x", settings=Settings(home=tmp_path / "home"))
    with pytest.raises(MissingExtraError, match=r"ray is not installed; run: pip install 'l2m-rag\[ray\]'"):
        collection.ingest(tmp_path / "a.txt", ray="local")
    assert not (tmp_path / "home" / "collections").exists()


# -- parts


def test_each_gpu_or_few_cpus_of_a_machine_are_one_worker() -> None:
    assert shares([{"CPU": 8.0, "memory": 1e9}, {"CPU": 2.0}, {"memory": 1e9}], 0) == [
        {"num_cpus": 4},
        {"num_cpus": 4},
        {"num_cpus": 2},
    ]
    assert shares([{"CPU": 3.0}], 1) == [{"num_cpus": 1}] * 3
    assert shares([{"CPU": 16.0, "GPU": 2.0}], 0) == [{"num_cpus": 4, "num_gpus": 1}] * 2
    assert shares([{"CPU": 2.0, "GPU": 4.0}], 0) == [{"num_cpus": 1, "num_gpus": 1}] * 2


def test_a_file_that_a_worker_does_not_see_says_where(tmp_path: Path) -> None:
    file = Found("a.txt", tmp_path / "a.txt", tmp_path)
    row = row_of(file, None, None, LIMITS, 0)
    done = ray_ingest._Done(row, [], ("unreadable", "No such file or directory"), "machine-7")
    gone = ray_ingest._read(file, done)
    assert gone.error is not None
    assert gone.error.detail == "No such file or directory"
    file.path.touch()
    seen = ray_ingest._read(file, done)
    assert seen.error is not None
    assert seen.error.detail.startswith("machine-7 does not have it: ")
    assert seen.row(0).error == str(seen.error)


# -- all of it, with a model


@pytest.mark.slow
def test_the_command_gives_the_same_collection_on_a_ray_of_its_own(embedder: Path, docs: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "L2M_EMBEDDER": str(embedder), "L2M_THREADS": "1", "L2M_CHUNK_SIZE": "16"}
    environment |= {"L2M_CHUNK_OVERLAP": "0"}
    reports = []
    for name, options in (("one", []), ("many", ["--ray", "local"])):
        command = [sys.executable, "-m", "l2m_rag.cli", "--home", str(tmp_path / "home"), "ingest", str(docs)]
        ran = subprocess.run(
            [*command, "-c", name, "--json", *options], capture_output=True, text=True, check=False, env=environment
        )
        assert ran.returncode == 3, ran.stderr
        reports.append({**json.loads(ran.stdout), "collection": "", "seconds": 0})
        told = [line for line in ran.stderr.splitlines() if "waiting for a free worker" not in line]  # a busy machine
        assert told == []
    assert reports[0] == reports[1]
    settings = Settings(home=tmp_path / "home", embedder=str(embedder))
    one, many = (library.open(name, settings=settings).tier() for name in ("one", "many"))
    model = models.load_embedder(settings)
    assert content(one, model) == content(many, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own data library
def test_the_tables_can_be_read_by_lance_ray(
    cluster: str, tiers: tuple[LongTermTier, LongTermTier], docs: Path
) -> None:
    lance_ray = pytest.importorskip("lance_ray")
    import ray

    run_on(cluster, tiers[1], docs)
    ray.init(cluster, log_to_driver=False)
    try:
        rows = lance_ray.read_lance(str(tiers[1].folder / "tables" / "chunks.lance"), columns=["id", "text"])
        assert {row["id"]: row["text"] for row in rows.take_all()} == {
            chunk.id: chunk.text for chunk in tiers[1].store.fetch(tiers[1].store.row_ids().tolist())
        }
    finally:
        ray.shutdown()
