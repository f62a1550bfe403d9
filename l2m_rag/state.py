"""What a memory model carries from step to step, as a value: passed in, handed back, never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from l2m_rag.memory_tiers.router import Plan
from l2m_rag.memory_tiers.working import Records


@dataclass(frozen=True, slots=True)
class State:
    """The memory of a batch of streams that know nothing of each other.

    Args:
        slots: (B, S, D).
        records: of working memory, (B, R, ...).
        window: states at encoder depth of the last tokens read, (B, W, D).
        window_real: which of those are text and not padding, (B, W) bool; None for all.
        gist: mean state of the segment before, (B, D).
        position: tokens read so far, (B,) int64.
        plan: for the step that comes.
        step: how many segments were read, (B,) int64.
        streams: name of each stream in the long-term tier.
    """

    slots: Tensor
    records: Records
    window: Tensor
    window_real: Tensor | None
    gist: Tensor
    position: Tensor
    plan: Plan
    step: Tensor
    streams: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of working memory and window on the device."""
        parts = [self.slots, self.window, self.gist]
        return self.records.nbytes + sum(part.numel() * part.element_size() for part in parts)

    def in_window(self, starts: Tensor) -> Tensor:
        """Say which records, by the position of their first token, (B, R), stand whole in the window, (B, R) bool."""
        shown = self.window.shape[1] if self.window_real is None else self.window_real.sum(1)
        return starts >= (self.position - shown)[:, None]

    def detach(self) -> State:
        """Give the same values without the graph that made them, as truncated backpropagation needs it."""
        return self._each(lambda part: part.detach())

    def rows(self, chosen: Tensor) -> State:
        """Give some of the streams, by number, (N,) int64."""
        names = tuple(self.streams[row] for row in chosen.tolist())
        return replace(self._each(lambda part: part[chosen.to(part.device)]), streams=names)

    def _each(self, change: Callable[[Tensor], Tensor]) -> State:
        plan = self.plan._replace(
            choice=change(self.plan.choice),
            source=change(self.plan.source),
            query=change(self.plan.query),
            order=change(self.plan.order),
            hidden=change(self.plan.hidden),
            source_host=change(self.plan.source_host),
        )
        return State(
            change(self.slots),
            Records(*map(change, self.records)),
            change(self.window),
            None if self.window_real is None else change(self.window_real),
            change(self.gist),
            change(self.position),
            plan,
            change(self.step),
            self.streams,
        )


class Picked(NamedTuple):
    """Records that a step recalls, best first within a hop.

    Args:
        values: (B, P, L, D); of a record of grain g only the first ceil(length / g) count.
        keys: (B, P, K).
        tokens: ids, (B, P, L) int64.
        lengths: tokens, (B, P) int64; 0 for none.
        starts: (B, P) int64.
        grain: how many tokens one of the values stands for, (B, P) int64.
        ratio: at which it is read, (B, P) int64; 0 for not at all.
        place: in working memory, or row in the long-term tier, (B, P) int64; -1 for none.
        long_term: whether it is the latter, (B, P) bool.
    """

    values: Tensor
    keys: Tensor
    tokens: Tensor
    lengths: Tensor
    starts: Tensor
    grain: Tensor
    ratio: Tensor
    place: Tensor
    long_term: Tensor

    @property
    def taken(self) -> Tensor:
        """Which are records at all, (B, P) bool."""
        return self.lengths > 0

    def mean(self) -> Tensor:
        """Give the mean state over all that was picked, zeros for nothing, (B, D)."""
        counts = (self.lengths + self.grain - 1) // self.grain  # (B, P)
        inside = torch.arange(self.values.shape[2], device=self.values.device) < counts[..., None]
        total = (self.values * inside[..., None]).sum((1, 2))
        return total / counts.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def joined(parts: Sequence[Picked]) -> Picked:
    """Give what several hops picked as one."""
    return parts[0] if len(parts) == 1 else Picked(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


class Recalled(NamedTuple):
    """What enters the upper layers before the window.

    Args:
        vectors: (B, K, D), in the order of their documents, padding first.
        real: which are no padding, (B, K) bool; None for all.
        places: position of each, (B, K) float32.
        span: positions that all of them take, (B,) float32.
    """

    vectors: Tensor
    real: Tensor | None
    places: Tensor
    span: Tensor
