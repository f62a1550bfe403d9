"""Pooling against a plain loop, and int8 within its bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from l2m_rag.memory_tiers.compressor import middles, pool, quantise, restore


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), ratio=st.integers(1, 12))
def test_pooling_is_a_mean_over_what_is_there(lengths: list[int], ratio: int) -> None:
    values = torch.randn(len(lengths), 9, 4)
    pooled, counts = pool(values, torch.tensor(lengths), ratio)
    places = middles(torch.tensor(lengths), pooled.shape[1], ratio)
    for row, length in enumerate(lengths):
        spans = [range(start, min(start + ratio, length)) for start in range(0, length, ratio)]
        assert int(counts[row]) == len(spans)
        for number, span in enumerate(spans):
            assert_close(pooled[row, number], values[row, list(span)].mean(0))
            assert float(places[row, number]) == sum(span) / len(span)
        assert pooled[row, len(spans) :].abs().sum() == 0


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(1e-20, 1e20), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_restores_within_half_a_step(scale: float, seed: int, dtype: torch.dtype) -> None:
    values = (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    codes, scales = quantise(values)
    assert codes.dtype == torch.int8
    error = (restore(codes, scales, torch.float32) - values.float()).abs()
    assert (error <= 0.501 * scales[..., None]).all()


def test_zeros_stay_zeros_and_other_types_are_only_cast() -> None:
    codes, scales = quantise(torch.zeros(2, 3))
    assert restore(codes, scales, torch.float32).abs().sum() == 0
    half = torch.randn(2, 3).half()
    assert torch.equal(restore(half, torch.ones(2), torch.float32), half.float())
