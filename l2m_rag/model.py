"""The Large Memory Model: a decoder whose memory lies outside its attention window.

`L2M.step` is the heart; what it calls stands below it in the order in which it is called. Letters: B streams in a
batch, T tokens of a segment, L tokens of a record, D hidden size, S slots, R records in working memory, P records
picked, K recalled positions, W positions of the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from l2m_rag.backbone import Backbone, fingerprint, load_backbone
from l2m_rag.errors import IncompatibleError, L2MError, ModelError, UsageError
from l2m_rag.memory_tiers import working
from l2m_rag.memory_tiers.compressor import Pooler, middles, quantise, restore
from l2m_rag.memory_tiers.eviction import retention
from l2m_rag.memory_tiers.router import LONG_TERM, NONE, STOP, WORKING, Plan, Router
from l2m_rag.memory_tiers.state_table import StateFormat, StateRows
from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.memory_tiers.working import Records, Slots
from l2m_rag.model_config import L2MConfig
from l2m_rag.slot_layer import SlotLayer
from l2m_rag.state import Picked, Recalled, State, joined

_KEY_VERSION = 1  # of what a key is made of; stored keys of another one mean nothing


class Hop(NamedTuple):
    """One look into memory: the plan, the source of each stream, and what was picked (None: nothing)."""

    plan: Plan
    sources: list[int]
    picked: Picked | None


class Step(NamedTuple):
    """What a step gives: logits (B, T, V), the state after it, and the hops that it took."""

    logits: Tensor
    state: State
    hops: list[Hop]


class OutOfMemory(L2MError):  # noqa: N818  # the name says it
    """The device ran out of memory in the middle of a text; `state` holds what was read until then."""

    def __init__(self, message: str, state: State) -> None:
        super().__init__(message)
        self.state = state


class L2M(nn.Module):
    """A backbone with slots, working memory, router, and a way into the long-term tier.

    Args:
        backbone: whose depth is that of the config.
        config: sizes.

    Raises:
        ModelError: the sizes do not fit the backbone.
    """

    def __init__(self, backbone: Backbone, config: L2MConfig) -> None:
        super().__init__()
        if backbone.depth != config.depth:
            raise ModelError(f"the backbone is cut at layer {backbone.depth}, the config says depth {config.depth}")
        outside = [layer for layer in config.slot_layers if not config.depth <= layer < backbone.n_layers]
        if outside:
            raise ModelError(
                f"slot_layers ({outside}) must lie in the upper layers {config.depth}..{backbone.n_layers - 1}"
            )
        self.config = config
        self.backbone = backbone
        dim = backbone.dim
        self.router = Router(dim, config.key_dim, len(config.ratios))
        self.slots = Slots(dim, config.slots, config.slot_heads, config.slots_written, delta=config.delta)
        layers = config.slot_layers if config.slots else ()
        self.slot_layers = nn.ModuleDict({str(layer): SlotLayer(dim, config.slot_heads) for layer in layers})
        self.pooler = Pooler(config.ratios, dim, learned=config.pooling == "learned")
        for part in (self.router, self.slots, self.slot_layers, self.pooler):
            part.to(device=backbone.device, dtype=backbone.dtype)
        self.places = config.records
        if config.working_bytes:
            fit = working.places_within(config.working_bytes, config.record_length, dim, config.key_dim, backbone.dtype)
            self.places = min(config.records, fit)
            if not fit:
                raise ModelError(
                    f"working_bytes ({config.working_bytes}) holds not one record of {config.record_length} tokens"
                )

    @classmethod
    def from_pretrained(cls, source: str | Path = "default", config: L2MConfig | None = None) -> L2M:
        """Put an untrained memory around a backbone; `checkpoint.load` brings a trained one.

        Args:
            source: "default", a folder or a hub id.
            config: sizes.
        """
        config = config or L2MConfig()
        return cls(load_backbone(source, config.depth), config)

    def start(self, batch: int = 1, streams: Sequence[str] | None = None) -> State:
        """Give the state of streams that have read nothing.

        Args:
            batch: how many.
            streams: their names in the long-term tier, all different; numbers by default.
        """
        names = tuple(streams) if streams is not None else tuple(map(str, range(batch)))
        if len(names) != batch or len(set(names)) != batch:
            raise UsageError(f"streams ({list(names)}) must be {batch} different names")
        config, dtype, device = self.config, self.backbone.dtype, self.backbone.device
        dim = self.backbone.dim
        records = working.empty_records(batch, self.places, config.record_length, dim, config.key_dim, dtype, device)
        nothing = torch.zeros(batch, dim, dtype=dtype, device=device)
        slots = self.slots.start(batch)
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        plan = self.router(nothing, slots, position, nothing, 0)
        return State(slots, records, nothing[:, None][:, :0], None, nothing, position, plan, position, names)

    # -- the step ----------------------------------------------------------------------------------------------------
    def step(self, tokens: Tensor, state: State, tier: StateTier | None = None, *, real: Tensor | None = None) -> Step:
        """Read one segment of each stream.

        Args:
            tokens: ids, (B, T) int64, T at most `segment_length`.
            state: of the streams; stays as it is.
            tier: the long-term tier, asked only when the router says so.
            real: number of tokens of each row that are text, (B,) int64; what follows is padding. None for all.

        Returns:
            Logits of what follows each token, (B, T, V), the state after the segment, and what was recalled for it.
        """
        self._check(tokens, state)
        self.check_tier(tier, whole=False)
        hops, records = self.recall(state, tier)  # from the past only
        x = self.backbone.lower(tokens)  # (B, T, D): the segment alone, so that what is stored can be made again
        logits = self.decode(x, state, self.assemble([hop.picked for hop in hops]))
        state, evicted = self.write(state, x, tokens, real, records)
        if tier is not None:
            self.store(evicted, state, tier)
        return Step(logits, state, hops)

    # -- before the segment: what is recalled --------------------------------------------------------------------------
    def recall(self, state: State, tier: StateTier | None = None) -> tuple[list[Hop], Records]:
        """Let the router look into memory until it says stop.

        Returns:
            The hops, and the records of working memory with what was read noted.
        """
        hops: list[Hop] = []
        plan, records = state.plan, state.records
        used = torch.zeros_like(state.position)
        stopped = [False] * len(state.streams)
        while len(hops) < self.config.hops:
            sources = [STOP if over else source for over, source in zip(stopped, plan.wants(), strict=True)]
            if tier is None:
                sources = [NONE if source == LONG_TERM else source for source in sources]
            stopped = [source in (NONE, STOP) for source in sources]  # for good, while other streams go on
            if all(stopped):
                hops.append(Hop(plan, sources, None))
                break
            before = [hop.picked for hop in hops if hop.picked is not None]
            picked = self._pick(plan, sources, state, records, tier, before, used)
            places = picked.place.clamp(min=0) * ~picked.long_term
            records = working.touch(records, places, picked.taken & ~picked.long_term, state.step)
            used = used + _cost(picked)
            hops.append(Hop(plan, sources, picked))
            stopped = [not any(found) or over for found, over in zip(picked.taken.tolist(), stopped, strict=True)]
            mean = joined([*before, picked]).mean()
            plan = self.router(state.gist, state.slots, records.occupancy, mean, len(hops))
        return hops, records

    def _pick(
        self,
        plan: Plan,
        sources: list[int],
        state: State,
        records: Records,
        tier: StateTier | None,
        before: list[Picked],
        used: Tensor,
    ) -> Picked:
        """Pick the best records for a plan, and how finely each is read."""
        known = joined(before) if before else None
        device = state.gist.device
        asks = torch.tensor(sources, device=device)
        nowhere = torch.zeros(len(sources), 0, dtype=torch.int64, device=device)
        recalled, taken = (nowhere, nowhere.bool()) if known is None else (known.starts, known.taken)
        scores = self.router.scores(plan, records.keys, records.starts, recalled, taken, state.position)
        # what stands in the window is seen as it is
        free = (records.lengths > 0) & ~state.in_window(records.starts) & (asks == WORKING)[:, None]
        if known is not None:
            old = torch.where(known.taken & ~known.long_term, known.place, records.lengths.shape[1])
            marks = torch.zeros(len(sources), records.lengths.shape[1] + 1, dtype=torch.bool, device=device)
            free = free & ~marks.scatter(1, old, True)[:, :-1]
        best = scores.masked_fill(~free, -torch.inf).topk(min(self.config.recall, free.shape[1]), dim=1)
        chosen = self.picked(records, best.indices, best.values > -torch.inf)
        found = best.values.detach()
        if tier is not None and LONG_TERM in sources:
            chosen, found = self._from_tier(plan, sources, state, tier, known, chosen, found)
        logits = self.router.resolutions(plan, chosen.keys, found.clamp(min=-100), chosen.lengths)
        choice = logits.argmax(-1)
        chosen = self._made_again(chosen, chosen.long_term & chosen.taken & (choice == 0))
        return chosen._replace(ratio=self._fit(choice, chosen, used))

    def picked(self, records: Records, places: Tensor, taken: Tensor, ratio: int = 1) -> Picked:
        """Give records of working memory as something recalled.

        Args:
            records: (B, R, ...).
            places: (B, P) int64.
            taken: which of those count, (B, P) bool.
            ratio: at which all of them are read.
        """
        at = records.at(places)
        lengths = at.lengths * taken
        ones = torch.ones_like(lengths)
        place = torch.where(taken, places, -1)
        return Picked(
            at.values * taken[..., None, None],
            at.keys,
            at.tokens,
            lengths,
            at.starts,
            ones,
            ratio * ones,
            place,
            ~ones.bool(),
        )

    def stored(self, picked: Picked, far: Tensor) -> Picked:
        """Give what was picked as it would come from the long-term tier where `far`, (B, P) bool, says so.

        Pooled at `stored_ratio` and without gradient, as nothing flows back through a disk.
        """
        pooled = self.pooler(picked.values.detach(), picked.lengths, self.config.stored_ratio)[0].detach()
        pooled = nn.functional.pad(pooled, (0, 0, 0, picked.values.shape[2] - pooled.shape[2]))
        return picked._replace(
            values=torch.where(far[..., None, None], pooled, picked.values),
            grain=torch.where(far, self.config.stored_ratio, picked.grain),
            ratio=torch.where(far & (picked.ratio > 0), picked.ratio.clamp(min=self.config.stored_ratio), picked.ratio),
            long_term=picked.long_term | far,
        )

    def _made_again(self, picked: Picked, wanted: Tensor) -> Picked:
        """Make 1:1 states of records from their tokens, each read by itself, where they are wanted and tokens are kept.

        Args:
            picked: with pooled states.
            wanted: which of them are to be read at 1:1, (B, P) bool.
        """
        rows, at = (wanted & (picked.tokens != 0).any(-1)).nonzero().unbind(1)
        if not len(rows):
            return picked
        states = self.backbone.lower(picked.tokens[rows, at])
        inside = torch.arange(states.shape[1], device=states.device) < picked.lengths[rows, at][:, None]
        values, grain = picked.values.clone(), picked.grain.clone()
        values[rows, at] = states * inside[..., None]
        grain[rows, at] = 1
        return picked._replace(values=values, grain=grain)

    def _from_tier(
        self,
        plan: Plan,
        sources: list[int],
        state: State,
        tier: StateTier,
        known: Picked | None,
        chosen: Picked,
        found: Tensor,
    ) -> tuple[Picked, Tensor]:
        """Replace what was picked for the streams that ask the long-term tier by what it has."""
        asking = [row for row, source in enumerate(sources) if source == LONG_TERM]
        most = chosen.lengths.shape[1]
        seen: list[set[int]] = [set() for _ in sources]
        if known is not None:
            for known_rows, places, far in zip(seen, known.place.tolist(), known.long_term.tolist(), strict=True):
                known_rows.update(place for place, long_term in zip(places, far, strict=True) if long_term)
        queries = plan.query.detach()[asking].float().cpu().numpy()
        rows, scores = tier.search(
            queries,
            [state.streams[row] for row in asking],
            state.position[asking].cpu().numpy(),
            most + max(len(places) for places in seen),
        )
        parts = {name: getattr(chosen, name).clone() for name in Picked._fields}
        found = found.clone()
        for number, row in enumerate(asking):
            new = [
                at for at in range(rows.shape[1]) if rows[number, at] >= 0 and int(rows[number, at]) not in seen[row]
            ]
            new = new[:most]
            parts["lengths"][row] = 0
            parts["place"][row] = -1
            if not new:
                continue
            got = tier.fetch(rows[number, new])
            device, dtype = state.gist.device, state.gist.dtype
            values = restore(torch.from_numpy(got.values), torch.from_numpy(got.scales), dtype).to(device)
            here = slice(0, len(new))
            parts["values"][row] = 0
            parts["values"][row, here, : values.shape[1]] = values
            parts["keys"][row, here] = torch.from_numpy(got.keys.astype(np.float32)).to(device, dtype)
            for number_, ids in enumerate(got.tokens):
                parts["tokens"][row, number_] = 0
                parts["tokens"][row, number_, : len(ids)] = torch.tensor(ids, device=device)
            parts["lengths"][row, here] = torch.from_numpy(got.lengths.astype(np.int64)).to(device)
            parts["starts"][row, here] = torch.from_numpy(got.positions).to(device)
            parts["grain"][row] = self.config.stored_ratio
            parts["place"][row, here] = torch.from_numpy(rows[number, new]).to(device)
            parts["long_term"][row] = True
            found[row, here] = torch.from_numpy(scores[number, new]).to(device, found.dtype)
        return Picked(**parts), found

    def _fit(self, choice: Tensor, picked: Picked, used: Tensor) -> Tensor:
        """Give the ratio of each record, made coarser, or 0, where the position budget does not hold it: (B, P)."""
        left = self.config.budget - used
        ratios = []
        for at in range(choice.shape[1]):
            ratio = torch.zeros_like(left)
            for number, candidate in reversed(list(enumerate(self.config.ratios))):
                real = picked.grain[:, at].clamp(min=candidate)
                cost = (picked.lengths[:, at] + real - 1) // real
                fits = (number >= choice[:, at]) & (cost <= left) & (choice[:, at] < len(self.config.ratios))
                ratio = torch.where(fits, real, ratio)  # the finest that is allowed comes last
            ratio = ratio * (picked.lengths[:, at] > 0)
            left = left - torch.where(ratio > 0, (picked.lengths[:, at] + ratio - 1) // ratio.clamp(min=1), 0)
            ratios.append(ratio)
        return torch.stack(ratios, dim=1)

    def assemble(self, parts: Sequence[Picked | None]) -> Recalled | None:
        """Put what was picked into one row of positions per stream, in the order of the text; None for nothing."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        picked = joined(found)
        B, P, L, D = picked.values.shape
        vectors, counts = torch.zeros_like(picked.values), torch.zeros_like(picked.lengths)
        places = torch.zeros(B, P, L, device=vectors.device)
        for grain in {1, self.config.stored_ratio}:
            held = (picked.lengths + grain - 1) // grain
            for ratio in [ratio for ratio in self.config.ratios if ratio >= grain]:
                here = (picked.grain == grain) & (picked.ratio == ratio) & picked.taken
                if not bool(here.any()):
                    continue
                pooled, count = self.pooler(picked.values, held, ratio, grain=grain)
                pooled = nn.functional.pad(pooled, (0, 0, 0, L - pooled.shape[2]))
                vectors = torch.where(here[..., None, None], pooled, vectors)
                counts = torch.where(here, count, counts)
                places = torch.where(here[..., None], middles(picked.lengths, L, ratio), places)
        inside = torch.arange(L, device=vectors.device) < counts[..., None]  # (B, P, L)
        order = torch.where(counts > 0, picked.starts, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        spans = picked.lengths * (counts > 0)
        spans, places, inside, vectors = (
            part.gather(1, order.view(B, P, *[1] * (part.dim() - 2)).expand_as(part))
            for part in (spans, places, inside, vectors)
        )
        places = places + (spans.cumsum(1) - spans)[..., None]
        compact = inside.flatten(1).long().argsort(dim=1, stable=True)  # padding first
        real = inside.flatten(1).gather(1, compact)
        widest, narrowest = int(real.sum(1).max()), int(real.sum(1).min())
        if not widest:
            return None
        compact, real = compact[:, -widest:], real[:, -widest:]
        vectors = vectors.flatten(1, 2).gather(1, compact[..., None].expand(-1, -1, D))
        padded = real if narrowest < widest else None  # without padding attention needs no mask, which is quicker
        if self._packed(P * L):
            return Recalled(vectors, padded, (real.cumsum(1) - 1).clamp(min=0).float(), real.sum(1).float())
        return Recalled(vectors, padded, places.flatten(1).gather(1, compact), spans.sum(1).float())

    def _packed(self, most: int) -> bool:
        """Say whether pooled vectors take one position each: by the config, or to stay in the trained length."""
        rest = self.config.window + self.config.segment_length
        return self.config.positions == "packed" or most + rest > self.backbone.trained_length

    # -- the segment ---------------------------------------------------------------------------------------------------
    def decode(self, x: Tensor, state: State, recalled: Recalled | None) -> Tensor:
        """Take a segment from the encoder depth to logits, seeing what was recalled, the window and the slots.

        Args:
            x: (B, T, D).
            state: from before the segment.
            recalled: positions that stand before everything.

        Returns:
            (B, T, V).
        """
        sequence, positions, mask, _ = self.sequence(x, state, recalled)
        top = self.backbone.upper(sequence, positions, mask, between=self.slot_reader(state.slots))
        return self.backbone.head(top[:, top.shape[1] - x.shape[1] :])

    def sequence(
        self, x: Tensor, state: State, recalled: Recalled | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Give [recalled | window | segment] as the upper layers take it.

        Returns:
            States (B, N, D), positions (1 or B, N), mask (B, 1, N, N) bool or None for plain causal attention, and
            which positions are real, (B, N) bool or None for all.
        """
        B, T, _ = x.shape
        W, device = state.window.shape[1], x.device
        positions = torch.arange(W + T, device=device)[None]
        if recalled is None and state.window_real is None:
            return torch.cat([state.window, x], 1), positions, None, None
        if recalled is not None and recalled.real is None and state.window_real is None:
            positions = torch.cat([recalled.places, positions + recalled.span[:, None]], 1)
            return torch.cat([recalled.vectors, state.window, x], 1), positions, None, None
        real = state.window_real if state.window_real is not None else torch.ones(B, W, dtype=torch.bool, device=device)
        real = torch.cat([real, torch.ones(B, T, dtype=torch.bool, device=device)], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        parts = [state.window, x]
        if recalled is not None:
            positions = torch.cat([recalled.places, positions + recalled.span[:, None]], 1)
            there = torch.ones_like(recalled.places, dtype=torch.bool) if recalled.real is None else recalled.real
            real = torch.cat([there, real], 1)
            parts = [recalled.vectors, *parts]
        N = real.shape[1]
        causal = torch.ones(N, N, dtype=torch.bool, device=device).tril()
        itself = torch.eye(N, dtype=torch.bool, device=device)  # padding sees itself: a row of nothing is no number
        return torch.cat(parts, 1), positions, ((causal & real[:, None]) | itself)[:, None], real

    def slot_reader(self, slots: Tensor) -> SlotReader | None:
        """Give what reads the slots between the upper layers, or None when there are none."""
        return SlotReader(self.slot_layers, slots) if len(self.slot_layers) else None

    # -- after the segment ---------------------------------------------------------------------------------------------
    def write(
        self, state: State, x: Tensor, tokens: Tensor, real: Tensor | None = None, records: Records | None = None
    ) -> tuple[State, Records]:
        """Write a segment that was read into memory, and let go of what has no room.

        Args:
            state: from before the segment.
            x: its states at encoder depth, (B, T, D).
            tokens: its ids, (B, T).
            real: number of tokens of each row that are text, (B,); None for all.
            records: working memory with what this step read noted; default that of the state.

        Returns:
            The state after the segment, and the records that were evicted, (B, N, ...).
        """
        config, records = self.config, state.records if records is None else records
        B, T, _ = x.shape
        padded = real is not None
        if real is not None:  # a stream that has no more text has not read either
            read = (real > 0)[:, None]
            records = records._replace(
                reads=torch.where(read, records.reads, state.records.reads),
                read_at=torch.where(read, records.read_at, state.records.read_at),
            )
        lengths = real if real is not None else torch.full((B,), T, dtype=torch.int64, device=x.device)
        values, ids, *numbers = working.split(x, tokens, lengths, state.position, state.step, config.record_length)
        keys = self.router.keys(values, numbers[0])
        everything = working.insert(records, Records(values, keys, ids, *numbers))
        keep = self.router.keeps(state.plan, everything, state.step) if config.eviction == "learned" else None
        kept, evicted = working.evict(
            everything, retention(config.eviction, everything, state.step, keep=keep), self.places
        )
        slots = self.slots(state.slots, x, lengths) if config.slots else state.slots
        inside = torch.arange(T, device=x.device) < lengths[:, None]
        gist = (x * inside[..., None]).sum(1) / lengths.clamp(min=1)[:, None].to(x.dtype)
        gist = torch.where((lengths > 0)[:, None], gist, state.gist)
        window, window_real = _window(state, x, inside if padded else None, config.window)
        plan = self.router(gist, slots, kept.occupancy, torch.zeros_like(gist), 0)
        position, step = state.position + lengths, state.step + (lengths > 0)
        after = State(slots, kept, window, window_real, gist, position, plan, step, state.streams)
        return after, evicted

    def store(self, evicted: Records, state: State, tier: StateTier) -> None:
        """Put records that working memory let go of into the long-term tier, compressed; no gradient crosses."""
        valid = (evicted.lengths > 0).nonzero().cpu()  # (N, 2)
        if not len(valid):
            return
        rows, places = valid[:, 0], valid[:, 1]
        values, lengths, keys, tokens, starts, written = (
            part.detach()[rows.to(part.device), places.to(part.device)]
            for part in (
                evicted.values, evicted.lengths, evicted.keys, evicted.tokens, evicted.starts, evicted.written,
            )
        )  # fmt: skip
        codes, scales = quantise(self.pooler(values, lengths, self.config.stored_ratio)[0].detach())
        counts = lengths.tolist()
        ids = [tuple(row[:count]) for row, count in zip(tokens.tolist(), counts, strict=True)]
        tier.add(
            StateRows(
                streams=tuple(state.streams[row] for row in rows.tolist()),
                steps=written.cpu().numpy(),
                positions=starts.cpu().numpy(),
                lengths=lengths.to(torch.int32).cpu().numpy(),
                keys=keys.to(torch.float16).cpu().numpy(),
                values=codes.cpu().numpy(),
                scales=scales.cpu().numpy(),
                tokens=tuple(ids),
            ),
            keep=self._worth(evicted, state)[valid[:, 0], valid[:, 1]].numpy() if tier.policy == "learned" else None,
        )

    def _worth(self, records: Records, state: State) -> Tensor:
        """Give the router's scores by which records are kept, (B, N) float32 on the CPU."""
        return self.router.keeps(state.plan, records, state.step).detach().float().cpu()

    def state_format(self) -> StateFormat:
        """Give the format of this model's rows in the long-term tier."""
        config = self.config
        return StateFormat(
            key_dim=config.key_dim,
            dim=self.backbone.dim,
            vectors=-(-config.record_length // config.stored_ratio),
            ratio=config.stored_ratio,
            dtype="int8",
            backbone=fingerprint(self.backbone),
            depth=config.depth,
            key_version=f"{_KEY_VERSION}:{_weights_hash(self.router.key.weight, *self.pooler.weights)}",
        )

    # -- whole texts ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        state: State,
        tier: StateTier | None = None,
        *,
        real: Tensor | None = None,
        at_once: int = 8,
    ) -> State:
        """Read texts of any length into memory; what is needed stays the same however long they are.

        Nothing is decoded, so the upper layers do not run, and the lower layers take several segments in one go, as
        no segment sees another there.

        Args:
            tokens: ids, (B, N) int64, on any device; N may be 0.
            state: of the streams.
            tier: the long-term tier, which takes what working memory evicts.
            real: number of tokens of each row that are text, (B,) int64.
            at_once: segments of each stream that the lower layers take together.

        Raises:
            OutOfMemory: one segment is too much for the device; it carries the state up to there.
        """
        if len(state.streams) != len(tokens):
            raise UsageError(f"{len(tokens)} rows of tokens do not fit a state of {len(state.streams)} streams")
        self.check_tier(tier)
        T, at = self.config.segment_length, 0
        while at < tokens.shape[1]:
            whole = min(at_once, (tokens.shape[1] - at) // T)
            size = whole * T if whole else tokens.shape[1] - at
            piece = tokens[:, at : at + size].to(self.backbone.device)
            try:
                segments = piece.unflatten(1, (max(whole, 1), -1))  # (B, n, T)
                states = self.backbone.lower(segments.flatten(0, 1)).unflatten(0, segments.shape[:2])
            except torch.OutOfMemoryError:
                if whole <= 1:
                    raise OutOfMemory(
                        f"no memory for one segment of {T} tokens in {len(tokens)} streams, after {at} tokens; "
                        f"read fewer streams at once",
                        state,
                    ) from None
                at_once = whole // 2
                continue
            for number in range(segments.shape[1]):
                left = None if real is None else (real.to(piece.device) - at - number * T).clamp(0, segments.shape[2])
                state, evicted = self.write(state, states[:, number], segments[:, number], left)
                if tier is not None:
                    self.store(evicted, state, tier)
            at += size
        return state

    def check_tier(self, tier: StateTier | None, *, whole: bool = True) -> None:
        """See that a long-term tier was made for this model's states.

        Args:
            tier: the tier.
            whole: compare what weights made the states and keys too; without it only the sizes, which costs nothing.

        Raises:
            IncompatibleError: it was made for others.
        """
        if tier is None:
            return
        theirs = asdict(tier.form)
        config = self.config
        sizes = {
            "key_dim": config.key_dim,
            "dim": self.backbone.dim,
            "ratio": config.stored_ratio,
            "depth": config.depth,
        }
        ours = asdict(self.state_format()) if whole else sizes
        for name, value in ours.items():
            if theirs[name] != value:
                raise IncompatibleError(
                    f"the long-term tier was made with {name} {theirs[name]!r}, this model has {value!r}; "
                    f"read the texts again into a new tier, or load the model that made it"
                )

    def _check(self, tokens: Tensor, state: State) -> None:
        B, T = tokens.shape
        if not 1 <= T <= self.config.segment_length:
            raise UsageError(f"a step takes 1 to {self.config.segment_length} tokens, not {T}; `read` takes any number")
        if len(state.streams) != B:
            raise UsageError(f"{B} rows of tokens do not fit a state of {len(state.streams)} streams")


class SlotReader:
    """Reads the slots before some of the upper layers."""

    def __init__(self, layers: nn.ModuleDict, slots: Tensor) -> None:
        self.layers, self.slots = layers, slots

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """Give what enters a layer."""
        name = str(number)
        read: Tensor = self.layers[name](x, self.slots) if name in self.layers else x
        return read


def _window(state: State, x: Tensor, inside: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """Give the last `most` states of each stream; padding, which stands first, only where there are fewer."""
    window = torch.cat([state.window, x], 1)
    if inside is None and state.window_real is None:
        return window[:, max(0, window.shape[1] - most) :], None
    old = (
        state.window_real if state.window_real is not None else torch.ones_like(state.window[..., 0], dtype=torch.bool)
    )
    new = inside if inside is not None else torch.ones_like(x[..., 0], dtype=torch.bool)
    real = torch.cat([old, new], 1)
    order = real.long().argsort(dim=1, stable=True)[:, max(0, real.shape[1] - most) :]
    return window.gather(1, order[..., None].expand(-1, -1, window.shape[2])), real.gather(1, order)


def _cost(picked: Picked) -> Tensor:
    """Give the positions that picked records take, (B,) int64."""
    counts = (picked.lengths + picked.ratio - 1) // picked.ratio.clamp(min=1)
    return (counts * (picked.ratio > 0)).sum(1)


def _weights_hash(*weights: Tensor) -> str:
    import hashlib

    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
