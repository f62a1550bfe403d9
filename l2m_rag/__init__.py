"""l2m-rag: a retrieval-augmented Large Memory Model.

    import l2m_rag as l2m
    kb = l2m.open("contracts")
    kb.ingest("docs/")
    kb.ask("When does the lease end?")

The names below are loaded when they are first used, so that importing the package stays quick.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2m_rag.collection import Collection, list_collections, open, open_files
    from l2m_rag.config import Settings, load_settings
    from l2m_rag.errors import L2MError
    from l2m_rag.indexers.pipeline import IngestReport
    from l2m_rag.memory_tiers.records import Chunk, Passage
    from l2m_rag.model import L2M
    from l2m_rag.model_config import L2MConfig
    from l2m_rag.qa import Answer, Citation

_HOMES = {
    "Answer": "qa",
    "Chunk": "memory_tiers.records",
    "Citation": "qa",
    "Collection": "collection",
    "IngestReport": "indexers.pipeline",
    "L2M": "model",
    "L2MConfig": "model_config",
    "L2MError": "errors",
    "Passage": "memory_tiers.records",
    "Settings": "config",
    "list_collections": "collection",
    "load_settings": "config",
    "open": "collection",
    "open_files": "collection",
}

__all__ = [
    "L2M",
    "Answer",
    "Chunk",
    "Citation",
    "Collection",
    "IngestReport",
    "L2MConfig",
    "L2MError",
    "Passage",
    "Settings",
    "list_collections",
    "load_settings",
    "open",
    "open_files",
]

try:
    __version__ = version("l2m-rag")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"l2m_rag.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'l2m_rag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
