"""The models that the settings name, loaded once a process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from l2m_rag.indexers.embedding import LOADING
from l2m_rag.weights import DEFAULT_DECODER, DEFAULT_EMBEDDER, find

if TYPE_CHECKING:
    from l2m_rag.config import Settings
    from l2m_rag.endpoint import Endpoint
    from l2m_rag.generate import Decoder
    from l2m_rag.indexers.embedding import Embedder, Encoder
    from l2m_rag.reader import MemoryReader


def load_embedder(settings: Settings) -> Embedder:
    """Give the embedder that the settings name, loaded once, whichever threads ask for it."""
    with LOADING:
        if settings.embedder == "default":
            return _load_embedder(str(find(DEFAULT_EMBEDDER, settings)), DEFAULT_EMBEDDER, settings.threads)
        return _load_embedder(settings.embedder, settings.embedder, settings.threads)


def closeness(settings: Settings, text: str, others: Sequence[str]) -> list[float]:
    """Give the cosine of a text with each of some others, by the embedder of the settings."""
    return cosines(load_embedder(settings), text, others) if others else []


def cosines(encoder: Encoder, text: str, others: Sequence[str]) -> list[float]:
    """Give the cosine of a text with each of some others, by an encoder of unit vectors."""
    vectors = encoder.encode([text, *others])
    return [float(cosine) for cosine in vectors[1:] @ vectors[0]]


def load_language_model(settings: Settings) -> MemoryReader | Decoder | Endpoint:
    """Give the language model that the settings name, loaded once, whichever threads ask for it."""
    with LOADING:
        return _language_model(settings)


def _language_model(settings: Settings) -> MemoryReader | Decoder | Endpoint:
    if settings.llm_url:
        return _load_endpoint(settings.llm_url, settings.llm_model, settings.llm_key)
    if settings.model == DEFAULT_DECODER:
        return _load_decoder(str(find(DEFAULT_DECODER, settings)), DEFAULT_DECODER, settings.threads)
    folder = reader_folder(settings.model)
    if folder is not None:
        source = backbone_of(folder, settings)
        return _load_reader(folder, source, settings.model, settings.threads, settings.resolution)
    return _load_decoder(settings.model, settings.model, settings.threads)


def backbone_of(folder: Path, settings: Settings) -> str:
    """Give where the backbone of a checkpoint lies: a folder or a hub id, the default one below the settings' home."""
    from l2m_rag.checkpoint import source_of

    named = source_of(folder)
    return str(find(DEFAULT_DECODER, settings)) if named == "default" else named


def reader_folder(model: str) -> Path | None:
    """Give the checkpoint of a memory model that a name stands for: the one that ships, or a folder; None for none."""
    from l2m_rag.checkpoint import reader_at

    folder = reader_at(model)
    if model == "default":
        return folder
    described = folder / "config.json"
    return folder if described.is_file() and '"fingerprint"' in described.read_text(errors="replace") else None


@lru_cache(maxsize=2)
def _load_embedder(source: str, name: str, threads: int) -> Embedder:
    from l2m_rag.indexers.embedding import Embedder

    return Embedder(source, name=name, threads=threads)


@lru_cache(maxsize=2)
def _load_reader(folder: Path, source: str, name: str, threads: int, resolution: int) -> MemoryReader:
    from l2m_rag.reader import MemoryReader

    return MemoryReader(folder, name=name, source=source, threads=threads, resolution=resolution)


@lru_cache(maxsize=2)
def _load_decoder(source: str, name: str, threads: int) -> Decoder:
    from l2m_rag.generate import Decoder

    return Decoder(source, name=name, threads=threads)


@lru_cache(maxsize=8)
def _load_endpoint(url: str, model: str, key: str) -> Endpoint:
    from l2m_rag.endpoint import Endpoint

    return Endpoint(url, model=model, key=key)
