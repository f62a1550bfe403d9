"""What is measured of language is what its definitions say."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import tiny_folder
from transformers import AutoTokenizer

from l2m_rag import language_eval
from l2m_rag.backbone import load_backbone

zstandard = pytest.importorskip("zstandard")


def write_zst(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_bytes(zstandard.compress("\n".join(map(json.dumps, rows)).encode()))


def test_language_is_scored_as_by_hand(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "a dog ran on the cat"]
    folder = tiny_folder(tmp_path, texts)
    tokenizer, backbone = AutoTokenizer.from_pretrained(folder), load_backbone(folder, 2, dtype=torch.float32)
    (tmp_path / "lambada").mkdir()
    (tmp_path / "piqa").mkdir()
    pair = {"goal": "sit?", "sol1": "on the mat", "sol2": "ran", "label": 0}
    write_zst(tmp_path / "lambada/test_openai.jsonl.zst", [{"text": text} for text in texts])
    write_zst(tmp_path / "piqa/valid.jsonl.zst", [pair, {**pair, "label": 1}])
    told: list[tuple[int, int]] = []
    row, again = language_eval.language(
        {"one": backbone, "other": backbone}, tokenizer, tmp_path, texts, n=None, told=lambda *at: told.append(at)
    )
    assert told[-1] == (12, 12)
    assert row.piqa == 0.5  # of two questions that differ in the label alone one is solved
    assert replace(again, model="one") == row
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = backbone.causal_lm(torch.tensor([ids])).logits[0]
        other = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
        more = backbone.causal_lm(torch.tensor([other])).logits[0]
    each = [
        torch.nn.functional.cross_entropy(found[:-1], torch.tensor(told[1:]), reduction="none")
        for found, told in ((logits, ids), (more, other))
    ]
    assert row.book_perplexity == pytest.approx(float(torch.cat(each).mean().exp()), rel=1e-3)
    right = []
    for text, found in zip(texts, (logits, more), strict=True):
        last = tokenizer(" " + text.rpartition(" ")[2], add_special_tokens=False)["input_ids"]
        right.append(found[-len(last) - 1 : -1].argmax(-1).tolist() == last)
    assert row.lambada == sum(right) / 2
