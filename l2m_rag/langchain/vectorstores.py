"""A collection as a LangChain vector store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings
from l2m_rag.langchain.documents import Filter, document_of, given, texts_of, where_of
from l2m_rag.langchain.embeddings import Adapted, L2MEmbeddings
from l2m_rag.memory_tiers.long_term import Mode
from l2m_rag.memory_tiers.records import Passage


class L2MVectorStore(VectorStore):
    """Documents of a program in a collection, beside those that were ingested from files.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args - indexing params:
        collection: name of the collection; it is made when something is first added.
        embedding: LangChain embeddings; None takes the embedder of the settings, which runs on this machine. A
            collection keeps the one that it was made with.
    Key init args - client params:
        settings: of the library; None reads them as the command line does.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MVectorStore

            store = L2MVectorStore("notes")

    Add documents:
        .. code-block:: python

            lease = Document(page_content="The lease ends in May.", metadata={"author": "Ada"})
            store.add_documents([lease], ids=["1"])

    Delete documents:
        .. code-block:: python

            store.delete(ids=["1"])

    Search:
        .. code-block:: python

            store.similarity_search("When does the lease end?", k=1, filter={"author": "Ada"})

    Search with score:
        .. code-block:: python

            store.similarity_search_with_score("lease")  # cosines, higher is nearer

    Async:
        .. code-block:: python

            await store.asimilarity_search("lease")

    Use as retriever:
        .. code-block:: python

            store.as_retriever(search_type="mmr", search_kwargs={"k": 2, "fetch_k": 10})
    """

    def __init__(
        self, collection: str = "default", embedding: Embeddings | None = None, *, settings: Settings | None = None
    ) -> None:
        opened = open_collection(collection, settings=settings)
        self._embedding = embedding or L2MEmbeddings(settings=opened.settings)
        ours = isinstance(self._embedding, L2MEmbeddings)
        self.collection = (
            opened if ours else Collection(opened.name, opened.path, opened.settings, Adapted(self._embedding))
        )

    @property
    def embeddings(self) -> Embeddings:
        """What makes the vectors."""
        return self._embedding

    # -- writing -----------------------------------------------------------------------------------------------------
    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Insert texts, or replace those whose id is there; give their ids.

        Args:
            texts: not empty.
            metadatas: of each, what JSON can hold.
            ids: of each; made up where there are none.
            **kwargs: not looked at.

        Raises:
            UsageError: one of them cannot be stored; nothing was.
        """
        contents = list(texts)
        facts = metadatas or [{} for _ in contents]
        made = [Document(page_content=text, metadata=each) for text, each in zip(contents, facts, strict=True)]
        return self.add_documents(made, ids=ids or [None] * len(made))

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Insert documents, or replace those whose id is there; give their ids."""
        texts = texts_of(documents, kwargs.get("ids"))
        self.collection.put(texts)
        return [text.id for text in texts]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete documents by id; ids that are not there are passed over.

        Raises:
            ValueError: no ids were given: all is deleted by `Collection.delete` only.
        """
        if ids is None:
            raise ValueError("delete needs the ids of the documents to delete")
        self.collection.drop(ids)
        return True

    # -- reading -----------------------------------------------------------------------------------------------------
    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Give the documents of those ids that are there."""
        return [given(text) for text in self.collection.get(ids)]

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, mode: Mode = "hybrid", **kwargs: Any
    ) -> list[Document]:
        """Give the k documents that fit a question best.

        Args:
            query: the question.
            k: at most this many.
            filter: SQL as `--where` takes it, or values that metadata must have.
            mode: "hybrid", "dense" or "text".
            **kwargs: not looked at.
        """
        if not self.collection.exists():
            return []
        found = self.collection.search(query, k, mode=mode, where=where_of(filter))
        return [document_of(passage.chunk) for passage in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Give the k documents nearest to a question by meaning, and their cosines."""
        return self.similarity_search_by_vector_with_score(self._embedding.embed_query(query), k, filter=filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """Give the k documents nearest to a vector."""
        return [document for document, _ in self.similarity_search_by_vector_with_score(embedding, k, filter=filter)]

    def similarity_search_by_vector_with_score(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:
        """Give the k documents nearest to a vector, and their cosines."""
        return [(document_of(one.chunk), one.score) for one in self._nearest(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Give k documents that are near to a question and far from one another."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter=filter)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Give k documents that are near to a vector and far from one another (Carbonell and Goldstein, 1998).

        Args:
            embedding: the vector.
            k: at most this many.
            fetch_k: how many of the nearest are looked at.
            lambda_mult: 1 for the nearest, 0 for those farthest from one another.
            filter: as in `similarity_search`.
            **kwargs: not looked at.
        """
        found = self._nearest(embedding, max(k, fetch_k), filter)
        if not found:
            return []
        vectors = self.collection.tier().store.vectors_named([one.chunk.id for one in found])
        made = [vectors[one.chunk.id].tolist() for one in found]
        chosen = maximal_marginal_relevance(np.asarray(embedding, dtype=np.float32), made, lambda_mult, k)
        return [document_of(found[at].chunk) for at in chosen]

    def _nearest(self, embedding: list[float], k: int, filter: Filter | None) -> list[Passage]:
        if not self.collection.exists():
            return []
        vector = np.asarray(embedding, dtype=np.float32)
        length = float(np.linalg.norm(vector))
        unit = vector / length if length > 0 else vector
        return self.collection.tier().search("", unit, k, mode="dense", where=where_of(filter))

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        collection: str = "default",
        settings: Settings | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add texts to it."""
        store = cls(collection, embedding, settings=settings)
        store.add_texts(texts, metadatas, ids=ids)
        return store
