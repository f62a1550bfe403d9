"""The router: what it says untrained, and places relative to what was recalled against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from l2m_rag.memory_tiers.router import NONE, Router, relative_places


def test_untrained_it_recalls_nothing_and_reads_in_full() -> None:
    router = Router(16, 8, 3)
    plan = router(torch.randn(5, 16), torch.randn(5, 4, 16), torch.rand(5), torch.zeros(5, 16), 0)
    assert plan.wants() == [NONE] * 5
    assert_close(plan.query.norm(dim=-1), torch.ones(5))
    ratios = router.resolutions(plan, torch.randn(5, 2, 8), torch.randn(5, 2), torch.full((5, 2), 4))
    assert (ratios.argmax(-1) == 0).all()
    assert (router.fire(torch.randn(5, 16)) < 0).all()


def test_keys_do_not_depend_on_padding() -> None:
    router = Router(16, 8, 3)
    values = torch.randn(2, 6, 16)
    short = values[:, :4]
    padded = torch.nn.functional.pad(short, (0, 0, 0, 2))
    lengths = torch.tensor([4, 4])
    assert_close(router.keys(short, lengths), router.keys(padded, lengths))
    assert torch.isfinite(router.keys(0 * values, torch.zeros(2, dtype=torch.int64))).all()


@settings(max_examples=50, deadline=None)
@given(
    starts=st.lists(st.integers(0, 99), min_size=1, max_size=8),
    recalled=st.lists(st.integers(0, 99), max_size=4, unique=True),
    hidden=st.lists(st.integers(0, 99), max_size=3),
)
def test_relative_places_are_q_rags(starts: list[int], recalled: list[int], hidden: list[int]) -> None:
    told = torch.tensor([[*recalled, *hidden]], dtype=torch.int64)
    taken = torch.tensor([[True] * len(recalled) + [False] * len(hidden)], dtype=torch.bool)
    found = relative_places(torch.tensor([starts]), told, taken, torch.tensor([100]))
    borders = [0, *sorted(recalled), 100]
    for place, start in zip(found[0].tolist(), starts, strict=True):
        number = sum(border <= start for border in borders[1:-1])
        before, behind = borders[number], borders[number + 1]
        assert abs(place - (10 * number + 9 * (start - before) / max(1, behind - before))) < 1e-4


def test_with_nothing_recalled_the_place_is_the_share_of_the_text() -> None:
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    places = relative_places(torch.tensor([[0, 50]]), nothing, nothing.bool(), torch.tensor([100]))
    assert places.tolist() == [[0.0, 4.5]]
