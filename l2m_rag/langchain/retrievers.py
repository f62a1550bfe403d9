"""Search over a collection as a LangChain retriever."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from pydantic import ConfigDict, Field

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.langchain.documents import Filter, document_of, where_of
from l2m_rag.memory_tiers.long_term import Mode


class L2MRetriever(BaseRetriever):
    """Passages of a collection that was made by `l2m ingest`, `Collection.ingest` or `L2MVectorStore`.

    Setup:
        pip install 'l2m-rag[langchain]'
        l2m ingest contracts/ -c contracts

    Key init args:
        collection: name of a collection, or a `Collection`.
        k: most passages.
        mode: "hybrid" (by meaning and words, the default), "dense" or "text".
        filter: SQL as `--where` takes it, or values that metadata must have.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MRetriever

            retriever = L2MRetriever(collection="contracts", k=5)

    Usage:
        .. code-block:: python

            retriever.invoke("When does the lease end?")
            retriever.invoke("notice period", k=2, filter={"author": "Ada"})

    Use within a chain:
        .. code-block:: python

            from langchain_core.runnables import RunnablePassthrough

            chain = {"context": retriever, "question": RunnablePassthrough()} | prompt | model
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    collection: str | Collection = "default"
    k: int = Field(default=4, ge=1)
    mode: Mode = "hybrid"
    filter: Filter | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        where = where_of(kwargs.get("filter", self.filter))
        found = self._opened().search(query, kwargs.get("k", self.k), mode=kwargs.get("mode", self.mode), where=where)
        return [document_of(passage.chunk) for passage in found]

    def _opened(self) -> Collection:
        if isinstance(self.collection, str):
            self.collection = open_collection(self.collection)
        return self.collection

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        return LangSmithRetrieverParams(
            ls_retriever_name="l2m",
            ls_vector_store_provider="l2m",
            ls_embedding_provider="l2m",
            ls_embedding_model=self._opened().settings.embedder,
        )
