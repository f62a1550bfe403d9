"""Questions packed to a row read as if each were asked alone; batches depend on seed and step alone."""

import random
from pathlib import Path

import pytest
import torch
from memory_models import tiny_folder, tiny_model

from l2m_rag.backbone import Backbone, load_backbone
from l2m_rag.checkpoint import add_lora
from l2m_rag.losses import IGNORED
from l2m_rag.model import L2M
from l2m_rag.model_config import L2MConfig
from l2m_rag.reading import ReadingBatches, ReadingLoss
from l2m_rag.reading_data import Material, Question
from l2m_rag.state import Picked


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 1

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + ord(letter) % 60 for letter in text] for text in texts]}


def _material() -> Material:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(200)]
    passages = [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(12)]
    questions = [
        Question(number, f"{draw.choice(words)}?", draw.choice(passage.split()))
        for number, passage in enumerate(passages)
        for _ in range(draw.randint(0, 4))
    ]
    near = [[(number + step) % 12 for step in (1, 2, 3)] for number in range(12)]
    lures = [
        [n for n, q in enumerate(questions) if q.passage != number and q.answer not in passage]
        for number, passage in enumerate(passages)
    ]
    return Material(passages, ["squad"] * 12, questions, near, lures)


def _batches(seed: int = 0) -> ReadingBatches:
    return ReadingBatches(_material(), Letters(), batch=2, longest=400, unanswerable=0.5, seed=seed)


@pytest.mark.parametrize("ratio", [1, 4])
def test_packed_questions_read_as_if_alone(ratio: int) -> None:
    model = tiny_model()
    batch = _batches()(0)
    logits, targets, owner = ReadingLoss(model).answers(batch, ratio)
    assert len(set(owner.tolist())) > 2
    for number in sorted(set(owner.tolist())):
        row, at = divmod(number, batch.asked.shape[1])
        lengths = batch.lengths[row : row + 1]
        values = model.backbone.lower(batch.passages[row])[None]
        ones = torch.ones_like(lengths)
        order = torch.arange(lengths.shape[1])[None]
        picked = Picked(
            values, values[:, :, 0, :1], batch.passages[row : row + 1], lengths, order, ones, ratio * ones, order,
            ones < 0,
        )  # fmt: skip
        asked = batch.asked[row, at, : batch.real[row, at]][None]
        alone = model.decode(model.backbone.lower(asked), model.start(), model.assemble([picked]))[0]
        here = batch.told[row, at, : batch.real[row, at]] != IGNORED
        torch.testing.assert_close(logits[owner == number], alone[here].float(), atol=2e-4, rtol=1e-3)
        assert targets[owner == number].tolist() == batch.told[row, at, : batch.real[row, at]][here].tolist()


def test_kept_states_change_nothing() -> None:
    model, batches = tiny_model(), _batches()
    kept = ReadingLoss(model, cached=200_000)
    for step in (0, 1, 0, 2, 0):
        with torch.no_grad():
            expected = ReadingLoss(model)(batches(step)).losses["total"]
            torch.testing.assert_close(kept(batches(step)).losses["total"], expected)
    assert kept._cache.bytes <= 200_000 + 40 * 64 * 32 * 4


def test_batches_depend_on_seed_and_step_alone() -> None:
    one, other = _batches(), _batches()
    later = [other(step) for step in (9, 3, 0)]
    for step, batch in zip((9, 3, 0), later, strict=True):
        for mine, theirs in zip(one(step), batch, strict=True):
            assert torch.equal(mine, theirs)
    assert any(
        mine.shape != theirs.shape or not torch.equal(mine, theirs)
        for mine, theirs in zip(one(0), _batches(1)(0), strict=True)
    )


def test_an_epoch_visits_every_passage_and_asks_only_what_fits() -> None:
    batches = _batches()
    material = batches.material
    rows = [row for batch in batches.epoch(0) for row in batch]
    assert rows
    for row in rows:
        assert sum(batches.tokens(row)) <= 400
        assert len(set(row.passages)) == len(row.passages)
        for number, answered in row.questions:
            question = material.questions[number]
            assert answered == (question.passage in row.passages)
            if not answered:
                assert not any(question.answer in material.passages[passage] for passage in row.passages)
    asked = [number for row in rows for number, answered in row.questions if answered]
    assert len(asked) == len(set(asked))


def test_answers_in_own_words_are_asked_for_in_another_way() -> None:
    passages = ["the cat sat on the mat", "a dog ran"]
    asked = [Question(0, "Who sat?", "cat"), Question(1, "Did it run?", "Yes", -1, True)]
    material = Material(passages, ["squad"] * 2, asked, [[1], [0]], [[], []])
    for freely, expected in ((0.0, {"In short:": 1, "Answer:": 1}), (1.0, {"In short:": 2, "Answer:": 0})):
        batches = ReadingBatches(material, Letters(), batch=1, longest=400, freely=freely)
        text = [Letters()([ending])["input_ids"][0] for ending in ("In short:", "Answer:")]
        found = [question[-len(ending) :] == ending for ending in text for question in batches._questions]
        assert [sum(found[:2]), sum(found[2:])] == list(expected.values())


def test_texts_without_a_passage_are_held_to_the_backbone(tmp_path: Path) -> None:
    plain = ["".join(random.Random(number).choices("abcdefgh ", k=150)) for number in range(4)]
    batches = ReadingBatches(_material(), Letters(), batch=4, longest=400, plain=[*plain, "too short"])
    batch = batches(0)
    assert batch.text.shape == (2, 128)
    assert {tuple(row) for row in batch.text.tolist()} <= {tuple(ids[:128]) for ids in Letters()(plain)["input_ids"]}

    folder = tiny_folder(tmp_path, plain)
    backbone = load_backbone(folder, 2, dtype=torch.float32)
    backbone.requires_grad_(False)
    tokens = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(0))
    alone = _said(backbone, tokens)
    add_lora(backbone, 4)
    assert float(_far(backbone, tokens).detach()) == pytest.approx(0, abs=1e-6)  # adapters begin as nothing
    adapters = [weight for name, weight in backbone.named_parameters() if "lora_B" in name]
    for weight in adapters:
        torch.nn.init.normal_(weight, std=0.1)
    own = _said(backbone, tokens)
    expected = (alone.exp() * (alone - own)).sum(-1).mean()
    far = _far(backbone, tokens)
    torch.testing.assert_close(far, expected)
    assert float(far.detach()) > 0.001
    far.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapters)
    torch.testing.assert_close(_said(backbone, tokens), own)  # the adapters are back in their place

    loss = ReadingLoss(tiny_model(), distance=0.5)(batch)
    assert "distance" in loss.losses


def _far(backbone: Backbone, tokens: torch.Tensor) -> torch.Tensor:
    config = L2MConfig(depth=2, segment_length=16, record_length=8, slots=4, slot_heads=2, slot_layers=(2,), key_dim=8)
    return ReadingLoss(L2M(backbone, config))._distance(tokens)


def _said(backbone: Backbone, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        return backbone.head(backbone.upper(backbone.lower(tokens), positions)).float().log_softmax(-1)


def test_a_passage_is_written_back_from_its_own_pooled_states() -> None:
    material = _material()
    texts = ["".join(random.Random(number).choices("abcdefgh ", k=73 + number)) for number in range(20)]
    batches = ReadingBatches(material, Letters(), batch=2, longest=400, rebuild=1.0, texts=texts)
    batch = batches(3)
    ids = {tuple(row): text for text, row in zip(texts, Letters()(texts)["input_ids"], strict=True)}
    for row in range(len(batch.passages)):
        passage = tuple(batch.passages[row, 0, : batch.lengths[row, 0]].tolist())
        assert passage in ids
        told = batch.told[row, 0][batch.told[row, 0] != IGNORED].tolist()
        assert tuple(told) == (*passage, 1)
    outcome = ReadingLoss(tiny_model(), ratios=(1, 4))(batch)
    assert set(outcome.losses) == {"total"}  # an answer is none of it
    assert list(outcome.figures) == ["reconstruction 4:1"]  # at 1:1 there is nothing to learn
    assert sum(
        float(
            ReadingBatches(material, Letters(), batch=2, longest=400, rebuild=0.5, texts=texts)(step).asked.shape[1]
            == 1
        )
        for step in range(40)
    ) in range(8, 33)


def test_rows_of_one_question_fill_no_more_than_they_have() -> None:
    material = Material(["abc def"] * 2, ["squad"] * 2, [Question(0, "ab?", "def")], [[1], [0]], [[], []])
    batches = ReadingBatches(material, Letters(), batch=1, longest=100)
    outcome = ReadingLoss(tiny_model())(batches(0))
    assert torch.isfinite(outcome.losses["total"])
