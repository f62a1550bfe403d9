"""The losses on cases whose value is plain."""

import torch
from memory_models import text, tiny_model
from torch.testing import assert_close

from l2m_rag.losses import IGNORED, Episode, EpisodeLoss, LossWeights

EVERY = LossWeights(lookup=0.1, reconstruction=0.1, resolution=0.1, language=0.1, distance=0.1)


def episode(gold: list[list[int]], *, segments: int = 3) -> Episode:
    batch = len(gold)
    answer = text(batch, 3, seed=2)
    out = torch.cat([torch.full((batch, 1), IGNORED), answer[:, 1:]], 1)
    return Episode(
        text(batch, segments, 12), torch.full((batch, segments), 12), text(batch, 4, seed=1), torch.full((batch,), 4),
        answer, out, torch.tensor(gold),
    )  # fmt: skip


def test_every_loss_is_a_number_and_has_a_gradient() -> None:
    model = tiny_model(gates=0.1, records=20)
    outcome = EpisodeLoss(model, EVERY, teacher=0.5)(episode([[5, 20], [30, -1]]))
    assert set(outcome.losses) == {
        "answer", "retrieval", "router", "lookup", "keep", "reconstruction", "resolution", "language", "distance",
        "total",
    }  # fmt: skip
    assert all(torch.isfinite(value) and value.dim() == 0 for value in outcome.losses.values())
    outcome.losses["total"].backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == ["router.fire.weight", "router.fire.bias"]


def test_the_total_is_the_weighted_sum() -> None:
    model = tiny_model(records=20)
    torch.manual_seed(0)
    outcome = EpisodeLoss(model, EVERY, teacher=1.0)(episode([[5], [30]]))
    named = {name: value for name, value in outcome.losses.items() if name != "total"}
    assert_close(outcome.losses["total"], sum(getattr(EVERY, name) * value for name, value in named.items()))


def test_evidence_of_any_order_costs_the_same() -> None:
    model = tiny_model(records=20)
    losses = [
        EpisodeLoss(model, LossWeights(), teacher=0.0)(episode([gold])).losses["retrieval"]
        for gold in ([5, 20], [20, 5], [20, 5, 5, -1])
    ]
    assert_close(losses[0], losses[1])
    assert_close(losses[0], losses[2])


def test_without_evidence_the_router_is_to_recall_nothing() -> None:
    model = tiny_model(records=20)
    outcome = EpisodeLoss(model, LossWeights(), hops=1)(episode([[-1], [-1]]))
    assert outcome.losses["retrieval"] == 0
    assert outcome.losses["router"] < 0.5  # an untrained router says none
    led = EpisodeLoss(model, LossWeights(), hops=1)(episode([[5], [5]]))
    assert led.losses["router"] > outcome.losses["router"]


def test_without_drift_the_distance_from_the_backbone_is_nothing() -> None:
    model = tiny_model(window=0, records=20)
    weights = LossWeights(distance=1.0, language=1.0)
    outcome = EpisodeLoss(model, weights)(episode([[5]], segments=1))
    assert_close(outcome.losses["distance"], torch.tensor(0.0), atol=1e-6, rtol=0)
    with torch.no_grad():
        for layer in model.slot_layers.values():
            layer.gate.fill_(1.0)  # type: ignore[operator]
    assert EpisodeLoss(model, weights)(episode([[5]], segments=1)).losses["distance"] > 1e-6


def test_the_teacher_recalls_the_evidence() -> None:
    model = tiny_model(records=20, recall=1)
    loss = EpisodeLoss(model, LossWeights(), hops=1, teacher=1.0)
    made = episode([[5], [25]])
    state, evicted, _ = loss.read(made)
    picked, _, _ = loss._recall(state, evicted, made)
    assert picked is not None
    assert picked.starts.tolist() == [[4], [24]]


def test_evidence_that_was_evicted_is_looked_for_in_the_long_term_tier() -> None:
    model = tiny_model(records=3, recall=1, eviction="fifo", source="long_term")
    loss = EpisodeLoss(model, LossWeights(), hops=1, teacher=1.0)
    made = episode([[5], [9]], segments=4)
    state, evicted, _ = loss.read(made)
    picked, losses, figures = loss._recall(state, evicted, made)
    assert picked is not None
    assert picked.starts.tolist() == [[4], [8]]
    assert picked.long_term.all()
    assert (picked.grain == 4).all()
    picked.values.sum().backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.backbone.parameters())
    assert figures["retrieved"] <= 1
    near = tiny_model(records=3, recall=1, eviction="fifo", source="working")
    other = EpisodeLoss(near, LossWeights(), hops=1, teacher=1.0)
    assert other._recall(*other.read(made)[:2], made)[1]["router"] > losses["router"]  # the one that says long-term


def test_without_memory_nothing_is_recalled() -> None:
    model = tiny_model(gates=0.5, records=20)
    outcome = EpisodeLoss(model, EVERY, memory=False)(episode([[5]]))
    assert "retrieval" not in outcome.losses
    assert "answer" in outcome.losses
