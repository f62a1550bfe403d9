"""Models and states on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import VOCABULARY, text, tiny_model
from torch.testing import assert_close

from l2m_rag.checkpoint import load_model, load_state, save_model, save_state
from l2m_rag.errors import CorruptError, IncompatibleError, L2MError
from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.model import L2M

TINY = {"tiny": {"dim": 48, "family": "llama", "vocab_size": VOCABULARY}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[L2M, Path]:
    model = tiny_model(source="working", gates=0.3)
    save_model(model, tmp_path / "model", backbone=TINY)
    return model, tmp_path / "model"


@pytest.mark.parametrize("source", ["working", "long_term"])
def test_saved_loaded_and_gone_on_equals_going_on(tmp_path: Path, source: str) -> None:
    model = tiny_model(source=source, gates=0.3)
    save_model(model, tmp_path / "model", backbone=TINY)
    tier = StateTier(model.state_format(), tmp_path / "tier")
    state = model.read(text(2, 60), model.start(2), tier, real=torch.tensor([60, 50]))
    save_state(state, model, tmp_path / "state.safetensors")
    tier.close()
    again = load_model(tmp_path / "model")
    back = load_state(tmp_path / "state.safetensors", again)
    with torch.no_grad():
        plain = model.step(text(2, 12, seed=7), state, StateTier(model.state_format(), tmp_path / "tier"))
        loaded = again.step(text(2, 12, seed=7), back, StateTier(again.state_format(), tmp_path / "tier"))
    assert any(hop.picked is not None for hop in loaded.hops)
    assert_close(loaded.logits, plain.logits)
    assert back.streams == state.streams
    assert torch.equal(back.step, state.step)


def test_shards_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2m_rag.checkpoint._SHARD_BYTES", 30_000)
    model = tiny_model()
    save_model(model, tmp_path / "model", backbone=TINY)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    save_model(model, tmp_path / "model", backbone=TINY)
    assert_close(dict(load_model(tmp_path / "model").named_parameters()), dict(model.named_parameters()))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def edit(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))


def test_a_checkpoint_that_does_not_fit_is_refused(saved: tuple[L2M, Path]) -> None:
    _, folder = saved
    whole = json.loads((folder / "config.json").read_text())
    edit(folder, format=99)
    with pytest.raises(IncompatibleError, match="format 99"):
        load_model(folder)
    edit(folder, **{**whole, "config": {**whole["config"], "key_dim": 8}})
    with pytest.raises(
        IncompatibleError, match=r"weight router.keep.0.weight is \(64, 20\), the model takes \(64, 12\)"
    ):
        load_model(folder)
    edit(folder, **{**whole, "config": {**whole["config"], "colour": 8}})
    with pytest.raises(IncompatibleError, match="does not describe"):
        load_model(folder)
    edit(folder, **{**whole, "fingerprint": "0" * 16})
    with pytest.raises(IncompatibleError, match="trained on backbone 0000"):
        load_model(folder)
    edit(folder, **{**whole, "parameters": 1})
    with pytest.raises(CorruptError, match="says 1"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptError, match="cannot be read"):
        load_model(folder)
    with pytest.raises(L2MError, match="holds no checkpoint"):
        load_model(folder / "nowhere")


def test_cut_weights_are_noticed(saved: tuple[L2M, Path]) -> None:
    _, folder = saved
    path = folder / "weights-00.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="cannot be read"):
        load_model(folder)


def test_states_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    state = model.read(text(1, 30), model.start())
    path = tmp_path / "state.safetensors"
    save_state(state, model, path)
    with pytest.raises(IncompatibleError, match="made by another model"):
        load_state(path, tiny_model(window=5))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptError, match="read the text again"):
        load_state(path, model)
    with pytest.raises(L2MError, match="there is no state"):
        load_state(tmp_path / "none", model)
    state.gist[0, 0] = float("nan")
    with pytest.raises(CorruptError, match="not numbers"):
        save_state(state, model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]
