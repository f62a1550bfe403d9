"""Tiny memory models that the tests of the memory model share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from l2m_rag.backbone import tiny_backbone
from l2m_rag.memory_tiers.router import SOURCES
from l2m_rag.model import L2M
from l2m_rag.model_config import L2MConfig
from l2m_rag.slot_layer import SlotLayer

VOCABULARY = 64
FAMILIES = ("llama", "smollm", "qwen2", "qwen3")


def tiny_model(family: str = "llama", *, source: str | None = None, gates: float | None = None, **changes: Any) -> L2M:
    """Make a model of 4 layers.

    Args:
        family: of the backbone.
        source: what the router always says, one of `SOURCES`; None leaves it as it begins.
        gates: what the residual gates are set to.
        changes: of the config.
    """
    torch.manual_seed(1)
    dim = 48
    config: dict[str, Any] = {
        "depth": 2, "segment_length": 12, "record_length": 4, "window": 12, "slots": 6, "slot_heads": 3,
        "slot_layers": (2, 3), "slots_written": 2, "key_dim": 16, "records": 5, "recall": 2, "hops": 2, "budget": 24,
    }  # fmt: skip
    model = L2M(tiny_backbone(dim=dim, family=family, vocab_size=VOCABULARY), L2MConfig(**{**config, **changes}))
    with torch.no_grad():
        if source is not None:
            model.router.choice.bias.zero_()
            model.router.choice.bias[SOURCES.index(source)] = 5.0
        if gates is not None:
            for layer in model.slot_layers.values():
                assert isinstance(layer, SlotLayer)
                layer.gate.fill_(gates)
        # a trained router looks at everything
        for head in (model.router.order, model.router.resolution_logits):
            head.weight.normal_(std=0.1)
    return model


def text(*shape: int, seed: int = 0) -> Tensor:
    """Give random ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int) -> int:
    """Write a byte-level tokenizer that knows the texts; give the number of its ids, of which 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    return int(tokenizer.get_vocab_size())


def tiny_folder(folder: Path, texts: Sequence[str]) -> Path:
    """Write a random language model of 4 layers, in bfloat16 as the default is, and a tokenizer of the texts."""
    ids = tiny_tokenizer(folder, [*texts, "Question: Answer:"], 330)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ids,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
