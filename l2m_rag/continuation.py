"""Writing on from a state, token by token, with the memory at work.

The router looks at each token with one small linear layer. When that fires, or the segment is full, the segment is
closed: it is written into memory, the router recalls, and the upper layers' cache is made anew over
[recalled | window]. The lower layers' cache stays until the segment is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.model import L2M, Hop
from l2m_rag.state import State

Choose = Callable[[Tensor], Tensor]
"""Gives a token, (B,) int64, for the logits of each stream, (B, V)."""


class Continuation:
    """Streams that are being written on.

    Args:
        model: the memory model.
        state: after the text, or the question, that is to be continued; its window must hold at least a token.
        tier: the long-term tier.

    `state` is that of the last closed segment, `hops` what was recalled for the present one, and `rebuilds` how often
    the upper layers' cache was made anew since the start.
    """

    def __init__(self, model: L2M, state: State, tier: StateTier | None = None) -> None:
        if not state.window.shape[1]:
            raise ValueError("nothing stands in the window to be continued; read a question first")
        model.check_tier(tier)
        self.model, self.state, self.tier = model, state, tier
        self.hops: list[Hop] = []
        self.rebuilds = -1
        self._lower, self._first = DynamicCache(), 0  # cache of the lower layers, and how many tokens are in it
        self._tokens: list[Tensor] = []  # of the open segment, (B,) each
        self._x: list[Tensor] = []  # their states at encoder depth, (B, 1, D) each
        self._next: Tensor = state.position  # place of the newest position in the upper layers, (B,)
        self._real: Tensor | None = None
        self.logits = self._open()

    def feed(self, tokens: Tensor) -> Tensor:
        """Take one token of each stream, (B,) int64, and give the logits of the next, (B, V)."""
        x = self.model.backbone.lower(tokens[:, None], first=self._first, cache=self._lower)
        self._first += 1
        self._tokens.append(tokens)
        self._x.append(x)
        full = self._first == self.model.config.segment_length
        if full or bool((self.model.router.fire(x) > 0).any()):
            self.close()
            if full:
                self._lower, self._first = DynamicCache(), 0
            self.logits = self._open()
        else:
            mask, real = None, self._real
            if real is not None:
                self._real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
                mask = self._real[:, None, None]
            self._next = self._next + 1
            self.logits = self._top(x, self._next[:, None], mask)
        return self.logits

    def close(self) -> State:
        """Write what was taken since the last time into memory, and give the state."""
        if self._x:
            x, tokens = torch.cat(self._x, 1), torch.stack(self._tokens, 1)
            self.state, evicted = self.model.write(self.state, x, tokens, None, self._records)
            if self.tier is not None:
                self.model.store(evicted, self.state, self.tier)
            self._tokens, self._x = [], []
        return self.state

    def _open(self) -> Tensor:
        """Recall, and make the upper layers' cache over [recalled | window]; give the logits behind the window."""
        state = self.state
        self.hops, self._records = self.model.recall(state, self.tier)
        recalled = self.model.assemble([hop.picked for hop in self.hops])
        nothing = state.window[:, :0]
        sequence, positions, mask, self._real = self.model.sequence(nothing, state, recalled)
        self._next = positions[:, -1].expand(len(sequence))
        self._upper = DynamicCache()
        self._between = self.model.slot_reader(state.slots)
        self.rebuilds += 1
        return self._top(sequence, positions, mask)

    def _top(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        top = self.model.backbone.upper(x, positions, mask, cache=self._upper, between=self._between)
        return self.model.backbone.head(top[:, -1])


@torch.no_grad()
def write_on(
    model: L2M,
    state: State,
    tier: StateTier | None = None,
    *,
    most: int = 64,
    ends: frozenset[int] = frozenset(),
    choose: Choose = lambda logits: logits.argmax(-1),
) -> Iterator[tuple[Tensor, State]]:
    """Write on from a state.

    Args:
        model: the memory model.
        state: after the question.
        tier: the long-term tier.
        most: tokens at most.
        ends: ids that end the text of a stream; writing stops when all have ended.
        choose: how a token is chosen; greedily by default.

    Yields:
        The tokens, (B,) int64, and the state of the last closed segment.
    """
    writing = Continuation(model, state, tier)
    ended = torch.zeros(len(state.streams), dtype=torch.bool, device=state.gist.device)
    for _ in range(most):
        tokens = choose(writing.logits)
        yield tokens, writing.state
        for end in ends:
            ended = ended | (tokens == end)
        if ends and bool(ended.all()):
            return
        writing.feed(tokens)
