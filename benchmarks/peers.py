"""l2m-rag beside what a user would pick instead, on the same files, model and threads, in the same run.

Each system runs in a fresh process: one warm-up document, then it reads, splits, embeds and persists a folder, opens
what it wrote and answers questions. The limit for all of them is sentence-transformers' own `encode` of l2m-rag's
chunks. How to run it, what is compared and what is not: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from peer_systems import CHUNK, OVERLAP, SUFFIXES, SYSTEMS, TOP, Search, System, Tokens, files_below

ROOT = Path(__file__).resolve().parents[1]
# fmt: off
DISTRIBUTIONS = [
    "l2m-rag", "torch", "sentence-transformers", "transformers", "tokenizers", "numpy", "faiss-cpu", "lancedb",
    "langchain-core", "langchain-classic", "langchain-community", "langchain-text-splitters", "llama-index-core",
    "txtai", "chonkie", "chromadb",
]
# fmt: on
WARM_UP = "The lighthouse keeper wrote the hour, the wind and the names of passing ships into his book. " * 12
COLUMNS = {  # heading -> name in the result, format
    "dtype": ("dtype", "s"),
    "start s": ("start_s", ".1f"),
    "ingest s": ("ingest_s", ".2f"),
    "docs/s": ("documents_per_s", ".1f"),
    "chunks": ("chunks", ".0f"),
    "tokens": ("tokens", ".0f"),
    "tokens/s": ("tokens_per_s", ".0f"),
    "x encode": ("ratio_to_encode", ".2f"),
    "RSS MB": ("peak_rss_mb", ".0f"),
    "disk MB": ("disk_mb", ".1f"),
    "open s": ("open_s", ".2f"),
    "p50 ms": ("search_p50_ms", ".1f"),
    "p95 ms": ("search_p95_ms", ".1f"),
    "R@1": ("recall_at_1", ".3f"),
    "R@5": ("recall_at_5", ".3f"),
    "again s": ("again_s", ".2f"),
}

Result = dict[str, Any]


# -- one system, in its own process ------------------------------------------------------------------------------------
def measure(name: str, task: Path) -> Result:
    """Run one system.

    Args:
        name: of the system.
        task: JSON file with folder, model, threads, and questions as pairs of a text and a file below the folder (or
            None).
    """
    asked = json.loads(task.read_text())
    folder, model = Path(asked["folder"]), Path(asked["model"])
    began = time.perf_counter()
    system = SYSTEMS[name](model, asked["threads"])
    warm = task.parent / "warm"
    warm.mkdir()
    (warm / "warm.txt").write_text(WARM_UP)
    ingest(system, warm, task.parent / "warm-store")
    result: Result = {"system": name, "dtype": system.dtype, "start_s": time.perf_counter() - began}

    store = task.parent / "store"
    with PeakMemory() as memory:
        seconds = ingest(system, folder, store)
    counts = [len(spans) for spans in Tokens(model).spans(system.chunks(store))]
    documents = len(files_below(folder))
    result |= {
        "ingest_s": seconds,
        "documents": documents,
        "documents_per_s": documents / seconds,
        "chunks": len(counts),
        "chunks_per_s": len(counts) / seconds,
        "tokens": sum(counts),
        "tokens_per_s": sum(counts) / seconds,
        "longest_chunk": max(counts),
        "chunks_over_limit": sum(count > CHUNK for count in counts),
        "peak_rss_mb": memory.bytes / 1e6,
        "disk_mb": sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 1e6,
        "torch_threads": __import__("torch").get_num_threads(),
    }
    if system.open:
        began = time.perf_counter()
        search = system.open(store)
        search("What stands in the book of the keeper?")
        result["open_s"] = time.perf_counter() - began
        result |= ask(search, asked["questions"], folder)
    if system.again:
        began = time.perf_counter()
        system.again(folder, store)
        result["again_s"] = time.perf_counter() - began
    return result


def ingest(system: System, folder: Path, store: Path) -> float:
    store.mkdir()
    if system.prepare:
        system.prepare(folder)
    began = time.perf_counter()
    system.ingest(folder, store)
    return time.perf_counter() - began


def ask(search: Search, questions: list[tuple[str, str | None]], folder: Path) -> Result:
    times, ranks = [], []
    for question, gold in questions:
        began = time.perf_counter()
        found = search(question)
        times.append(1000 * (time.perf_counter() - began))
        names = [str(folder / name) for name in found]  # an absolute name stays what it is
        if gold:
            ranks.append(names.index(str(folder / gold)) if str(folder / gold) in names else TOP)
    return {
        "questions": len(questions),
        "search_p50_ms": median(times),
        "search_p95_ms": quantiles(times, n=20)[-1],
        "recall_at_1": sum(rank < 1 for rank in ranks) / len(ranks) if ranks else None,
        "recall_at_5": sum(rank < TOP for rank in ranks) / len(ranks) if ranks else None,
    }


class PeakMemory:
    """Peak resident memory of this process and its children together, while the block runs.

    `ru_maxrss` of a child starts at its parent's value (execve keeps it), so children are looked at every 50 ms.
    """

    def __enter__(self) -> PeakMemory:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            children = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
            self.bytes = max(self.bytes, sum(map(resident, ["self", *children])))


def resident(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # it has just ended
        return 0


# -- documents and questions -------------------------------------------------------------------------------------------
def lines(path: Path) -> list[Result]:
    import pyarrow as pa

    with pa.input_stream(str(path), compression="zstd") as stream:
        return [json.loads(line) for line in stream.read().split(b"\n") if line]


def write_wiki(data: Path, folder: Path, limit: int, n_questions: int) -> list[tuple[str, str | None]]:
    """Write one file a paragraph, those with questions first, and give questions spread evenly over them."""
    asked = lines(data / "squad_subset/xquad_en.jsonl.zst")
    more = lines(data / "squad_subset/squad2_small.jsonl.zst")
    passages = [row for name in ("2wiki", "hotpot") for row in lines(data / f"wiki_passages/{name}_corpus.jsonl.zst")]
    texts = dict.fromkeys([row["context"] for row in asked + more] + [row["text"] for row in passages])
    names = {text: f"{number:05}.txt" for number, text in enumerate(list(texts)[:limit])}
    for text, name in names.items():
        (folder / name).write_text(text, encoding="utf-8")
    usable = [(row["question"], names[row["context"]]) for row in asked if row["context"] in names]
    n = min(n_questions, len(usable))
    return [usable[i * len(usable) // n] for i in range(n)]


def copy_files(source: Path, folder: Path, limit: int | None) -> None:
    """Copy the files that every system can read: .txt and .md in UTF-8, not blank, not hidden."""
    visible = [path for path in files_below(source) if not re.search(r"(^|/)\.", str(path.relative_to(source)))]
    for path in visible[:limit]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


# -- all of them -------------------------------------------------------------------------------------------------------
def run(name: str, task: Result, work: Path) -> Result:
    """Measure a system in a process of its own, in an empty folder."""
    scratch = work / "run"
    scratch.mkdir()
    (scratch / "task.json").write_text(json.dumps(task))
    threads = str(task["threads"])
    settings = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
        "CUDA_VISIBLE_DEVICES": "",  # Chroma's function would stay on the CPU, and the others would not
    }
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--task", str(scratch / "task.json")]
    load = os.getloadavg()[0]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    shutil.rmtree(scratch)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"system": name, "error": done.stderr.strip().split("\n")[-1]}
    return {**json.loads(done.stdout.strip().split("\n")[-1]), "load_before": load}


def add_ratios(results: list[Result]) -> None:
    """Compare the tokens a second of each system with those of `encode`, which ran in the same round."""
    done = {result["system"]: result for result in results if "error" not in result}
    for name, result in done.items():
        if "encode" in done:
            result["ratio_to_encode"] = result["tokens_per_s"] / done["encode"]["tokens_per_s"]
            if name.startswith("l2m") and result["tokens"] != done["encode"]["tokens"]:
                print(f"NOTE: encode got other chunks than {name}; compare tokens/s only", file=sys.stderr)


def medians(rounds: list[list[Result]], name: str) -> Result:
    results = [result for round_ in rounds for result in round_ if result["system"] == name and "error" not in result]
    if not results:
        return {"system": name, "error": next(r["error"] for r in rounds[-1] if r["system"] == name)}
    numbers = {key: [r[key] for r in results] for key, value in results[0].items() if isinstance(value, int | float)}
    return {**results[0], **{key: median(values) for key, values in numbers.items()}}


def table(summary: list[Result]) -> str:
    rows = [["system", *COLUMNS]]
    for result in summary:
        cells = [(result.get(key), form) for key, form in COLUMNS.values()]
        rows.append([result["system"], *("-" if value is None else format(value, form) for value, form in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(text + [f"{r['system']}: {r['error']}" for r in summary if "error" in r])


def machine() -> Result:
    installed = {found.name for found in metadata.distributions()}
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in DISTRIBUTIONS if name in installed},
    }


def compare(options: argparse.Namespace) -> None:
    from l2m_rag.config import load_settings
    from l2m_rag.weights import DEFAULT_EMBEDDER, find

    model = find(DEFAULT_EMBEDDER, load_settings()[0])
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.scratch) as scratch:
        work = Path(scratch).resolve()
        folder = work / "documents"
        folder.mkdir()
        limit = options.documents if options.documents or options.folder else 1500
        questions = write_wiki(options.data, folder, 1500 if options.folder else limit, options.questions)
        if options.folder:
            shutil.rmtree(folder)
            folder.mkdir()
            copy_files(options.folder, folder, limit)
            questions = [(question, None) for question, _ in questions]  # they are asked for their time only
        task = {"folder": str(folder), "model": str(model), "threads": options.threads, "questions": questions}
        rounds: list[list[Result]] = []
        for number in range(options.rounds):
            rounds.append([])
            for name in options.systems:
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                rounds[-1].append(run(name, task, work))
            add_ratios(rounds[-1])
    summary = [medians(rounds, name) for name in options.systems]
    print(table(summary))
    report = {
        "machine": machine(),
        "threads": options.threads,
        "corpus": str(options.folder or "wiki"),
        "chunk_tokens": CHUNK,
        "overlap": OVERLAP,
        "median": summary,
        "rounds": rounds,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare l2m-rag with other libraries; see benchmarks/README.md.")
    parser.add_argument("--documents", type=int, help="first N documents (default 1500; all with --folder)")
    parser.add_argument(
        "--folder", type=Path, help=f"a folder of your own; its {' and '.join(SUFFIXES)} files are read"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each system runs, in turn")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS), help="comma-separated")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of every system")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--scratch", type=Path, help="where the documents and indexes are written for the time being")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.systems) - set(SYSTEMS):
        parser.error(f"no system named {', '.join(sorted(unknown))}; known: {', '.join(SYSTEMS)}")
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.one, options.task)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
