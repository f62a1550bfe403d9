"""What a memory model is made of; a checkpoint carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l2m_rag.errors import ConfigError
from l2m_rag.memory_tiers.eviction import POLICIES, Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class L2MConfig:
    """Sizes of the memory around a backbone.

    Args:
        depth: layers in the frozen encoder half.
        segment_length: most tokens read in one step (T).
        record_length: most tokens in a record (L).
        window: positions of the segments before that the upper layers see.
        slots: rows of gated state (S); 0 switches them off.
        slot_heads: heads of reading and writing them.
        slot_layers: upper layers before which the slots are read.
        slots_written: most slots that change in a step.
        delta: whether slots are written by the delta rule.
        key_dim: width of the key space (K).
        records: most records in the working memory of a stream.
        working_bytes: most bytes they take in a stream; 0 is no limit.
        recall: most records recalled in a hop.
        hops: most hops in a step.
        budget: most positions that recalled records take in the upper layers.
        ratios: how finely a record can be read, finest first.
        stored_ratio: at which of them it goes to the long-term tier.
        pooling: a pooled vector is the "mean" of the states that it stands for, or that and what was "learned".
        positions: a pooled vector sits in the "middle" of its span, or takes one position ("packed").
        eviction: policy of the working memory.
    """

    depth: int = 10
    segment_length: int = 512
    record_length: int = 64
    window: int = 512
    slots: int = 64
    slot_heads: int = 9
    slot_layers: tuple[int, ...] = (12, 16, 20, 24, 28)
    slots_written: int = 4
    delta: bool = True
    key_dim: int = 192
    records: int = 64
    working_bytes: int = 0
    recall: int = 8
    hops: int = 4
    budget: int = 1024
    ratios: tuple[int, ...] = (1, 4, 16)
    stored_ratio: int = 4
    pooling: Literal["mean", "learned"] = "mean"
    positions: Literal["middle", "packed"] = "middle"
    eviction: Policy = "learned"

    def __post_init__(self) -> None:
        for name in ("depth", "segment_length", "record_length", "key_dim", "records", "recall", "hops", "budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.window < 0 or self.slots < 0 or self.working_bytes < 0:
            raise ConfigError(
                f"window ({self.window}), slots ({self.slots}), working_bytes ({self.working_bytes}) must be at least 0"
            )
        if not self.ratios or self.ratios[0] != 1 or list(self.ratios) != sorted(set(self.ratios)):
            raise ConfigError(f"ratios ({list(self.ratios)}) must rise, and start at 1")
        if any(coarse % fine for fine, coarse in zip(self.ratios, self.ratios[1:], strict=False)):
            raise ConfigError(f"each of the ratios ({list(self.ratios)}) must be a multiple of the one before")
        if self.stored_ratio not in self.ratios:
            raise ConfigError(f"stored_ratio ({self.stored_ratio}) must be one of the ratios ({list(self.ratios)})")
        if self.eviction not in POLICIES or self.eviction == "belady":  # which would have to know the future
            raise ConfigError(f"eviction ({self.eviction}) must be one of {', '.join(POLICIES[:-1])}")
        if self.pooling not in ("mean", "learned"):
            raise ConfigError(f"pooling ({self.pooling}) must be mean or learned")
        if self.positions not in ("middle", "packed"):
            raise ConfigError(f"positions ({self.positions}) must be middle or packed")
