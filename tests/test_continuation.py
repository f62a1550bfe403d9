"""Writing on token by token against decoding in one go."""

import pytest
import torch
from memory_models import FAMILIES, text, tiny_model
from torch.testing import assert_close

from l2m_rag.continuation import Continuation, write_on
from l2m_rag.memory_tiers.states import StateTier


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["none", "working", "long_term"])
def test_token_by_token_equals_one_go_with_records_recalled(family: str, source: str) -> None:
    model = tiny_model(family, source=source, gates=0.5, window=5)
    tier = StateTier(model.state_format())
    answer = text(2, 11, seed=5)
    with torch.no_grad():
        state = model.read(text(2, 60), model.start(2), tier)
        state = model.read(text(2, 7, seed=4), state, tier)
        writing = Continuation(model, state, tier)  # first: a step puts more into the tier
        step = model.step(answer, state, tier)
        found = [writing.logits]
        found += [writing.feed(answer[:, at]) for at in range(11)]
    recalled = [hop.picked for hop in step.hops if hop.picked is not None]
    assert bool(recalled) == (source != "none")
    assert_close(torch.stack(found[1:], 1), step.logits, atol=1e-4, rtol=1e-4)
    assert writing.rebuilds == 0


def test_padded_questions_are_answered_as_if_alone() -> None:
    model = tiny_model(source="working", gates=0.5)
    with torch.no_grad():
        state = model.read(text(2, 30), model.start(2), real=torch.tensor([30, 21]))
        alone = model.read(text(2, 30)[1:, :21], model.start(1))
        answer = text(2, 6, seed=3)
        both, one = Continuation(model, state), Continuation(model, alone)
        for at in range(6):
            assert_close(both.feed(answer[:, at])[1:], one.feed(answer[1:, at]), atol=1e-4, rtol=1e-4)


def test_a_full_segment_is_closed_and_memory_goes_on() -> None:
    model = tiny_model(source="working", gates=0.5, eviction="fifo")  # which does not look at what is recalled
    with torch.no_grad():
        state = model.read(text(1, 24), model.start())
        tokens = [token for token, _ in write_on(model, state, most=30)]
        writing = Continuation(model, state)
        for token in tokens:
            writing.feed(token)
        after = writing.close()
        plain = model.read(torch.stack(tokens, 1), state)
    assert writing.rebuilds == 2  # 30 tokens in segments of 12
    assert after.position.tolist() == [54]
    assert_close(after.slots, plain.slots, atol=1e-4, rtol=1e-4)
    assert torch.equal(after.records.tokens, plain.records.tokens)
    assert state.position.tolist() == [24]


def test_the_router_closes_a_segment_when_it_fires() -> None:
    model = tiny_model(source="working")
    with torch.no_grad():
        model.router.fire.bias.fill_(5.0)
        state = model.read(text(1, 24), model.start())
        writing = Continuation(model, state)
        for token in text(1, 5)[0]:
            writing.feed(token[None])
        assert writing.rebuilds == 5
        assert writing.close().position.tolist() == [29]


def test_what_is_written_can_be_recalled_later() -> None:
    model = tiny_model(source="working", window=4)
    with torch.no_grad():
        writing = Continuation(model, model.read(text(1, 12), model.start()))
        for token in text(1, 24, seed=8)[0]:
            writing.feed(token[None])
    starts = [start for hop in writing.hops if hop.picked is not None for start in hop.picked.starts.flatten().tolist()]
    assert max(starts) >= 12


def test_writing_ends_with_an_ending() -> None:
    model = tiny_model()
    with torch.no_grad():
        state = model.read(text(2, 12), model.start(2))
        assert len(list(write_on(model, state, most=9))) == 9
        ended = list(write_on(model, state, most=9, ends=frozenset({3}), choose=lambda logits: torch.tensor([3, 3])))
    assert len(ended) == 1


def test_nothing_can_be_continued_before_anything_was_read() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="read a question first"):
        Continuation(model, model.start())
