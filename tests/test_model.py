"""The laws of the memory model, on tiny random backbones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import FAMILIES, VOCABULARY, text, tiny_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from l2m_rag.backbone import tiny_backbone
from l2m_rag.errors import IncompatibleError, ModelError, UsageError
from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.model import L2M, OutOfMemory, Step
from l2m_rag.model_config import L2MConfig
from l2m_rag.state import State

SOURCES = ("working", "long_term")


def run(model: L2M, tokens: Tensor, tier: StateTier | None = None, streams: list[str] | None = None) -> list[Step]:
    """Read a text segment by segment."""
    state, steps = model.start(len(tokens), streams), []
    for segment in tokens.split(model.config.segment_length, dim=1):
        steps.append(model.step(segment, state, tier))
        state = steps[-1].state
    return steps


def logits(steps: list[Step]) -> Tensor:
    return torch.cat([step.logits for step in steps], dim=1)


def tensors(state: State) -> list[Tensor]:
    return [state.slots, *state.records, state.window, state.gist, state.position, state.plan.choice, state.plan.query]


# -- what no position and no stream may see


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_later_tokens_do_not_move_earlier_logits(family: str, source: str) -> None:
    model = tiny_model(family, source=source, gates=0.5)
    tokens = text(1, 60)
    with torch.no_grad():
        plain = logits(run(model, tokens, StateTier(model.state_format())))
        for position in range(60):
            other = tokens.clone()
            other[:, position] = (other[:, position] + 7) % VOCABULARY
            moved = logits(run(model, other, StateTier(model.state_format())))
            assert torch.equal(moved[:, :position], plain[:, :position])
            assert not torch.equal(moved[:, position], plain[:, position])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_streams_of_a_batch_do_not_see_each_other(family: str, source: str) -> None:
    model = tiny_model(family, source=source, gates=0.5)
    tokens = text(3, 72)
    with torch.no_grad():
        together = run(model, tokens, StateTier(model.state_format()), ["a", "b", "c"])
        tier = StateTier(model.state_format())  # one tier for all, as streams share a disk
        for row, name in enumerate("abc"):
            alone = run(model, tokens[row : row + 1], tier, [name])
            assert_close(logits(alone), logits(together)[row : row + 1], atol=1e-4, rtol=1e-4)
    assert any(hop.picked is not None and hop.picked.taken.any() for step in together for hop in step.hops)


def test_a_stream_that_stops_is_not_moved_by_those_that_go_on() -> None:
    model = tiny_model(source="working", gates=0.5)
    with torch.no_grad():
        model.router.choice.weight.normal_(std=1.0)
        model.router.choice.bias.zero_()
        tokens = text(6, 72)
        together = run(model, tokens)
        for row in range(6):
            assert_close(
                logits(run(model, tokens[row : row + 1])), logits(together)[row : row + 1], atol=1e-4, rtol=1e-4
            )
    sources = {source for step in together for hop in step.hops for source in hop.sources}
    assert len(sources) > 1


def test_padding_is_as_if_it_were_not_there() -> None:
    model = tiny_model(source="working", gates=0.5)
    short, long = text(1, 7), text(1, 12, seed=1)
    both = torch.cat([torch.nn.functional.pad(short, (0, 5), value=9), long])
    more = text(2, 12, seed=2)
    with torch.no_grad():
        first = model.step(both, model.start(2), real=torch.tensor([7, 12]))
        second = model.step(more, first.state)
        alone = model.step(short, model.start(1))
        after = model.step(more[:1], alone.state)
    assert_close(first.logits[:1, :7], alone.logits, atol=1e-5, rtol=1e-5)
    assert_close(second.logits[:1], after.logits, atol=1e-4, rtol=1e-4)
    assert first.state.position.tolist() == [7, 12]


def test_a_stream_that_has_ended_stays_as_it_is() -> None:
    model = tiny_model(source="working", gates=0.5)
    with torch.no_grad():
        state = model.read(text(2, 60), model.start(2))
        after = model.step(text(2, 12, seed=2), state, real=torch.tensor([12, 0])).state
    for here, there in zip(tensors(after.rows(torch.tensor([1]))), tensors(state.rows(torch.tensor([1]))), strict=True):
        assert_close(here, there, atol=1e-6, rtol=1e-6)
    assert after.step.tolist() == [6, 5]


# -- what it is equal to


@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_it_is_the_backbone_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    tokens = text(2, 12)
    with torch.no_grad():
        step = model.step(tokens, model.start(2))
        assert torch.equal(step.logits, model.backbone.causal_lm(input_ids=tokens).logits)


@pytest.mark.parametrize("window", [0, 5, 12, 30])
def test_segments_equal_a_plain_computation(window: int) -> None:
    model = tiny_model(window=window)
    tokens = text(2, 40)
    inner: Any = model.backbone.causal_lm.model

    def layers(x: Tensor, numbers: range) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        for number in numbers:
            rotary = inner.rotary_emb(x, position_ids=positions)
            x = inner.layers[number](x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return x

    with torch.no_grad():
        found = logits(run(model, tokens))
        encoded = [layers(inner.embed_tokens(segment), range(2)) for segment in tokens.split(12, dim=1)]
        seen = torch.zeros(2, 0, 48)
        for number, x in enumerate(encoded):
            whole = layers(torch.cat([seen[:, max(0, seen.shape[1] - window) :], x], dim=1), range(2, 4))
            plain = model.backbone.causal_lm.lm_head(inner.norm(whole[:, -x.shape[1] :]))  # type: ignore[operator]
            assert_close(found[:, 12 * number : 12 * number + x.shape[1]], plain, atol=1e-4, rtol=1e-4)
            seen = torch.cat([seen, x], dim=1)


@pytest.mark.parametrize("length", [0, 1, 12, 13, 100])
@pytest.mark.parametrize("at_once", [1, 3])
def test_reading_gives_the_state_that_steps_give(length: int, at_once: int) -> None:
    model = tiny_model()
    tokens = text(2, length)
    tiers = StateTier(model.state_format()), StateTier(model.state_format())
    with torch.no_grad():
        steps = run(model, tokens, tiers[0]) if length else []
        state = steps[-1].state if steps else model.start(2)
        read = model.read(tokens, model.start(2), tiers[1], at_once=at_once)
    for here, there in zip(tensors(read), tensors(state), strict=True):
        assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert len(tiers[0]) == len(tiers[1]) == 2 * max(0, -(-length // 4) - 5)


# -- what stays as it is


@pytest.mark.parametrize("source", SOURCES)
def test_no_state_is_changed(source: str) -> None:
    model = tiny_model(source=source, gates=0.5)
    state = model.read(text(2, 50), model.start(2))
    before = [part.clone() for part in tensors(state)]
    tier = StateTier(model.state_format())
    with torch.no_grad():
        first = model.step(text(2, 12, seed=3), state, tier)
        again = model.step(text(2, 12, seed=3), state, None if source == "working" else tier)
    assert all(map(torch.equal, before, tensors(state)))
    if source == "working":
        assert torch.equal(first.logits, again.logits)


def test_a_router_that_says_no_causes_no_look_up() -> None:
    model = tiny_model()
    tier = StateTier(model.state_format())
    with torch.no_grad():
        steps = run(model, text(1, 60), tier)
    assert len(tier) > 0
    assert tier.lookups == 0
    assert all(hop.picked is None for step in steps for hop in step.hops)


class _Transfers(TorchDispatchMode):
    """Counts what makes the host wait for numbers of a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.item.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_that_recalls_nothing_waits_for_no_number() -> None:
    model = tiny_model(gates=0.5)
    with torch.no_grad():
        state = model.read(text(2, 50), model.start(2))
        with _Transfers() as transfers:
            model.step(text(2, 12), state)
    assert transfers.count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_recalls_nothing_does_not_wait_for_the_gpu() -> None:
    model = tiny_model(gates=0.5).cuda()
    with torch.no_grad():
        state = model.read(text(2, 50), model.start(2))
        tokens = text(2, 12).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.step(tokens, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_working_memory_stays_within_its_bytes() -> None:
    budget = 6000
    model = tiny_model(records=1000, working_bytes=budget)
    state = model.start(1)
    with torch.no_grad():
        for segment in text(1, 240).split(12, dim=1):
            state = model.step(segment, state).state
            assert state.records.nbytes <= budget
    assert 0 < model.places < 1000
    assert int((state.records.lengths > 0).sum()) == model.places


def test_a_state_has_the_same_size_however_much_was_read() -> None:
    model = tiny_model()
    sizes = {model.read(text(1, length), model.start()).nbytes for length in (120, 240, 1200)}
    assert len(sizes) == 1


# -- gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_gate_and_the_router_across_five_segments(family: str) -> None:
    model = tiny_model(family, source="working", gates=0.1)
    state = model.start(2)
    first = model.backbone.lower(text(2, 12)).detach().requires_grad_()
    state, _ = model.write(state, first, text(2, 12))
    for seed in range(1, 5):
        state = model.step(text(2, 12, seed=seed), state).state
    step = model.step(text(2, 12, seed=9), state)
    plan, picked = step.hops[0].plan, step.hops[0].picked
    assert picked is not None
    scores = model.router.scores(
        plan, state.records.keys, state.records.starts, picked.starts, picked.taken, state.position
    )
    keeps = model.router.keeps(state.plan, state.records, state.step)
    resolutions = model.router.resolutions(plan, picked.keys, picked.starts.float(), picked.lengths)
    parts = (step.logits, plan.choice, scores, keeps, resolutions, model.router.fire(first))
    sum(part.float().square().mean() for part in parts).backward()  # type: ignore[union-attr]
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    modules = {"slots": model.slots, "router": model.router, "slot layers": model.slot_layers}
    for name, module in modules.items():
        for part, weight in module.named_parameters():
            assert weight.grad is not None, f"{name}.{part}"
            assert weight.grad.abs().max() > 0, f"{name}.{part}"


# -- the long-term tier


def test_what_was_evicted_is_recalled_from_the_tier() -> None:
    model = tiny_model(source="long_term", gates=0.5)
    tier = StateTier(model.state_format())
    with torch.no_grad():
        steps = run(model, text(1, 120), tier)
    found = [hop.picked for hop in steps[-1].hops if hop.picked is not None]
    assert found
    assert found[0].long_term[found[0].taken].all()
    assert set(found[0].grain[found[0].taken].tolist()) == {1}  # read at 1:1, so made again from the tokens
    starts = [start for part in found for start in part.starts[part.taken].tolist()]
    assert len(starts) == len(set(starts))
    assert max(starts) + 4 <= 108


@pytest.mark.parametrize("choice", [0, 1, 2, 3])
def test_records_of_the_tier_are_read_as_finely_as_the_router_says(choice: int) -> None:
    model = tiny_model(source="long_term", hops=1, budget=100)
    tier = StateTier(model.state_format())
    tokens = text(1, 120)
    with torch.no_grad():
        model.router.resolution_logits.weight.zero_()
        model.router.resolution_logits.bias.copy_(5.0 * torch.eye(4)[choice])
        state = model.read(tokens, model.start(), tier)
        (hop,), _ = model.recall(state, tier)
    assert hop.picked is not None
    assert hop.picked.taken.all()
    assert set(hop.picked.ratio.flatten().tolist()) == {(1, 4, 16, 0)[choice]}
    for at, start in enumerate(hop.picked.starts[0].tolist()):
        with torch.no_grad():
            alone = model.backbone.lower(tokens[:, start : start + 4])[0]
            whole = model.backbone.lower(tokens[:, start // 12 * 12 : start // 12 * 12 + 12])[0]
        pooled = whole[start % 12 : start % 12 + 4].mean(0, keepdim=True)
        if choice == 0:
            assert_close(hop.picked.values[0, at], alone, atol=1e-4, rtol=1e-4)
        else:
            bound = float(pooled.abs().max()) / 127
            assert (hop.picked.values[0, at, :1] - pooled).abs().max() <= bound


@pytest.mark.parametrize("positions", ["middle", "packed"])
def test_recalled_positions_stay_within_the_budget(positions: str) -> None:
    model = tiny_model(source="working", budget=6, recall=3, records=12, positions=positions)
    with torch.no_grad():
        for step in run(model, text(2, 96)):
            recalled = model.assemble([hop.picked for hop in step.hops])
            if recalled is not None:
                real = torch.ones_like(recalled.places).bool() if recalled.real is None else recalled.real
                assert real.sum(1).max() <= 6
                order = recalled.places.masked_fill(~real, -1)
                assert (order.diff(dim=1)[real[:, 1:] & real[:, :-1]] > 0).all()
                assert (order.amax(1) < recalled.span).all()


# -- bad input


def test_a_segment_of_a_wrong_size_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="a step takes 1 to 12 tokens, not 13"):
        model.step(text(1, 13), model.start())
    with pytest.raises(UsageError, match="not 0"):
        model.step(text(1, 0), model.start())
    with pytest.raises(UsageError, match="2 rows of tokens do not fit a state of 1"):
        model.step(text(2, 12), model.start())
    with pytest.raises(UsageError, match="2 rows"):
        model.read(text(2, 12), model.start())
    with pytest.raises(UsageError, match="different names"):
        model.start(2, ["a", "a"])


def test_a_tier_of_another_key_version_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    tier = StateTier(replace(model.state_format(), key_version="0:other"))
    with pytest.raises(IncompatibleError, match="key_version '0:other'"):
        model.read(text(1, 12), model.start(), tier)
    with pytest.raises(IncompatibleError, match="key_dim"):
        model.step(text(1, 12), model.start(), StateTier(replace(model.state_format(), key_dim=8)))


@pytest.mark.parametrize("room", [1, 2, 3, 0])
def test_a_device_that_is_full_reads_on_with_less(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    tokens = text(1, 100)
    whole = model.read(tokens, model.start())
    lower = model.backbone.lower
    calls = []

    def small(segments: Tensor, **options: Any) -> Tensor:
        calls.append(len(segments))
        if len(segments) > room:
            raise torch.OutOfMemoryError("full")
        return lower(segments, **options)

    monkeypatch.setattr(model.backbone, "lower", small)
    if room:
        read = model.read(tokens, model.start())
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(tensors(read), tensors(whole), strict=True))
        return
    with pytest.raises(OutOfMemory, match="after 0 tokens") as caught:
        model.read(tokens, model.start())
    assert caught.value.state.position.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_layers": (1,)}, "upper layers"),
        ({"depth": 3, "slot_layers": (3,)}, "cut at layer 2"),
        ({"working_bytes": 10}, "not one record"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_model(**changes)


def test_backbones_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ModelError, match="encoder depth"):
        tiny_backbone(n_layers=2, depth=2)
    from transformers import AutoModelForCausalLM, GPT2Config

    from l2m_rag.backbone import Backbone

    other = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=8))
    with pytest.raises(ModelError, match="gpt2"):
        Backbone(other, 1)


def test_added_parameters_are_few_beside_the_default_backbone() -> None:
    dim, layers = 576, 5
    config = L2MConfig()
    from l2m_rag.memory_tiers.router import Router
    from l2m_rag.memory_tiers.working import Slots
    from l2m_rag.slot_layer import SlotLayer

    parts = [
        Router(dim, config.key_dim, 3),
        Slots(dim, config.slots, 9, 4),
        *(SlotLayer(dim, 9) for _ in range(layers)),
    ]
    added = sum(weight.numel() for part in parts for weight in part.parameters())
    assert added <= 0.1 * 134_515_008
