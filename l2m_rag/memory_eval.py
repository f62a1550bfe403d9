"""What a memory model's memory is worth, measured: recall, needles, eviction, perplexity, and what the router does.

Each function gives rows of plain figures; the command line prints, saves and draws them.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from l2m_rag.backbone import locate
from l2m_rag.checkpoint import load_model
from l2m_rag.continuation import Continuation, write_on
from l2m_rag.episodes import Batches
from l2m_rag.errors import UsageError
from l2m_rag.losses import Episode
from l2m_rag.memory_tiers import working
from l2m_rag.memory_tiers.eviction import POLICIES, Policy, retention
from l2m_rag.memory_tiers.router import SOURCES, Plan, Router
from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.memory_tiers.working import Records
from l2m_rag.model import L2M, Hop
from l2m_rag.probes import INSERT, ReadTrace, needle, noise_sentences, read_trace
from l2m_rag.tasks import data_folder
from l2m_rag.train import load_recipe

Told = Callable[[str], object]
SUITES = ("recall", "needle", "eviction", "perplexity")
_UNSEEN = 1_000_003  # added to a run's seed: batches that it was not trained on
_Z = 1.96
_HORIZON = 100  # a read counts in full when it comes at once, 1/e of it a hundredth of the seen events later


@dataclass(frozen=True, slots=True)
class Share:
    """A share of trials with the half-width of its 95 % interval (Wald's, or 3 / n at the ends)."""

    share: float
    half: float
    trials: int


def report(
    suites: Sequence[str],
    *,
    run: Path | None,
    books: Path | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    told: Told = lambda text: None,
) -> dict[str, list[dict[str, Any]]]:
    """Run some of `SUITES`; give rows by suite.

    Args:
        suites: which.
        run: folder of a finished training run; None takes the default backbone with an untrained memory.
        books: data folder, for needles and perplexity; None looks where the question sets are looked for.
        lengths: of needle texts, in tokens.
        depths: of needles.
        trials: of each kind.
        told: called with what has been found so far.

    Raises:
        UsageError: a suite does not fit the model, or there are no books.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if "eviction" in suites:
        found["eviction"] = eviction_over_seeds(told=told)
    rest = [name for name in suites if name != "eviction"]
    if not rest:
        return found
    recipe = load_recipe(run / "recipe.toml") if run is not None else None
    model = load_model(run / "model") if run is not None else L2M.from_pretrained().eval()
    source = recipe.backbone.source if recipe is not None else "default"
    tokenizer: Any = AutoTokenizer.from_pretrained(locate(source)) if source else None
    if "recall" in rest and recipe is not None:
        plan = recipe.train  # batches like those it was trained on, but unseen
        batches = Batches(recipe.task, plan.batch, recipe.model.segment_length, plan.seed + _UNSEEN, tokenizer)
        rows = []
        for memory in (True, False):
            episodes = (batches(step, max(plan.segments)) for step in range(-(-trials // plan.batch)))
            shown, router = recall(model, episodes, memory=memory)
            rows.append({"memory": memory, **_flat(shown), "router": router if memory else {}})
            told(f"recall, memory {'on' if memory else 'off'}: {shown.share:.3f}")
        found["recall"] = rows
    if tokenizer is None and set(rest) <= {"needle", "perplexity"}:
        raise UsageError("needle and perplexity need a backbone with a tokenizer, and this run has none")
    if tokenizer is not None and {"needle", "perplexity"} & set(rest):
        noise = noise_sentences(data_folder(books) / "books", at_least=10, count=lambda text: len(text.split()))
        if "needle" in rest:
            found["needle"] = needles(model, tokenizer, noise, lengths=lengths, depths=depths, trials=trials, told=told)
        if "perplexity" in rest:
            ids = tokenizer(" ".join(noise[: 40 * trials]), add_special_tokens=False, verbose=False)["input_ids"]
            tokens = torch.tensor([ids[: trials * model.config.segment_length]])
            rows = [{"memory": memory, **perplexity(model, tokens, memory=memory)} for memory in (True, False)]
            found["perplexity"] = rows
    return found


def write(found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write a report as memory.json, with a plot for needles and one for eviction."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    if "eviction" in found:
        figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        axis.bar([row["policy"] for row in found["eviction"]], [row["hits"] for row in found["eviction"]])
        axis.set_ylabel("share of reads served")
        figure.savefig(folder / "eviction.png", dpi=110)
        pyplot.close(figure)
    if "needle" in found:
        rows = found["needle"]
        lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
        right = {(row["length"], row["depth"]): row["right"] for row in rows}
        figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        shades = axis.imshow(
            [[right[length, depth] for length in lengths] for depth in depths], vmin=0, vmax=1, aspect="auto"
        )
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axis.set_xlabel("tokens")
        axis.set_ylabel("depth")
        figure.colorbar(shades, label="share of pass keys found")
        figure.savefig(folder / "needle.png", dpi=110)
        pyplot.close(figure)


def share(right: Iterable[bool]) -> Share:
    """Give the share of trials that came out right."""
    came = list(right)
    n = len(came)
    p = sum(came) / n if n else math.nan
    spread = _Z * math.sqrt(p * (1 - p) / n) if 0 < p < 1 else 3 / max(n, 1)
    return Share(round(p, 4), round(spread, 4), n)


@torch.no_grad()
def recall(model: L2M, episodes: Iterable[Episode], *, memory: bool = True) -> tuple[Share, dict[str, Any]]:
    """Ask for what stands in a text, the whole way: read, question, the router's own choice, answer written greedily.

    Args:
        model: trained on episodes of the kind.
        episodes: with answers of one length.
        memory: False recalls nothing, and reads slots that were never written.

    Returns:
        Share of right answers, and what the router did.
    """
    came: list[bool] = []
    hops: list[list[Hop]] = []
    for episode in episodes:
        state = model.start(len(episode.segments))
        for number in range(episode.segments.shape[1]):
            segment = episode.segments[:, number]
            state, _ = model.write(state, model.backbone.lower(segment), segment, episode.real[:, number])
        asked = model.backbone.lower(episode.question)
        state, _ = model.write(state, asked, episode.question, episode.question_real)
        if memory:
            writing = Continuation(model, state)
            hops.append(writing.hops)
            logits = torch.stack([writing.feed(token) for token in episode.answer_in.T], 1)
        else:
            state = replace(state, slots=model.slots.start(len(episode.segments)))
            logits = model.decode(model.backbone.lower(episode.answer_in), state, None)
        fits = (logits.argmax(-1) == episode.answer_out) | (episode.answer_out < 0)
        came += fits.all(1).tolist()
    return share(came), router_statistics(hops)


def router_statistics(taken: Sequence[Sequence[Hop]]) -> dict[str, Any]:
    """Sum up what the router chose: sources of first hops, hops a step, and the ratios of what was read."""
    first: Counter[str] = Counter()
    ratios: Counter[int] = Counter()
    looked = []
    for hops in taken:
        if not hops:
            continue
        first.update(SOURCES[source] for source in hops[0].sources)
        looked.append(sum(hop.picked is not None for hop in hops))
        for hop in hops:
            if hop.picked is not None:
                ratios.update(hop.picked.ratio[hop.picked.taken].tolist())
    return {
        "sources": dict(first),
        "hops": round(sum(looked) / max(1, len(looked)), 3),
        "ratios": {("not at all" if ratio == 0 else f"{ratio}:1"): count for ratio, count in sorted(ratios.items())},
    }


@torch.no_grad()
def needles(
    model: L2M,
    tokenizer: Any,
    noise: Sequence[str],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    told: Told = lambda text: None,
) -> list[dict[str, Any]]:
    """Ask for a pass key that stands at a depth of a text of a length.

    Returns:
        A row for each length and depth: `length` in tokens, `depth`, and the figures of a `Share`.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = []
    draw = random.Random(seed)
    for length in lengths:
        for depth in depths:
            came = []
            for _ in range(trials):
                made = needle(noise, draw, length=length, depth=depth, count=lambda text: len(ids(text)))
                tier = StateTier(model.state_format())
                state = model.read(torch.tensor([ids(made.text)]), model.start(), tier)
                state = model.read(torch.tensor([ids(f"\nQuestion: {made.question}\nAnswer:")]), state, tier)
                written = [int(token) for token, _ in write_on(model, state, tier, most=12)]
                came.append(made.answer in tokenizer.decode(written))
            found = share(came)
            rows.append({"length": length, "depth": depth, **_flat(found)})
            told(f"{length} tokens, depth {depth}: {found.share:.2f}")
    return rows


@torch.no_grad()
def perplexity(model: L2M, tokens: Tensor, *, memory: bool) -> dict[str, float]:
    """Give the perplexity of a text read segment by segment.

    Args:
        model: the memory model.
        tokens: ids, (B, N) int64.
        memory: False reads each segment as if nothing had been before it.

    Returns:
        `perplexity` over all positions but the first of each segment, and `tokens` counted.
    """
    state = model.start(len(tokens))
    total, count = 0.0, 0
    for number in range(0, tokens.shape[1], model.config.segment_length):
        segment = tokens[:, number : number + model.config.segment_length]
        if segment.shape[1] < 2:
            break
        step = model.step(segment, state if memory else model.start(len(tokens)))
        state = step.state
        losses = F.cross_entropy(step.logits[:, :-1].flatten(0, 1).float(), segment[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + segment[:, 1:].numel()
    return {"perplexity": round(math.exp(total / max(1, count)), 4), "tokens": count}


# -- eviction ----------------------------------------------------------------------------------------------------------
def eviction(trace: ReadTrace, room: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Serve the second half of a workload under each policy; the learned score is fitted on the first half.

    Returns:
        A row for each policy: `policy`, `hits` as a share of the reads, `of_belady` as a share of Belady's.
    """
    half = int(trace.events[len(trace.events) // 2, 1])
    border = int(np.flatnonzero((trace.events[:, 0] == INSERT) & (trace.events[:, 1] <= half))[-1])
    router = fit_keep(trace, border, seed=seed)
    rates = {policy: _hits(trace, room, policy, router, border) for policy in POLICIES}
    return [
        {"policy": policy, "hits": round(rate, 4), "of_belady": round(rate / rates["belady"], 4)}
        for policy, rate in rates.items()
    ]


def eviction_over_seeds(seeds: int = 4, *, told: Told = lambda text: None) -> list[dict[str, Any]]:
    """Give `eviction` as a mean over workloads of 1,000 records and 2,000 reads with room for 100."""
    runs = []
    for seed in range(seeds):
        runs.append(
            eviction(read_trace(np.random.default_rng(seed), records=1000, steps=2000, skew=3.0), 100, seed=seed)
        )
        told(f"eviction, workload {seed + 1} of {seeds}: learned {runs[-1][0]['hits']:.3f}")
    rows = []
    for number, policy in enumerate(POLICIES):
        hits, of_belady = ([run[number][name] for run in runs] for name in ("hits", "of_belady"))
        mean = round(sum(of_belady) / seeds, 4)
        rows.append(
            {"policy": policy, "hits": round(sum(hits) / seeds, 4), "of_belady": mean, "lowest": min(of_belady)}
        )
    return rows


def fit_keep(trace: ReadTrace, until: int, *, seed: int = 0, rounds: int = 500) -> Router:
    """Fit the router's retention score to a workload in hindsight: how soon is a record read again?

    Args:
        trace: the workload.
        until: number of its events that may be seen.
        seed: of weights and samples.
        rounds: steps of AdamW on 512 samples each.
    """
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    width = trace.features.shape[1]
    router = Router(width, width, 1)
    reads, inserted = _times(trace, until)
    records = np.array(sorted(inserted))
    horizon = max(1, until // _HORIZON)
    optimizer = torch.optim.AdamW(router.keep.parameters(), lr=1e-2)
    for _ in range(rounds):
        chosen = draw.choice(records, 512)
        first = np.array([inserted[record] for record in chosen])
        latest = np.maximum(first, until - 1 - horizon)
        age = until ** draw.random(512)  # evenly over magnitudes: most of a record's fate is decided early
        now = np.minimum(first + age.astype(np.int64), latest)
        seen = [np.searchsorted(reads[record], at, side="right") for record, at in zip(chosen, now, strict=True)]
        last = [reads[record][at - 1] if at else inserted[record] for record, at in zip(chosen, seen, strict=True)]
        soon = [
            math.exp((moment - reads[record][at]) / horizon) if at < len(reads[record]) else 0.0
            for record, at, moment in zip(chosen, seen, now, strict=True)
        ]
        facts = _records(
            trace.features[chosen], np.array([inserted[record] for record in chosen]), np.array(last), np.array(seen)
        )
        score = router.keeps(_no_plan(router, 512), _each(facts), torch.from_numpy(now))[:, 0]
        loss = F.binary_cross_entropy_with_logits(score, torch.tensor(soon, dtype=torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router


@torch.no_grad()
def _hits(trace: ReadTrace, room: int, policy: Policy, router: Router, counted_from: int) -> float:
    """Give the share of the reads from an event on that working memory serves."""
    reads, _ = _times(trace, len(trace.events))
    width = trace.features.shape[1]
    records = working.empty_records(1, room, 1, 1, width, torch.float32, torch.device("cpu"))
    plan = _no_plan(router, 1)
    hits = asked = 0
    for now, (kind, record) in enumerate(trace.events.tolist()):
        if kind == INSERT:
            one = np.array([record])
            new = _records(trace.features[one], np.array([now]), np.array([now]), np.array([0]), starts=one)
            everything = working.insert(records, new)
            keep = router.keeps(plan, everything, torch.tensor([now])) if policy == "learned" else None
            coming = None
            if policy == "belady":
                ahead = [reads[name][np.searchsorted(reads[name], now) :] for name in everything.starts[0].tolist()]
                coming = torch.tensor([[float(times[0]) if len(times) else math.inf for times in ahead]])
            scores = retention(policy, everything, torch.tensor([now]), keep=keep, next_read=coming)
            records, _ = working.evict(everything, scores, room)
            continue
        place = ((records.starts == record) & (records.lengths > 0)).nonzero()
        if now > counted_from:
            asked += 1
            hits += len(place) > 0
        if len(place):
            records = working.touch(records, place[:, 1:], torch.ones_like(place[:, 1:]).bool(), torch.tensor([now]))
    return hits / max(1, asked)


def _times(trace: ReadTrace, until: int) -> tuple[dict[int, Any], dict[int, int]]:
    """Give when each record is read, and when it comes, among the first events."""
    reads: dict[int, list[int]] = {}
    inserted: dict[int, int] = {}
    for now, (kind, record) in enumerate(trace.events[:until].tolist()):
        if kind == INSERT:
            inserted[record] = now
            reads[record] = []
        else:
            reads[record].append(now)
    return {record: np.array(times, dtype=np.int64) for record, times in reads.items()}, inserted


def _records(features: Any, written: Any, read_at: Any, reads: Any, *, starts: Any = None) -> Records:
    """Give records (1, N, ...) of one token whose keys are given."""
    count = len(features)
    numbers = [torch.from_numpy(np.asarray(part, dtype=np.int64))[None] for part in (written, read_at, reads)]
    first = torch.zeros(1, count, dtype=torch.int64) if starts is None else torch.from_numpy(starts)[None]
    values = torch.zeros(1, count, 1, 1)
    tokens, lengths = torch.zeros(1, count, 1, dtype=torch.int64), torch.ones(1, count, dtype=torch.int64)
    return Records(values, torch.from_numpy(features)[None], tokens, lengths, first, *numbers)


def _each(records: Records) -> Records:
    """Give N records of one stream as one record of N streams."""
    return Records(*(part.transpose(0, 1) for part in records))


def _no_plan(router: Router, batch: int) -> Plan:
    nothing = torch.zeros(batch, router.norm.normalized_shape[0])
    plan = cast(Plan, router(nothing, nothing[:, None], torch.zeros(batch), nothing, 0))
    return plan._replace(query=torch.zeros_like(plan.query).detach())


def _flat(found: Share) -> dict[str, Any]:
    return {"right": found.share, "half": found.half, "trials": found.trials}
