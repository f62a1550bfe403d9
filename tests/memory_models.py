"""Tiny memory models that the tests of the memory model share."""

from typing import Any

import torch
from torch import Tensor

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
