"""What a memory model is trained for: each loss of an episode, and their sum.

An episode is a text in segments, a question that is read after it, and the answer. The text is read with gradient
through all of its segments; then the router looks for the records that hold the evidence, and the answer is decoded
from [recalled | question | answer so far].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_rag.backbone import Backbone
from l2m_rag.checkpoint import without_lora
from l2m_rag.memory_tiers import working
from l2m_rag.memory_tiers.router import LONG_TERM, NONE, STOP, WORKING
from l2m_rag.memory_tiers.working import Records
from l2m_rag.model import L2M
from l2m_rag.state import Picked, State, joined

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weight of each loss; 0 switches it off.

    Args:
        answer: cross-entropy of the answer's tokens.
        retrieval: InfoNCE over the records, any of the evidence that is left counting as right.
        router: cross-entropy of retrieving while evidence is left and stopping then.
        lookup: cost of each hop, times the probability of making it.
        keep: binary cross-entropy of the retention score: will the record be read?
        reconstruction: cross-entropy of a record's tokens, given its pooled states.
        resolution: cross-entropy of the coarsest ratio that answers as well as 1:1.
        language: cross-entropy of the text itself.
        distance: KL divergence from the backbone's own predictions on the text.
    """

    answer: float = 1.0
    retrieval: float = 1.0
    router: float = 0.3
    lookup: float = 0.0
    keep: float = 0.2
    reconstruction: float = 0.0
    resolution: float = 0.0
    language: float = 0.0
    distance: float = 0.0


class Episode(NamedTuple):
    """A batch of texts with a question each; ids are int64.

    Args:
        segments: (B, N, T).
        real: tokens of each segment that are text, (B, N); 0 for a segment that is not there.
        question: (B, Q).
        question_real: (B,).
        answer_in: what the decoder is given, a marker and the answer but for its last token, (B, A).
        answer_out: what it is to say, `IGNORED` for padding, (B, A).
        gold: positions of tokens that the answer rests on, (B, G); -1 for none.
    """

    segments: Tensor
    real: Tensor
    question: Tensor
    question_real: Tensor
    answer_in: Tensor
    answer_out: Tensor
    gold: Tensor

    def to(self, device: torch.device) -> Episode:
        """Give the episode on a device."""
        return Episode(*(part.to(device) for part in self))


class Outcome(NamedTuple):
    """What came of an episode: the losses by name, each a scalar, and figures that are watched."""

    losses: dict[str, Tensor]
    figures: dict[str, Tensor]


class EpisodeLoss(nn.Module):
    """The losses of a model on episodes, as a module, so that it can be wrapped for several devices.

    Args:
        model: the memory model.
        weights: of the losses.
        hops: most hops; `config.hops` by default.
        teacher: share of hops in which the evidence is recalled rather than what the model would choose.
        margin: how much worse, in nats a token, a coarser reading may answer, for `resolution`.
        memory: whether anything is recalled, and slots are read; False trains the same model without.
    """

    def __init__(
        self,
        model: L2M,
        weights: LossWeights,
        *,
        hops: int | None = None,
        teacher: float = 0.5,
        margin: float = 0.1,
        memory: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.weights, self.memory = model, weights, memory
        self.hops = hops or model.config.hops
        self.teacher, self.margin = teacher, margin

    def forward(self, episode: Episode) -> Outcome:
        """Give the weighted losses, their sum under "total", and figures."""
        state, evicted, text = self.read(episode)
        losses = dict(text)
        figures: dict[str, Tensor] = {}
        recalled: Picked | None = None
        if not self.memory:  # nor do the slots tell of the text
            state = replace(state, slots=self.model.slots.start(len(episode.segments)))
        if self.memory:
            recalled, found, figures = self._recall(state, evicted, episode)
            losses |= found
        logits = self._answer(episode, state, recalled)
        losses["answer"] = _cross_entropy(logits, episode.answer_out)
        figures["right"] = _right(logits, episode.answer_out)
        if self.memory and recalled is not None and self.weights.reconstruction:
            losses["reconstruction"] = self._reconstruct(state)
        if self.memory and recalled is not None and self.weights.resolution:
            losses["resolution"] = self._resolution(episode, state, recalled)
        weighted = {name: value for name, value in losses.items() if getattr(self.weights, name)}
        total = sum((getattr(self.weights, name) * value for name, value in weighted.items()), torch.zeros(()))
        return Outcome({**losses, "total": total}, figures)

    def read(self, episode: Episode) -> tuple[State, Records, dict[str, Tensor]]:
        """Read text and question with gradient; give the state, what was evicted, and the losses on the text itself."""
        model = self.model
        B, N, T = episode.segments.shape
        x = model.backbone.lower(episode.segments.flatten(0, 1)).unflatten(0, (B, N))
        state, gone = model.start(B), []
        losses: dict[str, list[Tensor]] = {"language": [], "distance": []}
        for number in range(N):
            tokens, real = episode.segments[:, number], episode.real[:, number]
            if self.weights.language or self.weights.distance:
                logits = model.decode(x[:, number], state, None)
                targets = tokens[:, 1:].masked_fill(torch.arange(1, T, device=x.device) >= real[:, None], IGNORED)
                losses["language"].append(_cross_entropy(logits[:, :-1], targets))
                if self.weights.distance:
                    inside = torch.arange(T, device=x.device) < real[:, None]
                    losses["distance"].append(distance(model.backbone, x[:, number], logits, inside))
            state, evicted = model.write(state, x[:, number], tokens, real)
            gone.append(evicted)
        asked = model.backbone.lower(episode.question)
        state, evicted = model.write(state, asked, episode.question, episode.question_real)
        far = Records(*(torch.cat(column, 1).detach() for column in zip(*gone, evicted, strict=True)))
        return state, far, {name: torch.stack(parts).mean() for name, parts in losses.items() if parts}

    # -- the router ----------------------------------------------------------------------------------------------------
    def _recall(
        self, state: State, evicted: Records, episode: Episode
    ) -> tuple[Picked | None, dict[str, Tensor], dict[str, Tensor]]:
        """Look for the evidence, hop by hop, in any order; give what was recalled, losses and figures.

        Evidence in working memory comes first; what was evicted stands for the long-term tier.
        """
        model, records = self.model, working.insert(state.records, evicted)
        far = torch.arange(records.lengths.shape[1], device=records.lengths.device) >= model.places  # (R,)
        gold = _holds(records, episode.gold)  # (B, R)
        free = (records.lengths > 0) & ~state.in_window(records.starts)
        left = gold & free  # what stands in the window is seen as it is
        plan = state.plan
        parts: list[Picked] = []
        retrieval: list[Tensor] = []
        router: list[Tensor] = []
        looked: list[Tensor] = []
        hits: list[Tensor] = []
        going = torch.ones_like(state.position, dtype=torch.bool)
        for hop in range(self.hops + 1):
            more, near = left.any(1), (left & ~far).any(1)
            wanted = torch.where(near, WORKING, torch.where(more, LONG_TERM, NONE if hop == 0 else STOP))
            router.append(masked_mean(F.cross_entropy(plan.choice.float(), wanted, reduction="none"), going))
            looked.append(plan.choice.float().softmax(-1)[:, [WORKING, LONG_TERM]].sum(-1).mean())
            going = going & more
            if hop == self.hops:
                break
            nowhere = torch.zeros(len(left), 0, dtype=torch.int64, device=left.device)
            before = torch.cat([part.starts for part in parts], 1) if parts else nowhere
            taken = torch.cat([part.taken for part in parts], 1) if parts else nowhere.bool()
            scores = model.router.scores(plan, records.keys, records.starts, before, taken, state.position).float()
            there = free & (far == (wanted == LONG_TERM)[:, None])  # in the tier that is asked
            aims = left & there
            scores = scores.masked_fill(~there, -1e9)
            right = torch.logsumexp(scores.masked_fill(~aims, -1e9), 1) - torch.logsumexp(scores, 1)
            retrieval.append(masked_mean(-right, going))
            hits.append(masked_mean(aims.gather(1, scores.argmax(1, keepdim=True))[:, 0].float(), going))
            places = self._places(scores, aims, there)
            picked = model.picked(records, places, there.gather(1, places) & going[:, None])
            parts.append(model.stored(picked, far[places]))
            marks = torch.zeros_like(left).scatter(1, places, True)
            left, free = left & ~marks, free & ~marks
            plan = model.router(state.gist, state.slots, state.records.occupancy, joined(parts).mean(), hop + 1)
        losses = {"router": torch.stack(router).mean(), "lookup": torch.stack(looked).sum()}
        losses["retrieval"] = torch.stack(retrieval).sum() / self.hops
        keep = model.router.keeps(state.plan, records, state.step).float()
        real = (records.lengths > 0).float()
        losses["keep"] = (
            F.binary_cross_entropy_with_logits(keep, gold.float(), reduction="none") * real
        ).sum() / real.sum()
        return joined(parts) if parts else None, losses, {"retrieved": hits[0]}

    def _places(self, scores: Tensor, left: Tensor, free: Tensor) -> Tensor:
        """Give the records that a hop takes, (B, P): the model's own choice, or with some chance the evidence."""
        count = min(self.model.config.recall, scores.shape[1])
        own = scores.masked_fill(~free, -2e9)
        led = own + 1e6 * left
        teach = torch.rand(len(scores), 1, device=scores.device) < self.teacher
        return torch.where(teach, led, own).topk(count, dim=1).indices

    # -- reading what was recalled -------------------------------------------------------------------------------------
    def _answer(self, episode: Episode, state: State, recalled: Picked | None) -> Tensor:
        x = self.model.backbone.lower(episode.answer_in)
        return self.model.decode(x, state, self.model.assemble([recalled]))

    def _reconstruct(self, state: State) -> Tensor:
        """Write the tokens of one record of each stream back from its pooled states."""
        model, records = self.model, state.records
        weight = (records.lengths > 0).float() + 1e-9
        place = torch.multinomial(weight, 1)
        ratios = model.config.ratios[1:] or (1,)
        ratio = ratios[int(torch.randint(len(ratios), ()))]
        picked = model.picked(records, place, records.lengths.gather(1, place) > 0, ratio)
        tokens, lengths = picked.tokens[:, 0], picked.lengths[:, 0]
        bare = model.start(len(tokens))
        logits = model.decode(model.backbone.lower(tokens), bare, model.assemble([picked]))
        inside = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]
        return _cross_entropy(logits[:, :-1], tokens[:, 1:].masked_fill(~inside, IGNORED))

    def _resolution(self, episode: Episode, state: State, recalled: Picked) -> Tensor:
        """Teach the coarsest ratio, from not at all on, whose answer is within the margin of reading all at 1:1."""
        model, ratios = self.model, self.model.config.ratios
        with torch.no_grad():
            each = []
            for ratio in (*ratios, 0):
                read = recalled._replace(ratio=recalled.grain.clamp(min=ratio))
                logits = self._answer(episode, state, read if ratio else None)
                each.append(_row_losses(logits, episode.answer_out))
            worth = torch.stack(each, 1) <= each[0][:, None] + self.margin  # (B, ratios + 1)
            numbers = torch.arange(len(ratios) + 1, device=worth.device)
            target = torch.where(worth, numbers, 0).amax(1)
        plan, nothing = state.plan, torch.zeros_like(recalled.place[:, :0])
        scores = model.router.scores(plan, recalled.keys, recalled.starts, nothing, nothing.bool(), state.position)
        logits = model.router.resolutions(plan, recalled.keys, scores, recalled.lengths).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), target[:, None].expand(recalled.place.shape).flatten(), reduction="none"
        )
        return masked_mean(loss, recalled.taken.flatten())


def distance(backbone: Backbone, x: Tensor, logits: Tensor, inside: Tensor) -> Tensor:
    """Give the KL divergence of predictions from the backbone's own, nats a token, a scalar.

    The backbone's own are made without memory and adapters.

    Args:
        backbone: with or without adapters.
        x: lower states of texts, (B, T, D).
        logits: what is predicted behind each, (B, T, V).
        inside: which of them count, (B, T) bool.
    """
    with torch.no_grad(), without_lora(backbone):
        alone = backbone.head(backbone.upper(x, torch.arange(x.shape[1], device=x.device)[None]))
    gap = F.kl_div(logits.float().log_softmax(-1), alone.float().log_softmax(-1), log_target=True, reduction="none")
    return masked_mean(gap.sum(-1), inside)


def _holds(records: Records, gold: Tensor) -> Tensor:
    """Say which records hold a position of the evidence, (B, R) bool."""
    first, last = records.starts[..., None], (records.starts + records.lengths)[..., None]
    return ((first <= gold[:, None]) & (gold[:, None] < last) & (gold[:, None] >= 0)).any(-1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    each = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the share of answers whose every token is the likeliest."""
    fits = (logits.argmax(-1) == targets) | (targets == IGNORED)
    return fits.all(1).float().mean()


def masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Give the mean of the values that count, a scalar; 0 when none does."""
    return (values * counted).sum() / counted.sum().clamp(min=1)
