"""Working memory: slots of gated state, and the ring of the most recent records.

All of it is tensors that are passed in and handed back, one row of the batch for each stream; no operation here waits
for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Records(NamedTuple):
    """Records of the working memory, one row of places for each stream. A place of length 0 is empty.

    Args:
        values: states at encoder depth, (B, R, L, D).
        keys: unit length, (B, R, K).
        tokens: ids that the states were made of, (B, R, L) int64.
        lengths: tokens in each record, (B, R) int64.
        starts: position of its first token in its stream, (B, R) int64.
        written: step in which it was written, (B, R) int64.
        read_at: step in which it was last read, or written, (B, R) int64.
        reads: how often it was read, (B, R) int64.
    """

    values: Tensor
    keys: Tensor
    tokens: Tensor
    lengths: Tensor
    starts: Tensor
    written: Tensor
    read_at: Tensor
    reads: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.numel() * part.element_size() for part in self)

    def at(self, places: Tensor) -> Records:
        """Give the records at places, (B, P) int64 -> (B, P, ...)."""
        return Records(*(_gather(part, places) for part in self))

    @property
    def occupancy(self) -> Tensor:
        """Share of the places that are taken, (B,) float32."""
        return (self.lengths > 0).float().mean(1)


def empty_records(
    batch: int, places: int, length: int, dim: int, key_dim: int, dtype: torch.dtype, device: torch.device
) -> Records:
    """Give `places` empty places for each of `batch` streams."""
    numbers = [torch.zeros(batch, places, dtype=torch.int64, device=device) for _ in range(5)]
    return Records(
        torch.zeros(batch, places, length, dim, dtype=dtype, device=device),
        torch.zeros(batch, places, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, places, length, dtype=torch.int64, device=device),
        *numbers,
    )


def places_within(budget: int, length: int, dim: int, key_dim: int, dtype: torch.dtype) -> int:
    """Give how many records of a stream a number of bytes holds."""
    return budget // empty_records(1, 1, length, dim, key_dim, dtype, torch.device("cpu")).nbytes


def split(x: Tensor, tokens: Tensor, real: Tensor, position: Tensor, step: Tensor, length: int) -> tuple[Tensor, ...]:
    """Cut a segment into records without keys.

    Args:
        x: states, (B, T, D).
        tokens: ids, (B, T).
        real: number of tokens of each row that are text, (B,) int64; what follows is padding.
        position: of the first token in its stream, (B,) int64.
        step: number of this step, (B,) int64.
        length: most tokens in a record.

    Returns:
        The fields of `Records` less the keys, for N = ceil(T / length) records.
    """
    B, T, _ = x.shape
    count = -(-T // length)
    rest = count * length - T
    values = nn.functional.pad(x, (0, 0, 0, rest)).unflatten(1, (count, length))
    ids = nn.functional.pad(tokens, (0, rest)).unflatten(1, (count, length))
    first = torch.arange(0, count * length, length, device=x.device)
    lengths = (real[:, None] - first).clamp(0, length)
    inside = torch.arange(length, device=x.device) < lengths[..., None]
    now = step[:, None].expand(B, count)
    return (
        values * inside[..., None],
        ids * inside,
        lengths,
        (position[:, None] + first) * (lengths > 0),
        now,
        now,
        torch.zeros_like(now),
    )


def insert(records: Records, new: Records) -> Records:
    """Give the records with new ones behind them: (B, R + N, ...)."""
    return Records(*(torch.cat([old, more], dim=1) for old, more in zip(records, new, strict=True)))


def evict(records: Records, scores: Tensor, room: int) -> tuple[Records, Records]:
    """Keep the `room` records of each row with the highest scores, in their order, and give the others too.

    Args:
        records: (B, R, ...).
        scores: higher is kept longer, (B, R); empty places go first whatever theirs.
        room: how many places are left.

    Returns:
        (kept, evicted): (B, room, ...) and (B, R - room, ...); an evicted place may be empty.
    """
    scores = scores.detach().float().masked_fill(records.lengths == 0, -torch.inf)
    order = torch.argsort(scores, dim=1, stable=True)  # of equals the older goes first
    out = records.lengths.shape[1] - room
    return records.at(order[:, out:].sort(dim=1).values), records.at(order[:, :out].sort(dim=1).values)


def touch(records: Records, places: Tensor, picked: Tensor, step: Tensor) -> Records:
    """Note that records were read.

    Args:
        records: (B, R, ...).
        places: (B, P) int64.
        picked: which of those count, (B, P) bool.
        step: number of this step, (B,) int64.
    """
    reads = records.reads.scatter_add(1, places, picked.long())
    read = torch.zeros_like(reads).scatter_add(1, places, picked.long()) > 0
    return records._replace(reads=reads, read_at=torch.where(read, step[:, None], records.read_at))


def _gather(part: Tensor, places: Tensor) -> Tensor:
    index = places.view(*places.shape, *[1] * (part.dim() - 2)).expand(*places.shape, *part.shape[2:])
    return part.gather(1, index)


class Slots(nn.Module):
    """A few rows of gated state, written once a segment.

    LM2's update (arXiv 2502.06049, section 2): `M' = g_in * tanh(E_mem) + g_forget * M` with
    `g_in = sigmoid(W_in E)` and `g_forget = sigmoid(W_forget E_mem)`. Deviations: each slot attends over the
    segment's tokens, so both gates see what this slot read (theirs: a gate for each token, averaged over tokens that
    come later too); the forget gate's bias starts at +1; with `delta` what the slot held is taken off before the new
    is written, `M' = g_forget * M + g_in * (tanh(E_mem) - g_forget * M)`, the delta rule of ARMT (arXiv 2407.04841,
    eq. 5) with the slot as address; only the `written` slots whose queries fit the segment best
    change, the rest are shielded.

    Args:
        dim: D.
        slots: S.
        heads: number of heads; must divide `dim`.
        written: most slots that change in a step.
        delta: whether the delta rule is used.
    """

    def __init__(self, dim: int, slots: int, heads: int, written: int, *, delta: bool = True) -> None:
        super().__init__()
        self.heads, self.written, self.delta = heads, min(written, slots), delta
        self.initial = nn.Parameter(torch.randn(slots, dim) / dim**0.5)
        self.address = nn.Parameter(torch.randn(slots, dim) / dim**0.5)  # what tells a slot from the others for good
        self.norm = nn.RMSNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.input_gate = nn.Linear(dim, dim)
        self.forget_gate = nn.Linear(dim, dim)
        nn.init.zeros_(self.input_gate.bias)
        nn.init.ones_(self.forget_gate.bias)

    def start(self, batch: int) -> Tensor:
        """Give the slots before anything was read, (B, S, D)."""
        return self.initial.expand(batch, -1, -1)

    def forward(self, slots: Tensor, x: Tensor, real: Tensor) -> Tensor:
        """Write a segment into the slots.

        Args:
            slots: (B, S, D).
            x: states of the segment, (B, T, D).
            real: number of tokens of each row that are text, (B,); a row without any leaves its slots as they are.

        Returns:
            (B, S, D).
        """
        inside = torch.arange(x.shape[1], device=x.device) < real[:, None]  # (B, T)
        seen = self.norm(x)
        query, key, value = (
            self._split(part) for part in (self.query(slots + self.address), self.key(seen), self.value(seen))
        )
        fit = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5  # (B, H, S, T)
        fit = fit.float().masked_fill(~inside[:, None, None], -1e9)  # not infinity: a row may hold nothing but padding
        read = (fit.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, S, D)
        take, keep = torch.sigmoid(self.input_gate(read)), torch.sigmoid(self.forget_gate(read))
        held = keep * slots
        new = held + take * (torch.tanh(read) - held if self.delta else torch.tanh(read))
        best = fit.logsumexp(-1).mean(1).topk(self.written, dim=1).indices
        open_ = torch.zeros(slots.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, True)
        return torch.where((open_ & (real > 0)[:, None])[..., None], new, slots)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
