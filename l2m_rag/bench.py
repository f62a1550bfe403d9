"""Speed, measured: ingest, search and first token, each beside its limit in the same run.

Every figure that is promised is a ratio or a difference inside one run: machines differ, and so do their neighbours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l2m_rag.collection import Collection
from l2m_rag.errors import L2MError, UsageError
from l2m_rag.memory_tiers.hot_index import HotIndex
from l2m_rag.memory_tiers.lance_store import LanceStore, Vectors
from l2m_rag.memory_tiers.records import Chunk
from l2m_rag.models import load_embedder, load_language_model

if TYPE_CHECKING:
    from l2m_rag.config import Settings

Told = Callable[[str], object]
"""Called with a few words on what is being measured now."""

_WORDS_PER_CHUNK = 120
_ROWS_PER_DOCUMENT = 20
_TOPICS = 200
_STOP_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "is",
    "was",
    "for",
    "it",
    "with",
    "as",
    "on",
    "be",
    "at",
    "by",
)


def write_corpus(folder: Path, texts: Sequence[str]) -> None:
    """Write each text as a file of its own, 1,000 a folder."""
    for number, text in enumerate(texts):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")


def made_texts(count: int, words: int = _WORDS_PER_CHUNK, seed: int = 0) -> list[str]:
    """Make texts of made-up words, as often as words of a language are (Zipf), in sentences."""
    draw = np.random.default_rng(seed)
    syllables = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ra", "se", "ti", "vo", "wa", "xu", "zi"]
    made = ["".join(draw.choice(syllables, 2 + number % 3)) for number in range(20_000)]
    vocabulary = np.array([*_STOP_WORDS, *made])  # the most frequent words of a text are those that search leaves out
    weight = 1 / np.arange(1, len(vocabulary) + 1)
    texts = []
    for number in range(count):
        drawn = vocabulary[draw.choice(len(vocabulary), words, p=weight / weight.sum())]
        sentences = [" ".join(drawn[start : start + 12]).capitalize() + "." for start in range(0, words, 12)]
        texts.append(f"{number}. " + " ".join(sentences))
    return texts


# -- ingest ------------------------------------------------------------------------------------------------------------
def ingest(folder: Path, settings: Settings, *, rounds: int = 3, told: Told = lambda text: None) -> dict[str, Any]:
    """Measure the ingest of a folder beside the embedder's own fp32 `encode` of the same chunks.

    Each runs in a process of its own, in turn, `rounds` times; loading the model does not count on either side.

    Args:
        folder: of documents.
        settings: whose embedder, chunk size and workers are used; its home is not touched.
        rounds: the median of so many is given.
        told: called with what is being done.
    """
    runs: dict[str, list[dict[str, Any]]] = {"ingest": [], "encode": [], "again": []}
    with tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch:
        for number in range(rounds):
            home = Path(scratch) / f"home-{number}"
            for what in runs:
                told(f"round {number + 1} of {rounds}: {what}")
                runs[what].append(_in_process(what, folder, settings, home))
            shutil.rmtree(home)
    middle = {what: _median_run(found) for what, found in runs.items()}
    chunks = middle["ingest"]["chunks"]
    return {
        "documents": middle["ingest"]["documents"],
        "failed": middle["ingest"]["failed"],
        "chunks": chunks,
        "tokens": middle["encode"]["tokens"],
        "encode_fp32_chunks_per_s": round(chunks / middle["encode"]["seconds"], 1),
        "ingest_chunks_per_s": round(chunks / middle["ingest"]["seconds"], 1),
        "ratio": round(
            statistics.median(e["seconds"] / i["seconds"] for i, e in zip(runs["ingest"], runs["encode"], strict=True)),
            2,
        ),
        "lowest_cosine": middle["encode"]["lowest_cosine"],
        "peak_rss_mb": middle["ingest"]["peak_rss_mb"],
        "disk_mb": middle["ingest"]["disk_mb"],
        "again_seconds": middle["again"]["seconds"],
        "again_embedded": middle["again"]["embedded"],
        "rounds": rounds,
    }


def _median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def _in_process(what: str, folder: Path, settings: Settings, home: Path) -> dict[str, Any]:
    """Run one measurement in a fresh process: memory is its own, and no cache is warm."""
    task = {
        "what": what,
        "folder": str(folder),
        "home": str(home),
        "models": str(settings.models or settings.data / "models"),
        "embedder": settings.embedder,
        "chunk_size": settings.chunk_size,
        "chunk_overlap": settings.chunk_overlap,
        "workers": settings.workers,
        "threads": settings.threads,
    }
    ran = subprocess.run(
        [sys.executable, "-c", "from l2m_rag.bench import measure; measure()", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        raise L2MError(f"the measurement {what!r} failed: {last}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def measure() -> None:
    """Run one measurement in this process and print it as JSON; the other side of `_in_process`."""
    import resource

    from l2m_rag.config import load_settings

    task = json.loads(sys.argv[1])
    what, folder = task.pop("what"), Path(task.pop("folder"))
    settings = load_settings(task, environ={})[0]
    collection = Collection("bench", settings.data / "bench", settings)
    found = {"ingest": _measure_ingest, "again": _measure_again, "encode": _measure_encode}[what](collection, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({**found, "peak_rss_mb": round(peak)}) + "\n")


def _measure_ingest(collection: Collection, folder: Path) -> dict[str, Any]:
    load_embedder(collection.settings).encode(["warm up"])
    began = time.perf_counter()
    report = collection.ingest(folder)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "documents": report.added,
        "failed": len(report.failed),
        "chunks": report.chunks,
        "disk_mb": round(collection.info().bytes / 1e6, 1),
    }


def _measure_again(collection: Collection, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    report = collection.ingest(folder)
    return {"seconds": round(time.perf_counter() - began, 2), "embedded": report.chunks}


def _measure_encode(collection: Collection, folder: Path) -> dict[str, Any]:
    """Embed the chunks that an ingest has stored with sentence-transformers' own `encode`, in fp32."""
    from sentence_transformers import SentenceTransformer

    ours = load_embedder(collection.settings)
    texts: list[str] = []
    vectors = []
    store = collection.tier().store
    for ids, batch in store.all_vectors():
        texts += [chunk.text for chunk in store.fetch(ids.tolist())]
        vectors.append(batch)
    model: Any = SentenceTransformer(ours.source, device="cpu")
    model.encode(["warm up"])
    began = time.perf_counter()
    found = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    seconds = time.perf_counter() - began
    cosines = (np.concatenate(vectors) * found).sum(axis=1)
    tokens = sum(map(len, ours.spans(texts)))
    return {"seconds": seconds, "tokens": tokens, "lowest_cosine": round(float(cosines.min()), 5)}


# -- search ------------------------------------------------------------------------------------------------------------
def search(rows: int, settings: Settings, *, questions: int = 200, told: Told = lambda text: None) -> dict[str, Any]:
    """Measure searches over a store of `rows` chunks with made vectors.

    Vectors are made (spectrum i^-0.9, topics of about 20 rows, as sentence embeddings have it), and so are texts. What
    is timed in turn: the embedding of the question, hybrid search (embedding included), dense and full-text search (of
    a given vector). `bench_tier` has the hot index beside raw FAISS.
    """
    if rows < 1000:
        raise UsageError(f"--rows ({rows}) must be at least 1,000")
    from l2m_rag.memory_tiers.long_term import Manifest, create_tier

    model = load_embedder(settings)
    with tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch:
        manifest = Manifest(embedder="bench", fingerprint="bench", dimension=model.dimension, created_at=time.time())
        tier = create_tier(Path(scratch) / "bench", manifest)
        told(f"writing {rows:,} chunks")
        vectors = made_vectors(rows, model.dimension)
        texts = made_texts(rows)
        began = time.perf_counter()
        _fill(tier.store, texts, vectors)
        wrote = time.perf_counter() - began
        told("building the indexes")
        began = time.perf_counter()
        tier.store.index_text(0)
        hot = tier.hot_index()
        built = time.perf_counter() - began
        told("searching")
        queries = query_vectors(rows, questions, model.dimension)
        words = [" ".join(texts[number % len(texts)].split()[3:11]) for number in range(0, 37 * questions, 37)]
        ways: dict[str, Callable[[str, Vectors], object]] = {
            "embed": lambda question, vector: model.encode([question]),
            "hybrid": lambda question, vector: tier.search(question, model.encode([question])[0], 10),
            "dense": lambda question, vector: tier.search(question, vector, 10, mode="dense"),
            "text": lambda question, vector: tier.search(question, None, 10, mode="text"),
        }
        times = take_turns(ways, zip(words, queries, strict=True))
        recall = _recall(hot, queries)
    middle = {name: round(statistics.median(found), 3) for name, found in times.items()}
    return {
        "rows": rows,
        "write_s": round(wrote, 1),
        "index_s": round(built, 1),
        **{f"{name}_p50_ms": value for name, value in middle.items()},
        "hybrid_above_embed_ms": round(middle["hybrid"] - middle["embed"], 3),
        "hybrid_p95_ms": round(float(np.percentile(times["hybrid"], 95)), 3),
        "hot_recall_10": recall,
        "index": "exact fp16" if hot.exact else "IVF, 8 bit, exact re-rank",
    }


def take_turns(ways: dict[str, Callable[..., object]], questions: Iterable[tuple[Any, ...]]) -> dict[str, list[float]]:
    """Time each way on each question, in milliseconds; the order turns, as what comes later finds warm caches."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number, question in enumerate(questions):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(ways[name], *question))
    return times


def timed(way: Callable[..., object], *question: Any) -> float:
    """Give how long a call takes, in milliseconds."""
    began = time.perf_counter()
    way(*question)
    return (time.perf_counter() - began) * 1000


def made_vectors(rows: int, dimension: int, seed: int = 0) -> Vectors:
    """Make (rows, dimension) float32 unit vectors with the spectrum of sentence embeddings."""
    draw = np.random.default_rng(seed)
    number = np.arange(rows)
    return _unit(_documents(rows, dimension)[number // _ROWS_PER_DOCUMENT] + _noise(draw, rows, dimension))


def query_vectors(rows: int, count: int, dimension: int) -> Vectors:
    """Make vectors of chunks that might have stood in the documents of `made_vectors`."""
    draw = np.random.default_rng(1)
    documents = _documents(rows, dimension)
    return _unit(documents[draw.choice(len(documents), count)] + _noise(draw, count, dimension))


def _documents(rows: int, dimension: int) -> Vectors:
    draw = np.random.default_rng(2)
    topics = _noise(draw, _TOPICS, dimension)
    count = rows // _ROWS_PER_DOCUMENT + 1
    return np.asarray(topics[draw.integers(_TOPICS, size=count)] + _noise(draw, count, dimension), dtype=np.float32)


def _noise(draw: np.random.Generator, count: int, dimension: int) -> Vectors:
    """Draw vectors whose spectrum falls as i^-0.9."""
    spread = np.arange(1, dimension + 1, dtype=np.float32) ** -0.45  # an amplitude: half the exponent of the power
    return draw.standard_normal((count, dimension), dtype=np.float32) * spread


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def _fill(store: LanceStore, texts: Sequence[str], vectors: Vectors) -> None:
    for start in range(0, len(vectors), 10_000):
        part = vectors[start : start + 10_000]
        chunks = [
            Chunk(
                id=hashlib.sha256(str(start + at).encode()).hexdigest()[:32],
                document=f"{(start + at) // _ROWS_PER_DOCUMENT}.txt",
                ordinal=(start + at) % _ROWS_PER_DOCUMENT,
                page=None,
                heading="",
                start=0,
                end=len(texts[(start + at) % len(texts)]),
                text=texts[(start + at) % len(texts)],
            )
            for at in range(len(part))
        ]
        store.add_chunks(chunks, part)


def _recall(hot: HotIndex, queries: Vectors) -> float:
    """Give the share of the true ten nearest rows that the hot index finds."""
    vectors = hot.rows.vectors.astype(np.float32)
    found = 0
    for query in queries:
        truth = set(hot.rows.ids[np.argsort(-(vectors @ query), kind="stable")[:10]].tolist())
        found += len(truth & set(hot.search(query, 10)[0].tolist()))
    return round(found / (10 * len(queries)), 4)


# -- first token -------------------------------------------------------------------------------------------------------
def first_token(
    settings: Settings, *, tokens: int = 2000, rounds: int = 5, told: Told = lambda text: None
) -> dict[str, Any]:
    """Measure how soon the first token of an answer is there, by how its evidence enters the model.

    All ways read the same passages and question with the same weights, in turn; medians. "text" is one sequence through
    all layers, "first_use" encodes each passage and reads its states, the others read states that are kept.
    """
    import torch

    from l2m_rag.reader import MemoryReader
    from l2m_rag.reading import QUESTION

    reader = load_language_model(settings)
    if not isinstance(reader, MemoryReader):
        raise UsageError("states are read by a memory model only; leave out --model and --llm-url")
    question = "Which of these was said of the second one?"
    texts = [reader.cut(text, 250) for text in made_texts(-(-tokens // 250), 400)]
    backbone = reader.model.backbone
    whole = torch.tensor(
        [[*(one for text in texts for one in reader.ids(text)), *reader.ids(QUESTION.format(question))]]
    )
    whole = whole.to(reader.device)

    def as_text() -> None:
        with torch.inference_mode():
            x = backbone.lower(whole)
            top = backbone.upper(x, torch.arange(whole.shape[1], device=whole.device)[None])
            backbone.head(top[:, -1:]).argmax().item()

    def as_states(ratio: int, *, kept: bool = True) -> None:
        if not kept:
            reader.forget()
        reader.prefill(question, texts, ratios=[ratio] * len(texts)).first.argmax().item()

    ways: dict[str, Callable[[], None]] = {
        "text": as_text,
        "first_use": lambda: as_states(1, kept=False),
        "states_1": lambda: as_states(1),
        "states_4": lambda: as_states(4),
        "states_16": lambda: as_states(16),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        told(f"round {number} of {rounds}" if number else "warming up")
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                spent[name].append((time.perf_counter() - began) * 1000)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return {
        "evidence_tokens": sum(map(reader.count, texts)),
        **{f"{name}_ms": round(value, 1) for name, value in medians.items()},
        **{f"{name}_sooner": round(medians["text"] / value, 2) for name, value in medians.items() if name != "text"},
    }


def filled(collection: Collection, folder: Path, rows: int, *, told: Told = lambda text: None) -> None:
    """Put the documents of a folder into a new collection, and made-up chunks up to `rows` beside them."""
    told("ingesting the documents")
    collection.ingest(folder)
    tier = collection.tier()
    told(f"writing {rows:,} chunks")
    _fill(tier.store, made_texts(rows), made_vectors(rows, load_embedder(collection.settings).dimension))
    told("building the indexes")
    tier.store.index_text(0)


def ask(collection: Collection, questions: Sequence[str], *, told: Told = lambda text: None) -> dict[str, Any]:
    """Measure the time to the first token of answers once the models are loaded.

    A memory model is asked twice: with no states of passages kept, and with those that the first time left.
    """
    from l2m_rag.reader import MemoryReader

    quiet = Collection(collection.name, collection.path, replace(collection.settings, abstain_below=0.0))
    told("loading the models")
    quiet.ask(questions[0])
    reader = load_language_model(collection.settings)
    times: dict[str, list[float]] = {}
    positions = []
    for number, question in enumerate(questions, 1):
        told(f"question {number} of {len(questions)}")
        if isinstance(reader, MemoryReader):
            reader.forget()
            _timed(times, "first_use_", quiet.ask(question).timings)
        answer = quiet.ask(question)
        _timed(times, "", answer.timings)
        positions.append(answer.tokens["positions"])
    return {
        "questions": len(questions),
        **{f"{name}_p50_ms": round(statistics.median(found), 1) for name, found in times.items()},
        **{f"{name}_p95_ms": round(float(np.percentile(found, 95)), 1) for name, found in times.items()},
        "positions_p50": statistics.median(positions),
    }


def _timed(times: dict[str, list[float]], prefix: str, found: dict[str, float]) -> None:
    for name in ("first_token", "total"):
        times.setdefault(prefix + name, []).append(found[f"{name}_ms"])
