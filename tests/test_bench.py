"""Benchmarks and evaluations as commands: they run, they count right, and their JSON keeps its fields."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from l2m_rag import bench, bench_faults
from l2m_rag.cli.main import app
from l2m_rag.config import Settings
from l2m_rag.memory_tiers import nearest

Run = Callable[..., Result]


@pytest.fixture
def l2m(tmp_path: Path, embedder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command over a small embedder in a home of the test."""
    monkeypatch.setenv("L2M_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("L2M_EMBEDDER", str(embedder))
    monkeypatch.setenv("L2M_CHUNK_SIZE", "64")
    monkeypatch.setenv("L2M_CHUNK_OVERLAP", "8")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, list(args), prog_name="l2m")

    return run


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_bench_ingest_counts_what_it_times(l2m: Run, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for number in range(5):
        (tmp_path / "docs" / f"{number}.txt").write_text(f"Document {number} is about the lease.")
    value = found(l2m("--quiet", "bench", "ingest", "--folder", "docs", "--rounds", "1", "--json"))
    assert (value["documents"], value["failed"], value["chunks"], value["again_embedded"]) == (5, 0, 5, 0)
    assert value["lowest_cosine"] > 0.99
    assert value["ratio"] == pytest.approx(
        value["ingest_chunks_per_s"] / value["encode_fp32_chunks_per_s"], rel=0.05, abs=0.01
    )
    assert not (tmp_path / "home" / "bench").exists()


def test_bench_ingest_of_a_folder_that_cannot_be_measured_is_one_line(l2m: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = l2m("--quiet", "bench", "ingest", "--folder", "empty", "--rounds", "1")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_bench_search_measures_each_way_and_finds_the_nearest(embedder: Path, tmp_path: Path) -> None:
    value = bench.search(1000, Settings(home=tmp_path, embedder=str(embedder)), questions=10)
    assert value["rows"] == 1000
    assert value["hot_recall_10"] == 1.0
    assert value["index"] == "exact fp16"
    for name in ("embed", "hybrid", "dense", "text"):
        assert value[f"{name}_p50_ms"] > 0


def test_bench_tier_gives_each_figure_beside_the_raw_library(l2m: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 2000)
    value = found(
        l2m("bench", "tier", "--rows", "1000", "--rows", "3000", "--questions", "20", "--commits", "2", "--json")
    )
    for name in ("exact_1k", "ivf_3k", "state_fetch", "visible", "commit"):
        figures = value[name]
        assert figures["ours_ms"] > 0
        assert figures["raw_ms"] > 0
        assert figures["ratio"] == pytest.approx(figures["ours_ms"] / figures["raw_ms"], abs=0.05, rel=0.2)
    assert value["exact_1k"]["recall"] >= 0.99
    assert value["ivf_3k"]["recall"] >= 0.99
    assert value["exact_1k"]["bandwidth_share"] > 0
    text = l2m("bench", "tier", "--rows", "1000", "--questions", "5", "--commits", "1").stdout
    assert "exact_1k: ours_ms " in text
    assert l2m("bench", "tier", "--rows", "10").exit_code == 2


def test_made_vectors_are_unit_and_come_in_topics() -> None:
    vectors = bench.made_vectors(400, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    same = float(np.mean([vectors[i] @ vectors[i + 1] for i in range(0, 400, 20)]))
    other = float(np.mean([vectors[i] @ vectors[i + 40] for i in range(0, 300, 20)]))
    assert same > other + 0.2


def test_made_texts_are_the_same_each_time_and_have_common_words() -> None:
    texts = bench.made_texts(20)
    assert texts == bench.made_texts(20)
    shared = set.intersection(*(set(text.lower().replace(".", "").split()) for text in texts))
    assert shared


def test_eval_retrieval_over_questions_of_the_user(l2m: Run, tmp_path: Path) -> None:
    lines = [
        {"question": "When does the lease end?", "context": "The lease ends in May.", "answers": ["May"]},
        {"question": "Who baked the bread?", "context": "Ada baked the bread.", "answers": ["Ada"]},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    value = found(l2m("eval", "retrieval", "--questions", "mine.jsonl", "--json"))
    assert value["set"] == "mine"
    assert [row["questions"] for row in value["rows"]] == [2, 2, 2, 2]
    assert value["rows"][1]["recall_1"] == 1.0  # by words
    table = l2m("eval", "retrieval", "--questions", "mine.jsonl")
    assert "RECALL_1" in table.stdout


def test_eval_qa_beside_reading_less_and_more(l2m: Run, tmp_path: Path, language_model: Path) -> None:
    line = {"question": "When does the lease end?", "context": "The lease ends in May.", "answers": ["May"]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    call = ("--quiet", "eval", "qa", "--questions", "mine.jsonl", "--beside", "--answerable")
    value = found(l2m(*call, "--model", str(language_model), "--json"))
    assert [row["evidence"] for row in value["rows"]] == [
        "own search", "own search, every passage that fits", "own search, the first passage alone",
    ]  # fmt: skip


def test_eval_of_a_collection_that_is_not_there_is_exit_code_10(l2m: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "Who?", "answers": ["Ada"]}\n')
    assert l2m("eval", "retrieval", "--questions", "mine.jsonl", "-c", "nowhere").exit_code == 10
    assert l2m("eval", "retrieval", "-c", "nowhere").exit_code == 2
    assert l2m("eval", "retrieval", "--set", "xquad", "--data", "nowhere").exit_code == 2


def test_what_is_for_measuring_cannot_be_fitted_on(l2m: Run) -> None:
    result = l2m("eval", "calibrate", "out.json", "--set", "xquad")
    assert result.exit_code == 2
    assert "squad-train" in result.stderr


def test_bench_ask_asks_among_made_up_chunks(l2m: Run, tmp_path: Path, language_model: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"text": "How much is the deposit?"}\n{"text": "When does the lease end?"}\n')
    call = ("--quiet", "bench", "ask", "--rows", "1000", "--questions", str(questions), "--model", str(language_model))
    value = found(l2m(*call, "--json"))
    assert value["questions"] == 2
    assert 0 < value["first_token_p50_ms"] <= value["total_p50_ms"] <= value["total_p95_ms"]
    assert value["positions_p50"] > 0
    assert not (tmp_path / "home" / "collections").exists()
    refused = l2m(*call, "-c", "mine")
    assert (refused.exit_code, "leave out --collection" in refused.stderr) == (2, True)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_nothing_is_lost_to_kills_a_failing_disk_flipped_bits_and_races() -> None:
    found = bench_faults.faults(points=8, failures=6, flips=12, races=2)
    counts = {key: found[key] for key in ("lost", "duplicated", "wrong", "unopenable", "silent", "race_duplicates")}
    assert counts == dict.fromkeys(counts, 0), found["bad"]
    assert (found["points"], found["failures"], found["damaged"], found["races"]) == (8, 12, 24, 2)
    assert found["calls"] > 100
    assert found["detected"] > 0
    assert found["detected"] + found["harmless"] == 24
