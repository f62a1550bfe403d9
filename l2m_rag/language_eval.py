"""What a trained reader's weights still know of language: LAMBADA, PIQA and books, beside the backbone's own.

The prompts are those of EleutherAI's lm-evaluation-harness (lambada_openai, piqa).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from l2m_rag.backbone import Backbone
from l2m_rag.evaluate import Told, half_width, sample
from l2m_rag.tasks import rows

_BOOK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """How one model does; `half` is half the width of a 95 % interval.

    Args:
        model: name.
        lambada: share of passages whose last word is what the model would write.
        lambada_half: of it.
        piqa: share of questions whose right solution is likelier than the other, by bytes.
        piqa_half: of it.
        book_perplexity: of a token in texts of books of 512 tokens, without the first.
        passages: of LAMBADA, and questions of PIQA.
        books: texts of books.
    """

    model: str
    lambada: float
    lambada_half: float
    piqa: float
    piqa_half: float
    book_perplexity: float
    passages: int
    books: int


def language(
    models: dict[str, Backbone],
    tokenizer: Any,
    data: Path,
    books: Sequence[str],
    *,
    n: int | None,
    told: Told | None = None,
) -> list[LanguageRow]:
    """Measure models over the same texts.

    Args:
        models: by name; they share a tokenizer.
        tokenizer: of the transformers library.
        data: folder of the data sets.
        books: texts.
        n: passages and questions of each set, drawn by chance but the same each time; None for all.
        told: called after each text.
    """
    passages = sample([str(row["text"]) for row in rows(data / "lambada/test_openai.jsonl.zst")], n)
    pairs = sample(list(rows(data / "piqa/valid.jsonl.zst")), n)
    many = len(models) * (len(passages) + len(pairs) + len(books))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if told:
            told(done, many)

    return [_row(name, model, tokenizer, passages, pairs, books, count) for name, model in models.items()]


def _row(
    name: str,
    model: Backbone,
    tokenizer: Any,
    passages: Sequence[str],
    pairs: Sequence[dict[str, Any]],
    books: Sequence[str],
    count: Callable[[], None],
) -> LanguageRow:
    words, solved, spent = [], [], []
    for text in passages:
        before, _, last = text.rpartition(" ")
        words.append(float(_follows(model, tokenizer, before, f" {last}")[1]))
        count()
    for pair in pairs:
        given = f"Question: {pair['goal']}\nAnswer:"
        scores = [
            float(_follows(model, tokenizer, given, f" {solution}")[0].sum()) / len(solution.encode())
            for solution in (pair["sol1"], pair["sol2"])
        ]
        solved.append(float(int(np.argmax(scores)) == pair["label"]))
        count()
    for text in books:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:_BOOK_TOKENS]
        spent.append(_scored(model, ids, 1)[0])
        count()
    return LanguageRow(
        name,
        round(float(np.mean(words)), 4),
        round(half_width(words), 4),
        round(float(np.mean(solved)), 4),
        round(half_width(solved), 4),
        round(math.exp(-float(torch.cat(spent).mean())), 3) if spent else math.nan,
        len(words),
        len(spent),
    )


def _follows(model: Backbone, tokenizer: Any, given: str, text: str) -> tuple[torch.Tensor, bool]:
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (given, text))
    return _scored(model, [*before, *after], len(before))


@torch.inference_mode()
def _scored(model: Backbone, ids: Sequence[int], first: int) -> tuple[torch.Tensor, bool]:
    """Give the log-probabilities of the tokens from `first` on, (n,) float32, and whether each is the likeliest."""
    tokens = torch.tensor([ids], device=model.device)
    top = model.upper(model.lower(tokens), torch.arange(len(ids), device=model.device)[None])
    logits = model.head(top[:, first - 1 : -1])[0].float()
    wanted = tokens[0, first:]
    return -F.cross_entropy(logits, wanted, reduction="none"), bool((logits.argmax(-1) == wanted).all())
