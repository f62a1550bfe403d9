"""Questions that a model makes of passages, with their answers, for a reader to learn from.

The asker is a memory model that reads a passage and writes something that stands in it, and then a question that this
answers; it learns from the same sets as the reader. Of what it writes is kept what the reader of before finds likely to
be answered so (roundtrip consistency; Alberti et al., 2019, arXiv:1906.05416, who need three models for it).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from l2m_rag.clozes import Triple
from l2m_rag.model import L2M
from l2m_rag.reading import QUESTION, ReadingLoss, as_picked, laid, token_ids
from l2m_rag.reading_data import Material, bare

ASK = "What can be asked about this?"
"""Takes the place of a question when the asker is to write."""
_SEPARATOR = "\nQuestion:"
_TASK = QUESTION.format(ASK)
LONGEST = 72
"""Tokens of an answer with its question."""
_TEMPERATURE = 0.7
_NUCLEUS = 0.95
_LIKELY = math.log(0.05)  # of the answer, to the reader of before
_EMPTY = math.log(0.5)  # what it may give to there being none


def to_ask(material: Material) -> Material:
    """Give the material that an asker learns from: of each passage its answers, each with its question behind it."""
    told = [
        one._replace(text=ASK, answer=f"{one.answer}{_SEPARATOR} {one.text}") for one in material.questions
        if one.answer and one.text.endswith("?")
    ]  # fmt: skip
    return Material(material.passages, material.sources, told, material.near, [[] for _ in material.passages])


def write(
    asker: L2M,
    reader: L2M,
    tokenizer: Any,
    passages: Sequence[str],
    path: Path,
    *,
    each: int = 8,
    batch: int = 6,
    seed: int = 0,
) -> list[Triple]:
    """Write questions to passages and give those that are kept.

    Args:
        asker: writes them.
        reader: must find their answers likely.
        tokenizer: of both.
        passages: texts.
        path: JSON lines, one for each batch of passages; what is there already is not written again.
        each: questions tried of a passage.
        batch: passages at once.
        seed: of what is drawn.
    """
    order = sorted(range(len(passages)), key=lambda at: len(passages[at]))  # those of a batch are about as long
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    random.Random(seed).shuffle(batches)
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        for number in range(len(made), len(batches)):
            texts = [passages[at] for at in batches[number]]
            torch.manual_seed(seed * 1_000_003 + number)
            tried: list[Triple] = []
            for at, text in enumerate(written(asker, tokenizer, texts, each)):
                tried += _read(texts[at // each], text)
            made.append(consistent(reader, tokenizer, list(dict.fromkeys(tried))))
            stream.write(json.dumps(made[-1], ensure_ascii=False) + "\n")
            stream.flush()
    return [(passage, question, answer) for found in made for passage, question, answer in found]


def _read(passage: str, text: str) -> Iterator[Triple]:
    """Give what the asker wrote as a triple, when it is one."""
    answer, _, question = text.partition(_SEPARATOR)
    answer, question = answer.strip(), question.strip()
    whole = question.endswith("?") and question.count("?") == 1 and "\n" not in question
    if whole and len(question.split()) > 3 and answer and answer in passage and bare(answer) not in bare(question):
        yield passage, question, answer


@torch.inference_mode()
def written(asker: L2M, tokenizer: Any, passages: Sequence[str], each: int) -> list[str]:
    """Draw what the asker writes behind passages, `each` texts for the first, then `each` for the second, and so on."""
    backbone, end = asker.backbone, int(tokenizer.eos_token_id)
    ids, asked = token_ids(tokenizer, passages), torch.tensor(token_ids(tokenizer, [_TASK]))
    B, T = len(ids), asked.shape[1]
    lengths = torch.tensor([[len(one)] for one in ids])
    tokens = torch.tensor([[*one, *[end] * (int(lengths.max()) - len(one))] for one in ids])
    values = backbone.lower(tokens)[:, None]
    recalled = asker.assemble([as_picked(values, tokens[:, None], lengths, torch.ones_like(lengths))])
    if recalled is None:
        return []
    K = recalled.vectors.shape[1]
    there = torch.ones(B, K, dtype=torch.bool) if recalled.real is None else recalled.real
    lower, upper = DynamicCache(), DynamicCache()
    x = backbone.lower(asked.expand(B, -1), cache=lower)
    real = torch.cat([there, torch.ones(B, T, dtype=torch.bool)], 1)
    mask = real[:, None] & torch.ones(K + T, K + T, dtype=torch.bool).tril() | torch.eye(K + T, dtype=torch.bool)
    positions = torch.cat([recalled.places, recalled.span[:, None] + torch.arange(T)], 1)
    top = backbone.upper(torch.cat([recalled.vectors, x], 1), positions, mask[:, None], cache=upper)
    logits = backbone.head(top[:, -1:])[:, 0].repeat_interleave(each, 0)
    for cache in (lower, upper):
        cache.batch_repeat_interleave(each)
    real, span = real.repeat_interleave(each, 0), recalled.span.repeat_interleave(each, 0)
    texts = torch.empty(B * each, 0, dtype=torch.int64)
    done = torch.zeros(B * each, dtype=torch.bool)
    for step in range(LONGEST):
        token = torch.where(done, end, _drawn(logits.float()))
        texts = torch.cat([texts, token[:, None]], 1)
        done |= token == end
        if bool(done.all()):
            break
        x = backbone.lower(token[:, None], first=T + step, cache=lower)
        real = F.pad(real, (0, 1), value=True)
        top = backbone.upper(x, (span + T + step)[:, None], real[:, None, None], cache=upper)
        logits = backbone.head(top)[:, 0]
    found: list[str] = tokenizer.batch_decode(texts, skip_special_tokens=True)
    return found


def _drawn(logits: Tensor) -> Tensor:
    """Draw a token of each row, (R, V), from the likeliest that make up `_NUCLEUS` (Holtzman et al., 2020)."""
    ranked, order = (logits / _TEMPERATURE).softmax(-1).topk(64)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked > _NUCLEUS, 0.0)
    return order.gather(1, torch.multinomial(ranked, 1))[:, 0]


@torch.inference_mode()
def consistent(reader: L2M, tokenizer: Any, triples: Sequence[Triple]) -> list[Triple]:
    """Give those whose answer a reader finds likely."""
    if not triples:
        return []
    end = int(tokenizer.eos_token_id)
    rows: dict[str, list[int]] = {}
    for number, (passage, _, _) in enumerate(triples):
        rows.setdefault(passage, []).append(number)
    questions = token_ids(tokenizer, [QUESTION.format(question) for _, question, _ in triples])
    answers = [[*one, end] for one in token_ids(tokenizer, [f" {answer}" for _, _, answer in triples])]
    batch = laid(
        [[one] for one in token_ids(tokenizer, list(rows))],
        [[(questions[n], answers[n]) for n in row] for row in rows.values()],
    )
    logits, targets, owner = ReadingLoss(reader).answers(batch, 1)
    scores = logits.log_softmax(-1)
    right = torch.zeros(batch.real.numel()).index_add(0, owner, scores.gather(1, targets[:, None])[:, 0])
    first = torch.cat([torch.ones(1, dtype=torch.bool), owner[1:] != owner[:-1]])
    empty = torch.zeros(batch.real.numel()).index_put((owner[first],), scores[first, end])
    most = batch.real.shape[1]
    return [
        triples[number]
        for at, row in enumerate(rows.values())
        for place, number in enumerate(row)
        if right[at * most + place] > _LIKELY and empty[at * most + place] < _EMPTY
    ]
