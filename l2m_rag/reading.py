"""Reading: questions answered from passages that enter the upper layers as states, packed many to a row.

A row holds a few passages and all that is asked of them: [passages | question answer | question answer | ...]. Each
question sees the passages and itself, as if it were asked alone (`L2M.decode` after `L2M.assemble`; a test compares
them), so what the passages cost is shared by all their questions. An answer that the passages do not hold is empty: the
end-of-text token alone. Beside that, texts without a passage can be read on, held to what the backbone says of them.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_rag.clozes import Triple, joined
from l2m_rag.errors import ConfigError
from l2m_rag.losses import IGNORED, Outcome, distance, masked_mean
from l2m_rag.model import L2M
from l2m_rag.probes import noise_sentences
from l2m_rag.reading_data import Material, Row, batches_of, gather, rows_of
from l2m_rag.state import Picked

QUESTION = "\nQuestion: {}\nAnswer:"
"""How a question is put; the answer follows behind a space."""
FREE = "\nQuestion: {}\nIn short:"
"""The same where the answer is to be in the reader's own words, rather than the passage's."""
REBUILD = "\nThe text again:"
"""What a passage's own tokens follow when they are to be written back from its pooled states."""
_ROUND = 32  # lengths are rounded up: a new shape costs the CPU's matrix library as much as several known ones
_LONGEST_QUESTION = 64  # tokens, each time it is put
_PLAIN = 128  # tokens of a text that is read on without a passage; about as many as the passages of LAMBADA have
LONGEST_ANSWER = 64
"""Tokens of an answer, at most."""
_SHORTEST = 72  # tokens of a passage that is worth writing back; more than an answer has, so the two are told apart


class Readings(NamedTuple):
    """A batch of rows; ids are int64.

    Args:
        passages: (B, P, L).
        lengths: tokens of each passage, (B, P); 0 for none.
        asked: question and answer but for the answer's last token, (B, Q, A).
        real: tokens of each, (B, Q); 0 for none.
        told: what follows each token of `asked` where that is the answer, `IGNORED` elsewhere, (B, Q, A).
        text: to be read on without a passage, (B, T); T is 0 for none.
    """

    passages: Tensor
    lengths: Tensor
    asked: Tensor
    real: Tensor
    told: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Readings:
        """Give the batch on a device."""
        return Readings(*(part.to(device) for part in self))


class ReadingBatches:
    """Makes the batch of any step from the material, the same for the same seed and step.

    Args:
        material: passages and questions.
        tokenizer: of the backbone.
        batch: rows of a batch.
        longest: tokens of a row, at most.
        passage: tokens of a passage, at most; longer ones are left out.
        answers: tokens of an answer, at most; questions with longer ones are left out.
        unanswerable: about how many questions for each with an answer are asked where there is none.
        together: most passages of a row.
        shares: share of the passages of each source that an epoch takes.
        rebuild: share of steps in which passages are to be written back instead of questions answered.
        texts: to be written back; the material's passages when there are none.
        freely: share of the questions whose answer stands in the passage that are put as `FREE`, too.
        again: put each question twice.
        plain: texts to be read on without a passage, one for two of `batch`; only their first `_PLAIN` tokens are.
        seed: of the order.
    """

    def __init__(
        self,
        material: Material,
        tokenizer: Any,
        *,
        batch: int,
        longest: int = 768,
        passage: int = 320,
        answers: int = LONGEST_ANSWER,
        unanswerable: float = 0.25,
        together: int = 4,
        shares: dict[str, float] | None = None,
        rebuild: float = 0.0,
        texts: Sequence[str] = (),
        freely: float = 0.0,
        again: bool = False,
        plain: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.material, self.batch, self.longest, self.seed = material, batch, longest, seed
        self.shares, self.rebuild = shares, rebuild
        self._again = token_ids(tokenizer, [REBUILD])[0]
        self.unanswerable, self.together = unanswerable, together
        self.end = int(tokenizer.eos_token_id)
        self._passages = token_ids(tokenizer, material.passages)
        self._texts = [ids for ids in token_ids(tokenizer, texts) or self._passages if len(ids) >= _SHORTEST]
        if rebuild and not self._texts:
            raise ConfigError(f"task.rebuild ({rebuild}) needs texts of at least {_SHORTEST} tokens to write back")
        draw = random.Random(f"{seed} freely")
        put = [FREE if draw.random() < freely or one.free else QUESTION for one in material.questions]
        asked = [
            how.format(twice(one.text) if again else one.text) for how, one in zip(put, material.questions, strict=True)
        ]
        self._questions = token_ids(tokenizer, asked)
        self._plain = [ids[:_PLAIN] for ids in token_ids(tokenizer, plain) if len(ids) >= _PLAIN]
        self._answers = [
            [*ids, self.end] for ids in token_ids(tokenizer, [f" {one.answer}" for one in material.questions])
        ]
        self._sizes = [len(ids) if len(ids) <= passage else longest for ids in self._passages]
        most = _LONGEST_QUESTION * (2 if again else 1)
        self._costs = [
            len(asked) + len(answer) - 1 if len(asked) <= most and len(answer) <= answers else longest + 1
            for asked, answer in zip(self._questions, self._answers, strict=True)
        ]
        self._epochs: list[int] = [0]  # step at which each epoch begins
        self._held: tuple[int, list[list[Row]]] = (-1, [])

    def __call__(self, step: int, segments: int = 0) -> Readings:
        """Give the batch of a step; `segments` is for the curriculum of longer texts and not used here."""
        draw = random.Random(f"{self.seed} again {step}")
        if draw.random() < self.rebuild:
            return self._rebuilt(draw)
        while True:
            epoch = max(number for number, first in enumerate(self._epochs) if first <= step)
            found = self.epoch(epoch)
            if step < self._epochs[epoch] + len(found):
                packed = self.pack(found[step - self._epochs[epoch]])
                plain = draw.choices(self._plain, k=-(-self.batch // 2)) if self._plain else []
                return packed._replace(text=torch.tensor(plain)) if plain else packed
            if epoch + 1 == len(self._epochs):
                self._epochs.append(self._epochs[epoch] + len(found))

    def epoch(self, number: int) -> list[list[Row]]:
        """Give the batches of an epoch."""
        if self._held[0] != number:
            draw = random.Random(f"{self.seed} {number}")
            made = rows_of(
                self.material,
                draw,
                sizes=self._sizes,
                costs=self._costs,
                longest=self.longest,
                unanswerable=self.unanswerable,
                most_passages=self.together,
                shares=self.shares,
            )
            self._held = number, batches_of(made, self.tokens, self.batch, self.longest, draw)
        return self._held[1]

    def tokens(self, row: Row) -> tuple[int, int]:
        """Give the tokens of a row's passages, and of its questions with their answers."""
        asked = sum(
            len(self._questions[number]) + (len(self._answers[number]) - 1) * answered
            for number, answered in row.questions
        )
        return sum(self._sizes[passage] for passage in row.passages), asked

    def _rebuilt(self, draw: random.Random) -> Readings:
        """Give passages of about one length, each to be written back from its own states."""
        drawn = draw.choices(self._texts, k=32 * self.batch)
        size = len(drawn[0])
        near = sorted(drawn, key=lambda ids: abs(len(ids) - size))
        most = self.longest // 3  # a passage is there twice, once pooled
        many = self.batch * max(1, self.longest // (2 * min(size, most)))
        chosen = [ids[:most] for ids in near[:many]]
        return laid([[ids] for ids in chosen], [[(self._again, [*ids, self.end])] for ids in chosen])

    def pack(self, made: Sequence[Row]) -> Readings:
        """Lay rows out as tensors."""
        answers = [
            [(self._questions[n], self._answers[n] if answered else [self.end]) for n, answered in row.questions]
            for row in made
        ]
        return laid([[self._passages[n] for n in row.passages] for row in made], answers)


class ReadingLoss(nn.Module):
    """The loss of answering from passages.

    Args:
        model: the memory model; its slots and router take no part.
        ratios: at which passages are read; one is drawn for each batch.
        cached: most bytes of lower states that are kept, as passages and questions come again.
        distance: weight of the KL divergence from the backbone's own predictions on the batch's plain text.
    """

    def __init__(self, model: L2M, *, ratios: Sequence[int] = (1,), cached: int = 0, distance: float = 0.0) -> None:
        super().__init__()
        self.model, self.ratios, self.distance = model, tuple(ratios), distance
        self._cache = _Cache(cached)

    def forward(self, batch: Readings) -> Outcome:
        """Give the cross-entropy of the answers' tokens, and shares of answers that are right to the last token."""
        again = max(self.ratios) > 1 and bool((batch.told != IGNORED).sum(-1).max() > LONGEST_ANSWER)
        ratios = [ratio for ratio in self.ratios if ratio > 1 or not again]
        ratio = ratios[int(torch.randint(len(ratios), ()))]
        logits, targets, owner = self.answers(batch, ratio)
        each = F.cross_entropy(logits, targets, reduction="none")
        wrong = (logits.argmax(-1) != targets).float()
        missed = torch.zeros(batch.real.numel(), device=wrong.device).index_add(0, owner, wrong) > 0
        asked = (batch.real > 0).flatten()
        # an empty answer is one token
        empty = ((batch.told != IGNORED).sum(-1) == 1).flatten() & asked
        right = (~missed).float()
        total = each.mean()
        if again:
            return Outcome({"total": total}, {f"reconstruction {ratio}:1": total})
        figures = {"right": masked_mean(right, asked & ~empty), "abstained": masked_mean(right, empty)}
        if len(self.ratios) > 1:
            figures |= {f"answer {ratio}:1": total, f"right {ratio}:1": figures["right"]}
        losses = {"answer": total}
        if self.distance and batch.text.numel():
            losses["distance"] = self._distance(batch.text)
            total = total + self.distance * losses["distance"]
        return Outcome({**losses, "total": total}, figures)

    def _distance(self, tokens: Tensor) -> Tensor:
        """Give how far what the adapters say of texts, (B, T), lies from what the backbone says."""
        backbone = self.model.backbone
        with torch.no_grad():
            x = backbone.lower(tokens)
        logits = backbone.head(backbone.upper(x, torch.arange(tokens.shape[1], device=tokens.device)[None]))
        return distance(backbone, x, logits, torch.ones_like(tokens, dtype=torch.bool))

    def answers(self, batch: Readings, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give the logits (N, V) float32 of all the answers' tokens, the tokens (N,), and whose they are (N,)."""
        model = self.model
        B, Q, A = batch.asked.shape
        with torch.no_grad():
            values = self._cache.states(model, batch.passages.flatten(0, 1), batch.lengths.flatten())
            x = self._cache.states(model, batch.asked.flatten(0, 1), batch.real.flatten())
        recalled = model.assemble(
            [
                as_picked(
                    values.unflatten(0, (B, -1)), batch.passages, batch.lengths, torch.full_like(batch.lengths, ratio)
                )
            ]
        )
        if recalled is None:
            raise ValueError("a batch without passages")
        before = -recalled.vectors.shape[1] % _ROUND
        vectors = F.pad(recalled.vectors, (0, 0, before, 0))
        K = vectors.shape[1]
        there = torch.ones(B, K - before, dtype=torch.bool, device=x.device) if recalled.real is None else recalled.real
        inside = (torch.arange(A, device=x.device) < batch.real[..., None]).flatten(1)  # (B, Q * A)
        most = min(Q * A, -(-int(inside.sum(1).max()) // _ROUND) * _ROUND)
        order = (~inside).long().argsort(dim=1, stable=True)[:, :most]  # what is real comes first
        x = x.reshape(B, Q * A, -1).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        places = recalled.span[:, None] + order % A
        positions = torch.cat([F.pad(recalled.places, (before, 0)), places], 1)
        real = torch.cat([F.pad(there, (before, 0)), inside.gather(1, order)], 1)
        block = torch.cat([torch.full((B, K), -1, device=x.device), order // A], 1)
        N = K + most
        causal = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
        same = (block[:, None] == -1) | (block[:, None] == block[:, :, None])
        itself = torch.eye(N, dtype=torch.bool, device=x.device)
        mask = (causal & same & real[:, None]) | itself
        top = model.backbone.upper(torch.cat([vectors, x], 1), positions, mask[:, None])[:, K:]
        told = batch.told.flatten(1).gather(1, order).masked_fill(~inside.gather(1, order), IGNORED)
        here = told != IGNORED
        hidden = top[here]
        logits = model.backbone.head(F.pad(hidden, (0, 0, 0, -len(hidden) % _ROUND)))[: len(hidden)]
        owner = (torch.arange(B, device=x.device)[:, None] * Q + order // A)[here]
        return logits.float(), told[here], owner


class _Cache:
    """Lower states of texts by their ids, the ones used last kept."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()

    def states(self, model: L2M, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Give the lower states of rows of tokens, (R, L, D); what is behind a row's length means nothing."""
        if not self.most:
            return model.backbone.lower(tokens)
        keys = [row[:length].numpy().tobytes() for row, length in zip(tokens, lengths.tolist(), strict=True)]
        lacking = {key: at for at, key in enumerate(keys) if key and key not in self._held}
        new = list(lacking.values())
        if new:
            made = model.backbone.lower(_rounded(tokens[new]))
            for row, at in zip(made, new, strict=False):
                kept = row[: int(lengths[at])].clone()
                self._held[keys[at]] = kept
                self.bytes += kept.numel() * kept.element_size()
        found = torch.zeros(*tokens.shape, model.backbone.dim, dtype=model.backbone.dtype)
        for at, (key, length) in enumerate(zip(keys, lengths.tolist(), strict=True)):
            if length:
                self._held.move_to_end(key)
                found[at, :length] = self._held[key]
        while self.bytes > self.most and len(self._held) > len(keys):
            _, gone = self._held.popitem(last=False)
            self.bytes -= gone.numel() * gone.element_size()
        return found


def _rounded(tokens: Tensor) -> Tensor:
    """Fill the number of rows up, for the reason given at `_ROUND`."""
    step = 4 if len(tokens) < 16 else 16
    return F.pad(tokens, (0, 0, 0, -len(tokens) % step))


def as_picked(values: Tensor, tokens: Tensor, lengths: Tensor, ratio: Tensor) -> Picked:
    """Give passages as something recalled, in their order.

    Args:
        values: lower states, (B, P, L, D).
        tokens: ids, (B, P, L) int64.
        lengths: tokens of each, (B, P) int64; 0 for none.
        ratio: at which each is read, (B, P) int64.
    """
    grain = torch.ones_like(lengths)
    order = torch.arange(lengths.shape[1], device=lengths.device).expand_as(lengths)
    keys = values[:, :, 0, :1]  # take no part
    return Picked(values, keys, tokens, lengths, order, grain, ratio, order, grain < 0)


def load_material(
    path: Path, data: Path, sources: Sequence[str], clozes: int, seed: int, *, asked: Iterable[Triple] = ()
) -> Material:
    """Give the material that lies at a path, made anew when there is none."""
    if path.exists():
        return Material.load(path)
    from l2m_rag.config import load_settings
    from l2m_rag.indexers.embedding import Embedder
    from l2m_rag.weights import DEFAULT_EMBEDDER, find

    embedder = Embedder(find(DEFAULT_EMBEDDER, load_settings({})[0]), name=DEFAULT_EMBEDDER)
    made = gather(data, sources, embedder, embedder, clozes=clozes, seed=seed, asked=asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def paragraphs(books: Path, seed: int, *, words: int = 110, most: int = 8000) -> list[str]:
    """Give texts of about so many words, consecutive sentences of the books in a folder, drawn from all of them."""
    found = list(joined(noise_sentences(books, at_least=4, count=lambda text: len(text.split())), words))
    return random.Random(seed).sample(found, min(most, len(found)))


def twice(question: str) -> str:
    """Give a question two times, one behind the other.

    The second time its words are read its end is known, and they can look for other things in the passages, which were
    encoded without it (Xu et al., 2023; docs/decisions/0019-again.md).
    """
    return f"{question} {question}"


def plain_texts(books: Path, material: Material, seed: int, *, most: int = 6000) -> list[str]:
    """Give texts to be read on without a passage: of books, and half as many questions with their answers in a row."""
    draw = random.Random(seed)
    asked = [one for one in material.questions if one.answer]
    put = [f"{QUESTION.format(one.text)} {one.answer}" for one in draw.sample(asked, min(4 * most, len(asked)))]
    rows = ["".join(put[at : at + 8]).lstrip() for at in range(0, len(put), 8)]
    return paragraphs(books, seed, words=130, most=most) + rows


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Give the tokens of each text, and nothing around them."""
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return found


def laid(passages: list[list[list[int]]], asked: list[list[tuple[list[int], list[int]]]]) -> Readings:
    """Lay out the passages of each row, and (question, answer) of all that is asked of them; ids in lists."""
    whole, lengths = _stacked(passages, 0, _ROUND)
    tokens, real = _stacked([[question + answer[:-1] for question, answer in row] for row in asked], 0, 8)
    told = [[[IGNORED] * (len(question) - 1) + answer for question, answer in row] for row in asked]
    nothing = torch.zeros(len(passages), 0, dtype=torch.int64)
    return Readings(whole, lengths, tokens, real, _stacked(told, IGNORED, 8)[0], nothing)


def _stacked(rows: Sequence[Sequence[Sequence[int]]], filler: int, step: int) -> tuple[Tensor, Tensor]:
    """Give lists of lists of ids as a tensor, (rows, items, ids), and the length of each, (rows, items)."""
    most = max(map(len, rows))
    width = -(-max(len(item) for row in rows for item in row) // step) * step
    whole = [[*row, *[[]] * (most - len(row))] for row in rows]
    tokens = torch.tensor([[[*item, *[filler] * (width - len(item))] for item in row] for row in whole])
    return tokens, torch.tensor([[len(item) for item in row] for row in whole])
