"""Compression of states: pooling r:1, and int8 with a scale for each vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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


class Pooler(nn.Module):
    """Pools the states of records: their mean, and what was learned to be added to it.

    A mean does not tell the order of what it is made of. Learned, a vector is mean(h_j) + sum_j W_j norm(h_j), with one
    matrix for each of its r places and norm the root mean square norm; it starts as the mean. Coarser ratios pool the
    vectors of the finer ones, so that what is stored at 4:1 can be read at 16:1.

    Args:
        ratios: they rise, start at 1, and each is a multiple of the one before.
        dim: width of the states.
        learned: whether there are such matrices.
    """

    def __init__(self, ratios: Sequence[int], dim: int, *, learned: bool) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        steps = [coarse // fine for fine, coarse in pairwise(ratios)] if learned else []
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(step, dim, dim)) for step in steps])

    def forward(self, values: Tensor, lengths: Tensor, ratio: int, *, grain: int = 1) -> tuple[Tensor, Tensor]:
        """Pool records; shapes are those of `pool`.

        Args:
            values: (..., L, D).
            lengths: vectors of each record, (...) int64.
            ratio: how many states one vector is to stand for.
            grain: how many one of `values` stands for; both are among the ratios.
        """
        if not len(self.weights):
            return pool(values, lengths, ratio // grain)
        for weight in self.weights[self.ratios.index(grain) : self.ratios.index(ratio)]:
            values, lengths = self._step(values, lengths, weight)
        return (values, lengths) if ratio > grain else pool(values, lengths, 1)

    @staticmethod
    def _step(values: Tensor, lengths: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mean, counts = pool(values, lengths, len(weight))
        inside = (torch.arange(values.shape[-2], device=values.device) < lengths[..., None])[..., None]
        normed = nn.functional.rms_norm(values, values.shape[-1:]) * inside
        groups = nn.functional.pad(normed, (0, 0, 0, -values.shape[-2] % len(weight))).unflatten(-2, (-1, len(weight)))
        return mean + groups.flatten(-2) @ weight.flatten(0, 1), counts


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
