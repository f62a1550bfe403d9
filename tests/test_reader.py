"""The trained reader: what it finds is what the model says of passages that enter it as states."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_models import tiny_folder
from torch import Tensor

from l2m_rag.backbone import load_backbone
from l2m_rag.checkpoint import Learnt, add_lora, learnt_of, load_model, save_model, source_of
from l2m_rag.errors import CorruptError, L2MError, UsageError
from l2m_rag.model import L2M
from l2m_rag.model_config import L2MConfig
from l2m_rag.models import reader_folder
from l2m_rag.reader import MemoryReader
from l2m_rag.reading import FREE, QUESTION

PASSAGES = ["the cat sat on the mat", "a dog ran, and 1,450 hens ran", "mat"]
CONFIG = L2MConfig(
    depth=2, segment_length=16, record_length=8, slots=4, slot_heads=2, slot_layers=(2,), key_dim=8, records=2
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("backbone"), PASSAGES)
    backbone = load_backbone(folder, 2, dtype=torch.float32)
    backbone.requires_grad_(False)
    add_lora(backbone, 4)
    model = L2M(backbone, CONFIG)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "lora_" not in name:
            weight.requires_grad_(False)
    made = folder / "checkpoint"
    save_model(model, made, backbone={"source": str(folder)}, lora=4, learnt=Learnt(3, free=True))
    return made


@pytest.fixture
def reader(checkpoint: Path) -> MemoryReader:
    made = MemoryReader(checkpoint, name="tiny", device="cpu", rounded=False)
    made.model.float()
    return made


def log_probabilities(reader: MemoryReader, passages: Sequence[str], question: str, answer: Sequence[int]) -> Tensor:
    """Give the log-probability of each token of an answer and of the end, read in one go."""
    model = reader.model
    asked = reader.ids(QUESTION.format(question))
    recalled = model.assemble([reader._picked(passages, [1] * len(passages))])
    x = model.backbone.lower(torch.tensor([[*asked, *answer]]))
    logits = model.decode(x, model.start(), recalled)[0, len(asked) - 1 :].float().log_softmax(-1)
    return logits.gather(1, torch.tensor([*answer, 0])[:, None])[:, 0]


@torch.no_grad()
def test_scores_are_those_of_the_model_read_in_one_go(reader: MemoryReader) -> None:
    found = reader.quote("who ran?", PASSAGES, best=5)
    assert len({span.score for span in found.spans}) > 2
    for span in found.spans:
        text = PASSAGES[span.passage][span.start : span.end]
        ids = reader.ids(" " + text)
        if len(ids) == span.tokens:  # the same words may be spelt in other tokens inside a passage
            whole = log_probabilities(reader, PASSAGES, "who ran?", ids)
            newline = reader.ids("\n")[0]
            assert span.score >= float(whole.sum()) - 1e-3  # a line break ends an answer too
            assert newline != 0
    alone = log_probabilities(reader, PASSAGES, "who ran?", [])
    assert found.empty == pytest.approx(float(alone[0]), abs=1e-3)
    assert found.recalled == sum(reader.count(passage) for passage in PASSAGES)


@torch.no_grad()
def test_own_words_are_the_likeliest_ones(reader: MemoryReader, monkeypatch: pytest.MonkeyPatch) -> None:
    told = reader.tell("who ran?", PASSAGES, most=6)
    asked, answer = reader.ids(FREE.format("who ran?")), list[int]()
    recalled = reader.model.assemble([reader._picked(PASSAGES, [1] * 3)])
    while len(answer) < 6 and (not answer or answer[-1] != reader._end):
        x = reader.model.backbone.lower(torch.tensor([[*asked, *answer]]))
        answer.append(int(reader.model.decode(x, reader.model.start(), recalled)[0, -1].argmax()))
    assert told == reader.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert told
    assert reader.free
    monkeypatch.setattr(reader, "_end", answer[0])
    assert reader.tokenizer.decode(answer[:1]).strip() == reader.tell("who ran?", PASSAGES, most=6)


@given(
    passages=st.lists(st.text(st.sampled_from("the cat1,.é東 \n"), min_size=1, max_size=40), min_size=1, max_size=3),
    question=st.text("whor an?", min_size=1, max_size=12),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_span_stands_in_its_passage(reader: MemoryReader, passages: list[str], question: str) -> None:
    found = reader.quote(question, passages)
    assert found.empty is not None
    assert found.empty <= 0
    for span in found.spans:
        text = passages[span.passage]
        assert 0 <= span.start < span.end <= len(text)
        assert text[span.start : span.end].strip() == text[span.start : span.end]


@torch.no_grad()
def test_states_that_are_kept_change_nothing_and_are_bounded(checkpoint: Path) -> None:
    reader = MemoryReader(checkpoint, name="tiny", device="cpu", hot_bytes=1000)
    first = reader.quote("who?", PASSAGES)
    assert reader.quote("who?", PASSAGES) == first
    assert reader._held <= 1000
    assert len(reader._hot) < 3


@torch.no_grad()
def test_merged_adapters_say_what_they_say_apart(checkpoint: Path) -> None:
    tokens = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    apart = load_model(checkpoint, dtype=torch.float32)
    merged = load_model(checkpoint, dtype=torch.float32, merged=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert any("lora" in name for name, _ in apart.named_parameters())
    x = merged.backbone.lower(tokens)
    torch.testing.assert_close(
        merged.decode(x, merged.start(2), None), apart.decode(x, apart.start(2), None), atol=1e-4, rtol=1e-4
    )


def test_what_was_not_trained_is_the_same_each_time(checkpoint: Path) -> None:
    one, other = load_model(checkpoint, merged=True), load_model(checkpoint, merged=True)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_checkpoint_is_told_from_other_models(checkpoint: Path, tmp_path: Path) -> None:
    assert reader_folder(str(checkpoint)) == checkpoint
    assert reader_folder(str(checkpoint.parent)) is None  # a plain language model
    assert reader_folder("some/hub-id") is None
    assert source_of(checkpoint) == str(checkpoint.parent)
    with pytest.raises(L2MError, match="no checkpoint"):
        MemoryReader(tmp_path, name="nothing")


def test_a_checkpoint_says_how_many_passages_it_reads_together(
    reader: MemoryReader, checkpoint: Path, tmp_path: Path
) -> None:
    assert reader.together == 3
    described = json.loads((checkpoint / "config.json").read_text())
    del described["together"], described["free"], described["again"]  # as those before they were written down
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert learnt_of(tmp_path).together == 1
    assert not learnt_of(tmp_path).free
    assert not learnt_of(tmp_path).again
    again = MemoryReader(checkpoint, name="again", device="cpu", rounded=False)
    again.model.float()
    once = reader.quote("who ran? who ran?", PASSAGES)
    again._again = True
    assert again.quote("who ran?", PASSAGES) == once


def test_damaged_weights_of_the_probability_are_named(checkpoint: Path) -> None:
    place = checkpoint / "answerability.json"
    place.write_text('{"weights": {"bias": 1, "empty": -1}, "prior": {"bias": 2}}')
    assert MemoryReader(checkpoint, name="tiny", device="cpu").prior == {"bias": 2.0}
    place.write_text("{}")
    try:
        with pytest.raises(CorruptError, match="delete it and run: l2m eval calibrate"):
            MemoryReader(checkpoint, name="tiny", device="cpu")
    finally:
        place.unlink()


def test_passages_are_read_pooled_by_a_reader_that_has_learnt_it(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny has not learnt to read passages at 4:1"):
        MemoryReader(checkpoint, name="tiny", device="cpu", resolution=4)
    backbone = load_backbone(checkpoint.parent, 2, dtype=torch.float32)
    backbone.requires_grad_(False)
    save_model(L2M(backbone, replace(CONFIG, pooling="learned")), tmp_path, backbone={"source": str(checkpoint.parent)})
    reader = MemoryReader(tmp_path, name="pooled", device="cpu", resolution=4)
    found = reader.quote("who ran?", PASSAGES[:1])
    assert (found.ratio, found.recalled) == (4, -(-reader.count(PASSAGES[0]) // 4))
    assert {PASSAGES[0][span.start : span.end] for span in found.spans} - {""}
    assert found != MemoryReader(tmp_path, name="pooled", device="cpu").quote("who ran?", PASSAGES[:1])
    with pytest.raises(UsageError, match="8:1"):
        MemoryReader(tmp_path, name="pooled", device="cpu", resolution=8)
