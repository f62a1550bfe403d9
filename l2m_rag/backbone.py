"""The decoder that everything stands on: a Llama-family causal language model, run layer by layer.

The layers are those of the transformers library; only the loop over them is ours, so that a text can stop half way
up (the encoder half, `lower`) and go on from there together with what was recalled (`upper`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2m_rag.errors import ModelError

Between = Callable[[int, Tensor], Tensor]
"""Called with (number of the layer that comes next, x (B, T, D)); gives the x that enters it."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


class Backbone(nn.Module):
    """A causal language model as embedding, layers and head.

    Args:
        model: of a family in `FAMILIES`, with full attention in every layer.
        depth: number of layers in the encoder half; between 1 and the number of layers less one.

    Raises:
        ModelError: the model is of another family, or has sliding attention, or the depth does not fit.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        config: Any = model.config
        if config.model_type not in FAMILIES:
            raise ModelError(
                f"the memory model needs a backbone of one of {', '.join(FAMILIES)}, not {config.model_type!r}"
            )
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ModelError(f"the memory model needs full attention in every layer; {config.model_type!r} has others")
        if not 1 <= depth < config.num_hidden_layers:
            raise ModelError(f"encoder depth ({depth}) must be between 1 and {config.num_hidden_layers - 1}")
        self.causal_lm = model
        self.depth = depth
        self.n_layers = int(config.num_hidden_layers)
        self.dim = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.trained_length = int(config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the states."""
        return self._inner.embed_tokens.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._inner.embed_tokens.weight.device  # type: ignore[no-any-return]

    @property
    def _inner(self) -> Any:
        return self.causal_lm.model

    def lower(
        self,
        tokens: Tensor,
        *,
        first: int = 0,
        cache: Any = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Give the states at the encoder depth of segments that are each read by themselves.

        Args:
            tokens: ids, (B, T) int64.
            first: position of the first of them in its segment; more than 0 with a cache only.
            cache: of the lower layers, when the segment comes piece by piece; one token at a time from then on, unless
                a mask says what each may look at.
            positions: of each token, (1 or B, T), where they do not follow each other.
            mask: (B, 1, T, KV) bool.

        Returns:
            (B, T, D).
        """
        if positions is None:
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        return self._run(self._inner.embed_tokens(tokens), range(self.depth), positions, mask, cache, None)

    def upper(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        cache: Any = None,
        between: Between | None = None,
    ) -> Tensor:
        """Take states from the encoder depth to the top.

        Args:
            x: (B, Q, D).
            positions: of each state, (1 or B, Q), whole or broken numbers.
            mask: what each position may look at, (B, 1, Q, KV) bool; None is plain causal attention, and with a cache
                a single position that sees all.
            cache: of the upper layers.
            between: sees, and may change, what enters each layer.

        Returns:
            (B, Q, D), not normalised yet.
        """
        return self._run(x, range(self.depth, self.n_layers), positions, mask, cache, between)

    def head(self, x: Tensor) -> Tensor:
        """Give the logits, (B, Q, V), of states from the top."""
        logits: Tensor = self.causal_lm.lm_head(self._inner.norm(x))  # type: ignore[operator]
        return logits

    def _run(
        self, x: Tensor, layers: range, positions: Tensor, mask: Tensor | None, cache: Any, between: Between | None
    ) -> Tensor:
        rotary = self._inner.rotary_emb(x, position_ids=positions)
        for number in layers:
            if between is not None:
                x = between(number, x)
            x = self._inner.layers[number](
                x,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                cache=cache,
                use_cache=cache is not None,
            )
        return x


def locate(source: str | Path) -> str:
    """Give where a backbone and its tokenizer lie: "default" is the decoder that ships, any other name stays."""
    if source != "default":
        return str(source)
    from l2m_rag.config import load_settings
    from l2m_rag.weights import DEFAULT_DECODER, find

    return str(find(DEFAULT_DECODER, load_settings({})[0]))


def load_backbone(source: str | Path, depth: int, *, dtype: torch.dtype | None = None) -> Backbone:
    """Load a backbone: "default", a folder or a hub id.

    Raises:
        ModelError: it cannot be loaded, or is of no family that fits.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(locate(source), dtype=dtype or torch.bfloat16)
    except Exception as error:  # whatever a hub client, a config or a weight file can throw
        raise ModelError(f"backbone {str(source)!r} could not be loaded: {error}") from error
    return Backbone(model.eval(), depth)


def tiny_backbone(
    *, vocab_size: int = 64, dim: int = 32, n_layers: int = 4, depth: int = 2, family: str = "llama", seed: int = 0
) -> Backbone:
    """Make a small random backbone in fp32, for tests and for learning from nothing.

    Args:
        vocab_size: number of token ids.
        dim: hidden size, a multiple of 16.
        n_layers: in all.
        depth: of the encoder half.
        family: "llama", "qwen2", "qwen3" or "smollm" (a Llama with tied embeddings and one KV head for three).
        seed: of the weights.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

    kinds: dict[str, type[PreTrainedConfig]] = {
        "llama": LlamaConfig, "smollm": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    }  # fmt: skip
    heads = 3 if family == "smollm" else max(2, dim // 32)
    head_dim = 16 if family == "smollm" else dim // heads
    made = kinds[family](
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if family == "smollm" else heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=family == "smollm",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    finally:
        torch.random.set_rng_state(state)
    return Backbone(model.eval(), depth)


def fingerprint(backbone: Backbone) -> str:
    """Give a short hash of a backbone's shape and of its encoder half, which decides what stored states mean."""
    digest = hashlib.sha256(repr((backbone.dim, backbone.n_layers, backbone.depth, backbone.vocab_size)).encode())
    inner: Any = backbone.causal_lm.model
    for module in (inner.embed_tokens, *(inner.layers[number] for number in range(backbone.depth))):
        for name, weight in sorted(module.state_dict().items()):
            sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 64)].float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
