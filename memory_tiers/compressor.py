"""Compression of states: mean-pooling r:1, and int8 with a scale for each vector."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(values: Tensor, lengths: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Mean-pool the states of records r:1 (better than compression tokens in arXiv 2510.20797).

    Args:
        values: (..., L, D); what is at or behind `lengths` is passed over.
        lengths: tokens in each record, (...) int64.
        ratio: how many states one vector stands for; >= 1.

    Returns:
        Vectors (..., ceil(L / r), D), zero where they stand for nothing, and how many there are in each record, (...).
    """
    length = values.shape[-2]
    inside = (torch.arange(length, device=values.device) < lengths[..., None])[..., None].to(values.dtype)
    if ratio == 1:
        return values * inside, lengths
    rest = -length % ratio
    padded = torch.nn.functional.pad(values * inside, (0, 0, 0, rest)).unflatten(-2, (-1, ratio))
    counts = torch.nn.functional.pad(inside, (0, 0, 0, rest)).unflatten(-2, (-1, ratio)).sum(-2)
    return padded.sum(-2) / counts.clamp(min=1), (lengths + ratio - 1) // ratio


def middles(lengths: Tensor, count: int, ratio: int) -> Tensor:
    """Give where in its record the span of each pooled vector has its middle, (..., count) float32."""
    first = torch.arange(count, device=lengths.device) * ratio
    last = torch.minimum(first + ratio, lengths[..., None]) - 1
    return (first + torch.maximum(last, first)) / 2


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Turn vectors into int8 with one scale each.

    Args:
        values: (..., D).

    Returns:
        (..., D) int8 and (...) float32; `restore` errs by at most half a scale in each entry.
    """
    wide = values.float()
    scales = wide.abs().amax(-1) / 127
    return torch.round(wide / scales.clamp(min=1e-30)[..., None]).clamp(-127, 127).to(torch.int8), scales


def restore(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantise`; values that are no int8 are only cast."""
    if values.dtype != torch.int8:
        return values.to(dtype)
    return (values.float() * scales.float()[..., None]).to(dtype)
