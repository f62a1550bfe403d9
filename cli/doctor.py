"""`l2m doctor`: checks that do the thing they report on, rather than look whether it might work."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import Json, collection_names, is_quiet, settings_of
from l2m_rag.errors import L2MError

if TYPE_CHECKING:
    from l2m_rag.config import Settings

PYTHON = (3, 11)
FREE_DISK = 1 << 30
"""Bytes below which the disk is reported: weights alone take 350 MB."""


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    Args:
        name: what was checked.
        ok: whether it holds.
        detail: what was found; when it failed also what to do.
        seconds: how long it took.
    """

    name: str
    ok: bool
    detail: str
    seconds: float


class _FailedCheckError(Exception):
    """A check that does not hold; its text is the detail."""


def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Check that this installation works, by using it.

    Examples:
      l2m doctor
      l2m doctor --json

    Exit code 1 when a check fails. It writes only into a temporary folder inside the home folder, and
    downloads nothing.
    """
    settings = settings_of(ctx)
    checks = []
    for name, look in _checks(settings):
        check = _run(name, look)
        checks.append(check)
        if not as_json and not (check.ok and is_quiet(ctx)):
            output.say(f"{'ok    ' if check.ok else 'FAILED'}  {name:<24} {check.detail} ({check.seconds:.1f} s)")
    failed = [check.name for check in checks if not check.ok]
    if as_json:
        output.say_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        raise L2MError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _run(name: str, look: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        ok, detail = True, look()
    except Exception as error:  # whatever breaks a part is what this command is there to report
        ok, detail = (
            False,
            str(error) if isinstance(error, L2MError | _FailedCheckError) else f"{type(error).__name__}: {error}",
        )
    return Check(name, ok, output.one_line(detail), round(time.perf_counter() - start, 3))


def _checks(settings: Settings) -> list[tuple[str, Callable[[], str]]]:
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("home", lambda: _home(settings)),
        ("disk", lambda: _disk(settings)),
        ("torch", _torch),
        ("faiss", _faiss),
        ("store and index", lambda: _store(settings)),
    ]
    for name in _default_weights(settings):
        checks.append((f"weights {name}", lambda name=name: _weights(name, settings)))  # type: ignore[misc]
    checks.append(("embedding", lambda: _embedding(settings)))
    for name in collection_names(settings.home):
        checks.append((f"collection {name}", lambda name=name: _collection(name, settings)))  # type: ignore[misc]
    return checks


def _python() -> str:
    if sys.version_info < PYTHON:
        raise _FailedCheckError(f"{platform.python_version()}; l2m needs {'.'.join(map(str, PYTHON))} or newer")
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _home(settings: Settings) -> str:
    from l2m_rag.memory_tiers.places import place_of

    payload = os.urandom(4096)
    if not isinstance(settings.home, Path):
        place = place_of(settings.home)
        place.write_json(".doctor/probe.json", payload.hex())
        if json.loads(place.read(".doctor/probe.json")) != payload.hex():
            raise _FailedCheckError(f"{settings.home} does not give back what was written to it")
        place.clear(".doctor")
        return f"{settings.home} can be written"
    settings.home.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=settings.home, prefix=".doctor-") as probe:
        probe.write(payload)
        probe.flush()
        os.fsync(probe.fileno())
        if Path(probe.name).read_bytes() != payload:
            raise _FailedCheckError(f"{settings.home} does not give back what was written to it")
    return f"{settings.home} can be written"


def _disk(settings: Settings) -> str:
    free = shutil.disk_usage(_nearest_folder(settings.data)).free
    if free < FREE_DISK:
        raise _FailedCheckError(
            f"only {output.size(free)} free at {settings.data}; free some space or choose another --home"
        )
    return f"{output.size(free)} free"


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _torch() -> str:
    import torch

    from l2m_rag.indexers.embedding import computes_bf16

    # One product that is known: a build for another CPU fails here rather than in an answer.
    found = float((torch.ones(64, 64) @ torch.full((64, 64), 0.5)).sum())
    if found != 64 * 64 * 32:
        raise _FailedCheckError(f"torch {torch.__version__} multiplies wrongly: {found} instead of {64 * 64 * 32}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    bf16 = "native bf16" if computes_bf16() else "no native bf16, so float32 is used"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {bf16}, {gpu}"


def _faiss() -> str:
    from l2m_rag.memory_tiers.nearest import installed_faiss, loaded_faiss

    installed = installed_faiss()
    if len(installed) > 1:
        wanted = next(package for package in installed if package != "faiss-cpu")
        raise _FailedCheckError(
            f"{' and '.join(installed)} are installed and write over each other's files; keep one of them: "
            f"pip uninstall {' '.join(installed)}, then pip install --no-deps {wanted}"
        )
    return loaded_faiss()


def _store(settings: Settings) -> str:
    """Write three chunks into a new LanceDB table, reads them back and finds the right one through FAISS."""
    import numpy as np

    from l2m_rag.memory_tiers.hot_index import open_hot_index
    from l2m_rag.memory_tiers.lance_store import LanceStore
    from l2m_rag.memory_tiers.records import Chunk

    settings.data.mkdir(parents=True, exist_ok=True)
    chunks = [Chunk(f"{i:032x}", "probe", i, None, "", i, i + 1, text) for i, text in enumerate("abc")]
    vectors = np.eye(3, 8, dtype=np.float32)
    with tempfile.TemporaryDirectory(dir=settings.data, prefix=".doctor-") as folder:
        LanceStore(Path(folder) / "tables", 8, create=True).add_chunks(chunks, vectors)
        store = LanceStore(Path(folder) / "tables", 8)
        if store.damaged() or store.count_chunks() != len(chunks):
            raise _FailedCheckError("LanceDB does not give back the rows that were written")
        index = open_hot_index(Path(folder) / "hot", store, "doctor")
        rows, scores = index.search(vectors[1], 1)
        found = store.fetch(rows.tolist())
        if [chunk.text for chunk in found] != ["b"] or abs(float(scores[0]) - 1) > 1e-3:
            raise _FailedCheckError(f"FAISS finds {[chunk.text for chunk in found]} in place of ['b']")
    return "rows written, read and found"


def _default_weights(settings: Settings) -> list[str]:
    from l2m_rag import weights

    names = [weights.DEFAULT_EMBEDDER] if settings.embedder == "default" else []
    if settings.model == "default" and not settings.llm_url:
        names.append(weights.DEFAULT_DECODER)
    return names


def _weights(name: str, settings: Settings) -> str:
    from l2m_rag.weights import verify

    status = verify(name, settings)
    if status.state == "missing":
        raise _FailedCheckError(f"not there; run: l2m models pull {name}")
    if status.state != "present":
        raise _FailedCheckError(status.detail)
    return f"{output.size(status.bytes)}, SHA-256 as pinned"


def _embedding(settings: Settings) -> str:
    """Embed three sentences: unit length, and the two that belong together must be closer."""
    import numpy as np

    from l2m_rag.indexers.embedding import Embedder
    from l2m_rag.weights import DEFAULT_EMBEDDER, RECEIPT, model_folder

    source: Path | str = settings.embedder
    if source == "default":
        source = model_folder(DEFAULT_EMBEDDER, settings)
        if not (source / RECEIPT).is_file():  # a check must not start a download
            raise _FailedCheckError(f"there are no weights; run: l2m models pull {DEFAULT_EMBEDDER}")
    embedder = Embedder(source, name=settings.embedder, threads=settings.threads)
    texts = [
        "The cat sleeps on the sofa.",
        "A kitten is napping on the couch.",
        "Interest rates rose in March.",
    ]
    vectors = np.asarray(embedder.encode(texts), dtype=np.float32)  # (3, E)
    norms = np.linalg.norm(vectors, axis=1)
    if not np.allclose(norms, 1, atol=1e-3):
        raise _FailedCheckError(f"the vectors' lengths are {norms.tolist()} in place of 1")
    related, unrelated = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    if related < unrelated + 0.1:
        raise _FailedCheckError(f"cosine {related:.2f} for related sentences and {unrelated:.2f} for unrelated ones")
    return f"{vectors.shape[1]} dimensions, cosine {related:.2f} (related) and {unrelated:.2f} (unrelated)"


def _collection(name: str, settings: Settings) -> str:
    import l2m_rag.collection

    report = l2m_rag.collection.open(name, settings=settings).verify()
    if not report.ok:
        raise _FailedCheckError(f"{'; '.join(report.problems)}; run: l2m collections repair {name}")
    return f"{report.documents:,} documents, {report.chunks:,} chunks"
