"""What the memory costs: against its own backbone in the same run, and against full attention."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.model import L2M
from l2m_rag.state import State

_HOT_BYTES = 8 << 20
Told = Callable[[str], object]


def _silent(text: str) -> None:
    return None


@torch.no_grad()
def reading(
    model: L2M, lengths: tuple[int, ...], *, with_tier: bool = False, told: Told = _silent
) -> list[dict[str, Any]]:
    """Read on and on, into working memory alone or into a tier on disk too.

    Returns:
        A row for each length: `tokens`, `us_per_token` over the last quarter of the text, `rss_mb` of the process at
        its end, and `records` in the tier, whose hot set may take 8 MB and which keeps keys and ids in memory.
    """
    if not with_tier:
        return _reading(model, lengths, None, told)
    with (
        tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch,
        StateTier(model.state_format(), Path(scratch), hot_bytes=_HOT_BYTES) as tier,
    ):
        return _reading(model, lengths, tier, told)


def _reading(model: L2M, lengths: tuple[int, ...], tier: StateTier | None, told: Told) -> list[dict[str, Any]]:
    rows = []
    part = model.config.segment_length * 8
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):  # what a process takes once: buffers, and pages that are given back late
        model.read(torch.randint(model.backbone.vocab_size, (1, part), generator=draw), model.start())
    state, done = model.start(), 0
    for length in sorted(lengths):
        times: list[float] = []
        while done < length:
            size = min(part, length - done)
            tokens = torch.randint(model.backbone.vocab_size, (1, size), generator=draw)
            began = time.perf_counter()
            state = model.read(tokens, state, tier)
            if size == part or not times:  # a last piece of few segments says little
                times.append((time.perf_counter() - began) / size * 1e6)
            done += size
        recent = times[-max(1, len(times) // 4) :]
        rows.append(
            {
                "tokens": done,
                "us_per_token": round(statistics.median(recent), 2),
                "rss_mb": round(_resident() / 1e6, 1),
                "records": 0 if tier is None else len(tier),
            }
        )
        told(f"{done:,} tokens: {rows[-1]['us_per_token']} us a token, {rows[-1]['rss_mb']} MB")
    return rows


@torch.no_grad()
def steps(model: L2M, *, recalled: int = 512, rounds: int = 9) -> dict[str, Any]:
    """Time one step beside the backbone's own run of the segment, and beside as many more positions.

    Returns:
        Medians in milliseconds, each way in turn: `backbone_ms` (the segment by itself), `step_ms` (slots and router
        on, nothing recalled, no window), `recalled_ms` (`recalled` positions of working memory), `longer_ms` (the lower
        layers on the segment and the upper layers on that many positions more), and the ratios `step_to_backbone` and
        `recalled_to_longer`.
    """
    config = model.config
    T = config.segment_length
    count = max(1, recalled // config.record_length)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.backbone.vocab_size, (1, T), generator=draw)
    more = torch.randint(model.backbone.vocab_size, (1, 4 * T), generator=draw)
    bare, full = model.start(), _without_window(model.read(more, model.start()))
    count = min(count, int((full.records.lengths > 0).sum()))
    places = full.records.lengths.topk(count, dim=1).indices
    extra = count * config.record_length
    picked = model.picked(full.records, places, torch.ones_like(places).bool())
    states = model.backbone.lower(more[:, :extra]) if extra <= more.shape[1] else model.backbone.lower(more)

    def with_records() -> Tensor:
        x = model.backbone.lower(tokens)
        logits = model.decode(x, full, model.assemble([picked]))
        model.write(full, x, tokens)
        return logits

    def longer() -> Tensor:
        x = torch.cat([states[:, :extra], model.backbone.lower(tokens)], 1)
        top = model.backbone.upper(x, torch.arange(x.shape[1])[None])
        return model.backbone.head(top[:, -T:])

    ways: dict[str, Callable[[], object]] = {
        "backbone": lambda: model.backbone.causal_lm(input_ids=tokens).logits,
        "step": lambda: model.step(tokens, bare),
        "recalled": with_records,
        "longer": longer,
    }
    times = _turns(ways, rounds)
    found: dict[str, Any] = {f"{name}_ms": round(value, 2) for name, value in times.items()}
    found["recalled_positions"] = extra
    found["step_to_backbone"] = round(times["step"] / times["backbone"], 3)
    found["recalled_to_longer"] = round(times["recalled"] / times["longer"], 3)
    own = sum(weight.numel() for weight in model.backbone.parameters())
    added = sum(weight.numel() for weight in model.parameters()) - own
    found["parameters_added"] = round(added / own, 4)
    return found


@torch.no_grad()
def against_attention(
    model: L2M, lengths: tuple[int, ...], *, rounds: int = 3, told: Told = _silent
) -> list[dict[str, Any]]:
    """Compare reading a text by segments, logits included, with the backbone's full attention over it.

    Returns:
        A row for each length: `full_s` and `memory_s`, and the bytes that each must keep to go on: `full_mb`, the keys
        and values of all positions (computed from the shape), and `memory_mb`, the state.
    """
    rows = []
    lm: Any = model.backbone.causal_lm
    shape = lm.config
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    width = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * torch.finfo(model.backbone.dtype).bits // 8
    for length in lengths:
        tokens = torch.randint(model.backbone.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        end: list[State] = []

        def by_segments(tokens: Tensor = tokens, end: list[State] = end) -> None:
            state = model.start()
            for at in range(0, tokens.shape[1], model.config.segment_length):
                state = model.step(tokens[:, at : at + model.config.segment_length], state).state
            end[:] = [state]

        times = _turns(
            {"full": lambda tokens=tokens: lm(input_ids=tokens, logits_to_keep=1), "memory": by_segments}, rounds
        )
        rows.append(
            {
                "tokens": length,
                "full_s": round(times["full"] / 1000, 3),
                "memory_s": round(times["memory"] / 1000, 3),
                "full_mb": round(width * length / 1e6, 2),
                "memory_mb": round(end[0].nbytes / 1e6, 2),
            }
        )
        told(f"{length} tokens: full attention {rows[-1]['full_s']} s, memory {rows[-1]['memory_s']} s")
    return rows


def _without_window(state: State) -> State:
    return replace(state, window=state.window[:, :0], window_real=None)


def _turns(ways: dict[str, Any], rounds: int) -> dict[str, float]:
    """Give the median time of each way in milliseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:  # the first finds cold caches
                times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(found) for name, found in times.items()}


def _resident() -> int:
    """Give the bytes that the process holds now."""
    gc.collect()
    with open("/proc/self/statm") as stream:
        pages = int(stream.read().split()[1])
    import resource

    return pages * resource.getpagesize()
