"""Questions that a model writes: drawn in batches as if alone, kept when a reader finds their answer, written once."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import tiny_model
from torch import Tensor

from l2m_rag import asking
from l2m_rag.reading import QUESTION, as_picked
from l2m_rag.reading_data import Material, Question


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 1

    def __call__(self, texts: str | list[str], add_special_tokens: bool = False) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        return {"input_ids": [[2 + ord(letter) % 60 for letter in text] for text in texts]}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(60 + one - 2) for one in row if one != self.eos_token_id) for row in ids.tolist()]


def test_an_asker_learns_answers_with_their_questions() -> None:
    asked = [Question(0, "Who?", "Ada"), Question(0, "Who was not?", ""), Question(0, "Fill in: ____", "Ada")]
    found = asking.to_ask(Material(["Ada wrote."], ["squad"], asked, [[]], [[1]]))
    assert found.questions == [Question(0, asking.ASK, "Ada\nQuestion: Who?")]
    assert found.lures == [[]]


def test_texts_are_written_in_a_batch_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_drawn", lambda logits: logits.argmax(-1))
    monkeypatch.setattr(asking, "LONGEST", 12)
    model, letters = tiny_model(), Letters()
    passages = ["the lease ends in may", "rent", "what was paid is paid and done"]
    together = asking.written(model, letters, passages, 2)
    for at, passage in enumerate(passages):
        ids = torch.tensor([letters([passage])["input_ids"][0]])
        lengths = torch.tensor([[ids.shape[1]]])
        picked = as_picked(model.backbone.lower(ids)[:, None], ids[:, None], lengths, torch.ones_like(lengths))
        text = letters(QUESTION.format(asking.ASK))["input_ids"]
        with torch.no_grad():
            for _ in range(12):
                x = model.backbone.lower(torch.tensor([text]))
                text.append(int(model.decode(x, model.start(), model.assemble([picked]))[0, -1].argmax()))
                if text[-1] == letters.eos_token_id:
                    break
        alone = letters.batch_decode(torch.tensor([text[len(QUESTION.format(asking.ASK)) :]]))[0]
        assert together[2 * at : 2 * at + 2] == [alone, alone]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Ada\nQuestion: Who was it that wrote?", True),
        (" Bob\nQuestion: Who was it that wrote?", False),  # stands nowhere
        (" Ada\nQuestion: Who was it that wrote", False),
        (" Ada\nQuestion: Was it Ada who wrote?", False),  # tells its answer
        (" Ada", False),
        (" Ada\nQuestion: Who?", False),
        ("\nQuestion: Who was it that wrote?", False),
    ],
)
def test_what_is_no_question_with_its_answer_is_dropped(text: str, kept: bool) -> None:
    assert bool(list(asking._read("Ada wrote.", text))) == kept


def test_what_a_reader_finds_likely_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, letters = tiny_model(), Letters()
    triples = [("one passage", "What is it?", "one"), ("one passage", "Which?", "passage"), ("two", "What?", "two")]
    scores = []
    for passage, question, answer in triples:
        ids = torch.tensor([letters([passage])["input_ids"][0]])
        lengths = torch.tensor([[ids.shape[1]]])
        picked = as_picked(model.backbone.lower(ids)[:, None], ids[:, None], lengths, torch.ones_like(lengths))
        asked, told = letters([QUESTION.format(question), f" {answer}"])["input_ids"]
        whole = [*asked, *told, letters.eos_token_id]
        with torch.no_grad():
            x = model.backbone.lower(torch.tensor([whole[:-1]]))
            each = model.decode(x, model.start(), model.assemble([picked]))[0].log_softmax(-1)
        behind = each[len(asked) - 1 :]
        scores.append(
            (
                float(sum(row[token] for row, token in zip(behind, whole[len(asked) :], strict=True))),
                float(behind[0, 1]),
            )
        )
    monkeypatch.setattr(asking, "_EMPTY", 0.0)
    for score, _ in scores:
        monkeypatch.setattr(asking, "_LIKELY", score - 1e-3)
        kept = asking.consistent(model, letters, triples)
        assert kept == [triple for triple, (other, _) in zip(triples, scores, strict=True) if other > score - 1e-3]
    monkeypatch.setattr(asking, "_LIKELY", -math.inf)
    middle = sorted(empty for _, empty in scores)[1] + 1e-4
    monkeypatch.setattr(asking, "_EMPTY", middle)
    kept = asking.consistent(model, letters, triples)
    assert kept == [triple for triple, (_, empty) in zip(triples, scores, strict=True) if empty < middle]


def test_what_was_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [f"Ada wrote {number} of them." for number in range(5)]
    tried: list[str] = []

    def written(asker: Any, tokenizer: Any, texts: list[str], each: int) -> list[str]:
        tried.extend(texts)
        return [" Ada\nQuestion: Who was it that wrote?" for _ in texts for _ in range(each)]

    monkeypatch.setattr(asking, "written", written)
    monkeypatch.setattr(asking, "consistent", lambda reader, tokenizer, triples: triples)
    nothing: Any = None

    def write(texts: list[str]) -> list[Any]:
        return asking.write(nothing, nothing, nothing, texts, tmp_path / "run" / "asked.jsonl", batch=2)

    found = write(passages)
    assert sorted(found) == [(passage, "Who was it that wrote?", "Ada") for passage in passages]
    assert sorted(tried) == passages
    first = {passage for passage, _, _ in json.loads((tmp_path / "run" / "asked.jsonl").read_text().splitlines()[0])}
    lines = (tmp_path / "run" / "asked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "asked.jsonl").write_text("".join(lines[:1]))
    tried.clear()
    assert write(passages) == found
    assert sorted(tried) == sorted(set(passages) - first)
