"""The embedder of a collection as LangChain embeddings, and LangChain embeddings as the embedder of a collection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from langchain_core.embeddings import Embeddings

from l2m_rag.config import Settings, load_settings
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.lance_store import Vectors
from l2m_rag.models import load_embedder

_PROBE = "The quick brown fox jumps over the lazy dog."


class L2MEmbeddings(Embeddings):
    """The embedder that runs on this machine, by default all-MiniLM-L6-v2.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        model: "default", or the folder or hub id of a sentence-transformers model; None takes the settings' own.
        settings: of the library; None reads them as the command line does.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MEmbeddings

            embeddings = L2MEmbeddings()

    Embed:
        .. code-block:: python

            embeddings.embed_query("When does the lease end?")  # 384 numbers, a unit vector
            embeddings.embed_documents(["The lease ends in May.", "The rent is due each month."])

    Async:
        .. code-block:: python

            await embeddings.aembed_query("When does the lease end?")
    """

    def __init__(self, model: str | None = None, *, settings: Settings | None = None) -> None:
        if settings is not None and model is not None:
            raise UsageError(f"model ({model!r}) and settings were both given; put the model into the settings")
        self.settings = settings or load_settings({"embedder": model})[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Give the unit vectors of texts."""
        if not texts:
            return []
        vectors: list[list[float]] = load_embedder(self.settings).encode(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Give the unit vector of a question."""
        return self.embed_documents([text])[0]


class Adapted:
    """LangChain embeddings as a collection knows them.

    Args:
        embeddings: any; which they are is told by their class and by what they make of one sentence.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        probe = np.asarray(embeddings.embed_documents([_PROBE])[0], dtype=np.float32)
        self._embeddings = embeddings
        self.name = f"langchain:{type(embeddings).__name__}"
        self.dimension = len(probe)
        self.fingerprint = hashlib.sha256(np.round(probe, 2).tobytes()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Give the vectors of texts, (N, dimension) float32, at unit length."""
        made: Vectors = np.asarray(self._embeddings.embed_documents(list(texts)), dtype=np.float32)
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        unit: Vectors = (made / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return unit
