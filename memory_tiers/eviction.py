"""Which record goes when working memory is full: a learned score, beside the policies it is measured against."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from l2m_rag.memory_tiers.working import Records

Policy = Literal["learned", "lru", "lfu", "fifo", "random", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def retention(
    policy: Policy,
    records: Records,
    step: Tensor,
    *,
    keep: Tensor | None = None,
    next_read: Tensor | None = None,
) -> Tensor:
    """Give a score for each record; the lowest goes first.

    Args:
        policy: "learned" takes `keep` as it is; "lru" by the last read, "lfu" by the number of reads (of equals the
            one read last stays; what came in this step stays), "fifo" by age, "random" by a hash of position and step,
            so that a run can be repeated; "belady" by `next_read`, the optimum where what was evicted can come back
            (Belady, IBM Systems Journal 1966).
        records: (B, R, ...).
        step: number of this step, (B,) int64.
        keep: the router's score, (B, R); for "learned".
        next_read: step in which the record is read next, larger than any step for never, (B, R); for "belady".

    Returns:
        (B, R) float32.
    """
    if policy == "learned":
        if keep is None:
            raise ValueError("policy 'learned' needs the router's keep scores")
        return keep.float()
    if policy == "belady":
        if next_read is None:
            raise ValueError("policy 'belady' needs the steps of the next reads")
        return -next_read.float()
    if policy == "lru":
        return records.read_at.float()
    if policy == "lfu":
        newest = records.read_at.amax(1, keepdim=True) + 1
        score = records.reads.float() + records.read_at.float() / newest
        return score.masked_fill(records.written == step[:, None], torch.inf)  # it had no time to be read yet
    if policy == "fifo":
        return records.written.float()
    mixed = (records.starts * 2654435761 + (step[:, None] + 1) * 2246822519 + 97) % 4294967296
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 4294967296
    return ((mixed ^ (mixed >> 13)) * 3266489917 % 4294967296).to(torch.float32)
