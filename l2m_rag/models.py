"""The models that the settings name, loaded once a process."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from l2m_rag.weights import DEFAULT_DECODER, DEFAULT_EMBEDDER, find

if TYPE_CHECKING:
    from l2m_rag.config import Settings
    from l2m_rag.endpoint import Endpoint
    from l2m_rag.generate import Decoder
    from l2m_rag.indexers.embedding import Embedder


def load_embedder(settings: Settings) -> Embedder:
    """Give the embedder that the settings name, loaded once."""
    if settings.embedder == "default":
        return _load_embedder(str(find(DEFAULT_EMBEDDER, settings)), DEFAULT_EMBEDDER, settings.threads)
    return _load_embedder(settings.embedder, settings.embedder, settings.threads)


def load_language_model(settings: Settings) -> Decoder | Endpoint:
    """Give the language model that the settings name, loaded once."""
    if settings.llm_url:
        return _load_endpoint(settings.llm_url, settings.llm_model, settings.llm_key)
    if settings.model == "default":
        return _load_decoder(str(find(DEFAULT_DECODER, settings)), DEFAULT_DECODER, settings.threads)
    return _load_decoder(settings.model, settings.model, settings.threads)


@lru_cache(maxsize=2)
def _load_embedder(source: str, name: str, threads: int) -> Embedder:
    from l2m_rag.indexers.embedding import Embedder

    return Embedder(source, name=name, threads=threads)


@lru_cache(maxsize=2)
def _load_decoder(source: str, name: str, threads: int) -> Decoder:
    from l2m_rag.generate import Decoder

    return Decoder(source, name=name, threads=threads)


@lru_cache(maxsize=8)
def _load_endpoint(url: str, model: str, key: str) -> Endpoint:
    from l2m_rag.endpoint import Endpoint

    return Endpoint(url, model=model, key=key)
