"""The router: what a step retrieves, from where, how finely it is read, and what working memory keeps.

It sees the past only: the mean state of the segment before, a summary of the slots, how full working memory is, and
what has been recalled so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_rag.memory_tiers.working import Records

NONE, WORKING, LONG_TERM, STOP = range(4)
SOURCES = ("none", "working", "long_term", "stop")
_DELTA, _SPAN = 10.0, 9.0  # of the relative places
_FREQUENCIES = 8


class Plan(NamedTuple):
    """What the router decided for one step or hop.

    Args:
        choice: logits over `SOURCES`, (B, 4).
        source: the choice, (B,) int64.
        query: in key space, unit length, (B, K).
        order: weight of each feature of a candidate's relative place, (B, 2 * frequencies).
        hidden: what the other heads look at, (B, H).
        source_host: `source` on the host, where it is on its way since the plan was made.
        arrived: when it is there; None when it is at once.
    """

    choice: Tensor
    source: Tensor
    query: Tensor
    order: Tensor
    hidden: Tensor
    source_host: Tensor
    arrived: torch.cuda.Event | None

    def wants(self) -> list[int]:
        """Give the source of each stream; waits for its copy alone, not for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        wanted: list[int] = self.source_host.tolist()
        return wanted


class Router(nn.Module):
    """Small heads over a summary of the state.

    Args:
        dim: D.
        key_dim: K, width of the key space.
        resolutions: how many ratios a record can be read at; one more stands for not at all.
        hidden: H.
    """

    def __init__(self, dim: int, key_dim: int, resolutions: int, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.question = nn.Linear(dim, key_dim, bias=False)
        self.trunk = nn.Sequential(nn.Linear(3 * dim + 2, hidden), nn.GELU())
        self.choice = nn.Linear(hidden, len(SOURCES))
        self.query = nn.Linear(hidden, key_dim, bias=False)
        self.order = nn.Linear(hidden, 2 * _FREQUENCIES)
        self.resolution = nn.Sequential(nn.Linear(hidden + key_dim + 2, 64), nn.GELU())
        self.resolution_logits = nn.Linear(64, resolutions + 1)
        self.keep = nn.Sequential(nn.Linear(key_dim + 4, 64), nn.GELU(), nn.Linear(64, 1))
        self.fire = nn.Linear(dim, 1)
        self.temperature = nn.Parameter(torch.tensor(2.3))  # logarithm of what multiplies a cosine
        with torch.no_grad():  # untrained it recalls nothing, and reads what it is told to recall in full
            for zeroed in (self.choice, self.order, self.resolution_logits, self.fire):
                zeroed.weight.zero_()
            self.query.weight.mul_(0.1)
            self.choice.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
            self.resolution_logits.bias.copy_(torch.tensor([2.0] + [0.0] * resolutions))
            self.fire.bias.fill_(-6.0)

    def keys(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Give the key of each record, `W_k . mean(x)` at unit length.

        Args:
            values: states at encoder depth, (..., L, D), zero behind `lengths`.
            lengths: tokens in each record, (...) int64.

        Returns:
            (..., K).
        """
        mean = values.sum(-2) / lengths.clamp(min=1)[..., None].to(values.dtype)
        return F.normalize(self.key(self.norm(mean)), dim=-1)

    def forward(self, gist: Tensor, slots: Tensor, occupancy: Tensor, recalled: Tensor, hops: int) -> Plan:
        """Make a plan.

        Args:
            gist: mean state of the segment before, (B, D).
            slots: (B, S, D).
            occupancy: share of the places of working memory that are taken, (B,).
            recalled: mean state of what has been recalled so far, zeros for nothing, (B, D).
            hops: how many hops this step has taken.
        """
        seen = self.norm(gist)
        facts = torch.stack([occupancy.to(seen.dtype), torch.full_like(occupancy, hops, dtype=seen.dtype)], dim=-1)
        hidden = self.trunk(torch.cat([seen, self.norm(slots.mean(1)), self.norm(recalled), facts], dim=-1))
        choice = self.choice(hidden)
        source = choice.detach().argmax(-1)
        host, arrived = source, None
        if source.is_cuda:
            host, arrived = source.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        query = F.normalize(self.question(seen) + self.query(hidden), dim=-1)
        return Plan(choice, source, query, self.order(hidden), hidden, host, arrived)

    def scores(self, plan: Plan, keys: Tensor, starts: Tensor, recalled: Tensor, taken: Tensor, end: Tensor) -> Tensor:
        """Score candidates: cosine of query and key, and what the query makes of their place relative to the recalled.

        Q-RAG (arXiv 2511.07328, section 3) turns keys by their relative place with RoPE; here the place has features
        of its own, so that the index holds keys as they are: `<q, k> + <W h, phi(rho)>`.

        Args:
            plan: of this hop.
            keys: (B, R, K).
            starts: position of each candidate in its stream, (B, R) int64.
            recalled: positions of the records recalled so far, (B, P) int64.
            taken: which of those count, (B, P) bool.
            end: position of the present step, (B,) int64.

        Returns:
            (B, R), scaled for a softmax.
        """
        content = torch.einsum("bk,brk->br", plan.query, keys) * self.temperature.exp()
        places = relative_places(starts, recalled, taken, end)
        return content + torch.einsum("bf,brf->br", plan.order, _features(places).to(content.dtype))

    def resolutions(self, plan: Plan, keys: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
        """Give logits over the ratios, and not reading at all, for each picked record: (B, P, resolutions + 1)."""
        facts = torch.stack([scores, lengths.to(scores.dtype).log1p()], dim=-1)
        hidden = plan.hidden[:, None].expand(-1, keys.shape[1], -1)
        logits: Tensor = self.resolution_logits(
            self.resolution(torch.cat([hidden, keys, facts.to(hidden.dtype)], dim=-1))
        )
        return logits

    def keeps(self, plan: Plan, records: Records, step: Tensor) -> Tensor:
        """Give the retention score of each record, (B, R), in step (B,): the logit of its being read again."""
        numbers = [step[:, None] - records.written, step[:, None] - records.read_at, records.reads]
        facts = torch.stack([number.to(records.keys.dtype).clamp(min=0).log1p() for number in numbers], dim=-1)
        likeness = (records.keys * plan.query[:, None]).sum(-1, keepdim=True)
        score: Tensor = self.keep(torch.cat([records.keys, likeness, facts], dim=-1))[..., 0]
        return score


def relative_places(starts: Tensor, recalled: Tensor, taken: Tensor, end: Tensor) -> Tensor:
    """Give where candidates lie relative to what was recalled.

    Q-RAG's `rho(i) = j delta + l (i - b_j) / (b_j+1 - b_j)`: `b_1 < b_2 < ...` are the recalled positions, `b_0 = 0`
    and the last is `end`; `j` counts those at or before the candidate; `delta` 10, `l` 9.

    Args:
        starts: (B, R) int64.
        recalled: (B, P) int64.
        taken: (B, P) bool.
        end: (B,) int64.

    Returns:
        (B, R) float32.
    """
    far = end[:, None].clamp(min=1)
    borders = torch.where(taken, recalled, far).sort(dim=1).values
    borders = torch.cat([torch.zeros_like(far), borders, far], dim=1)  # (B, P + 2)
    number = (borders[:, None, 1:-1] <= starts[..., None]).sum(-1) if borders.shape[1] > 2 else torch.zeros_like(starts)
    before, behind = borders.gather(1, number), borders.gather(1, number + 1)
    share = (starts - before) / (behind - before).clamp(min=1)
    return number * _DELTA + _SPAN * share.clamp(0, 1)


def _features(places: Tensor) -> Tensor:
    rates = 0.1 * 2.0 ** torch.arange(_FREQUENCIES, device=places.device) / 4
    turned = places[..., None] * rates
    return torch.cat([turned.sin(), turned.cos()], dim=-1)
