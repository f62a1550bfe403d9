"""What is stored as LangChain documents, and the index that `langchain_core.indexing.index` writes to."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing import DeleteResponse, UpsertResponse
from langchain_core.indexing.base import DocumentIndex
from pydantic import ConfigDict, Field

from l2m_rag.collection import Collection
from l2m_rag.errors import UsageError
from l2m_rag.memory_tiers.records import Chunk
from l2m_rag.memory_tiers.texts import Text, equals, is_text, text_of

Filter = str | Mapping[str, Any]
"""A filter: SQL as `--where` takes it, or values that metadata must have (a list for any of several)."""


def document_of(chunk: Chunk) -> Document:
    """Give what was put in by a program as it was, and a chunk of a file with where it stands."""
    if is_text(chunk):
        return given(text_of(chunk))
    where = {"source": chunk.document, "page": chunk.page, "heading": chunk.heading or None}
    facts = {**chunk.metadata, **{name: value for name, value in where.items() if value is not None}}
    return Document(page_content=chunk.text, metadata={**facts, "start": chunk.start, "end": chunk.end}, id=chunk.id)


def given(text: Text) -> Document:
    """Give the document that a text was put in as."""
    return Document(page_content=text.text, metadata=text.metadata, id=text.id)


def texts_of(documents: Sequence[Document], ids: Sequence[str | None] | None = None) -> list[Text]:
    """Give documents as they are stored; those without an id get one.

    Raises:
        UsageError: there are not as many ids as documents, or one comes twice.
    """
    named = list(ids) if ids is not None else [document.id for document in documents]
    if len(named) != len(documents):
        raise UsageError(f"{len(documents)} documents need as many ids; there are {len(named)}")
    made = [uuid.uuid4().hex if one is None else one for one in named]
    return [Text(one, each.page_content, dict(each.metadata)) for one, each in zip(made, documents, strict=True)]


def where_of(filter: Filter | None) -> str | None:
    """Turn a filter into SQL.

    Raises:
        UsageError: it holds what no filter can look for.
    """
    if filter is None or isinstance(filter, str):
        return filter
    conditions = [_condition(key, value) for key, value in filter.items()]
    return " AND ".join(conditions) or None


def _condition(key: str, value: object) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"\w+", key):
        raise UsageError(f"a filter can look for names of letters, digits and _; not for {key!r}")
    if isinstance(value, list | tuple | set):
        if not value:
            raise UsageError(f"the filter on {key!r} names no value")
        return "(" + " OR ".join(_condition(key, one) for one in value) + ")"
    if isinstance(value, bool):
        return f"metadata.{key} = {str(value).lower()}"
    if isinstance(value, int | float):
        return f"metadata.{key} = {value!r}"
    if isinstance(value, str):
        return equals(key, value)
    raise UsageError(f"the filter on {key!r} must be text, a number, a truth value or a list of them; it is {value!r}")


class L2MDocumentIndex(DocumentIndex):
    """The documents of a collection, for `langchain_core.indexing.index`.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        collection: a `Collection`, from `l2m_rag.open`.
        k: most documents of a search.

    Instantiate:
        .. code-block:: python

            import l2m_rag as l2m
            from l2m_rag.langchain import L2MDocumentIndex

            index = L2MDocumentIndex(collection=l2m.open("notes"))

    Write and search:
        .. code-block:: python

            index.upsert([Document(id="1", page_content="The lease ends in May.")])
            index.invoke("When does the lease end?")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    collection: Collection
    k: int = Field(default=4, ge=1)

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Insert documents, or replace those whose id is there."""
        texts = texts_of(items)
        self.collection.put(texts)
        return {"succeeded": [text.id for text in texts], "failed": []}

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Delete documents by id.

        Raises:
            ValueError: no ids were given.
        """
        if ids is None:
            raise UsageError("delete needs the ids of the documents to delete")
        gone = self.collection.drop(ids)
        return {"num_deleted": len(gone), "num_failed": 0, "succeeded": gone, "failed": []}

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """Give the documents of those ids that are there."""
        return [given(text) for text in self.collection.get(ids)]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = self.collection.search(query, kwargs.get("k", self.k)) if self.collection.exists() else []
        return [document_of(passage.chunk) for passage in found]
