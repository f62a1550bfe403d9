"""Pooling against a plain loop, and int8 within its bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from l2m_rag.memory_tiers.compressor import Pooler, middles, pool, quantise, restore


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


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 18), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_a_learned_pooler_tells_order_and_pools_what_is_stored_as_it_pools_what_is_not(
    lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    values, held = torch.randn(len(lengths), 18, 6), torch.tensor(lengths)
    pooler = Pooler((1, 3, 6), 6, learned=True)
    for weight in pooler.weights:
        torch.nn.init.normal_(weight)
    with torch.no_grad():
        fine, count = pooler(values, held, 3)
        coarse, few = pooler(values, held, 6)
        again, same = pooler(fine, count, 6, grain=3)
        assert_close(again, coarse)
        assert torch.equal(same, few)
        assert torch.equal(count, pool(values, held, 3)[1])
        for row, length in enumerate(lengths):
            assert bool((fine[row, int(count[row]) :] == 0).all())
            changed = values.clone()
            changed[row, length:] = 7.0  # what is behind a record's end
            assert_close(pooler(changed, held, 6)[0], coarse)
        turned = values[:, [1, 0, *range(2, 18)]]
        told = [row for row, length in enumerate(lengths) if length > 1]
        assert not told or not torch.allclose(pooler(turned, held, 3)[0][told, 0], fine[told, 0])


def test_an_untrained_pooler_is_the_mean() -> None:
    values, held = torch.randn(2, 8, 4), torch.tensor([8, 8])
    for learned in (False, True):
        found, counts = Pooler((1, 4, 8), 4, learned=learned)(values, held, 8)
        assert_close(found, values.mean(1, keepdim=True))
        assert counts.tolist() == [1, 1]
