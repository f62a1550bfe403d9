"""Tools for an agent: documents to search, to ask and to read, and facts to remember, to recall and to forget."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Self

from langchain_core.documents import Document
from langchain_core.tools import BaseTool, BaseToolkit, StructuredTool, ToolException
from pydantic import ConfigDict, Field, model_validator

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.conversation import MEMORIES
from l2m_rag.errors import L2MError, UsageError
from l2m_rag.langchain.documents import document_of
from l2m_rag.memory_tiers.texts import Text
from l2m_rag.owned import OwnedTexts

_MOST = 20  # passages or facts in one answer
_LONGEST = 20_000  # characters of a document in one answer

Query = Annotated[str, Field(description="What to look for, as a question or in words.")]
Count = Annotated[int, Field(description="How many to give at most.", ge=1, le=_MOST)]


class L2MToolkit(BaseToolkit):
    """Six tools over two collections: documents, and what an agent was told to remember of one user.

    Setup:
        pip install 'l2m-rag[langchain]'
        l2m ingest contracts/ -c contracts

    Key init args:
        collection: name of the collection of documents, or a `Collection`.
        memory: name of the collection of what is remembered, or a `Collection`; another than that of the documents.
        user: whose facts; those of others are never seen.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MToolkit

            toolkit = L2MToolkit(collection="contracts", user="ada")

    Tools:
        .. code-block:: python

            toolkit.get_tools()
            # search_documents, ask_documents, read_document, remember, recall, forget

    Use within an agent:
        .. code-block:: python

            from langchain.agents import create_agent

            agent = create_agent(model, tools=toolkit.get_tools())
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    collection: str | Collection = "default"
    memory: str | Collection = MEMORIES
    user: str = Field(default="default", min_length=1)

    @model_validator(mode="after")
    def _open(self) -> Self:
        if isinstance(self.collection, str):
            self.collection = open_collection(self.collection)
        if isinstance(self.memory, str):
            self.memory = open_collection(self.memory, settings=self.collection.settings)
        if str(self.memory.path) == str(self.collection.path):
            raise UsageError(
                f"memory and documents are the same collection ({self.memory.name!r}), so that a search would "
                f"show what was remembered of all users; name another one for the memory"
            )
        return self

    def get_tools(self) -> list[BaseTool]:
        """Give the tools; what cannot be done is told to the model, and is no exception."""
        documents, memory = self.collection, self.memory
        assert isinstance(documents, Collection)
        assert isinstance(memory, Collection)
        mine = OwnedTexts(memory, "memory_of", self.user)

        def search_documents(query: Query, k: Count = 5) -> tuple[str, list[Document]]:
            """Find passages of the documents by meaning and words; each begins with its document, and its page."""
            found = [document_of(passage.chunk) for passage in documents.search(query, k)]
            return "\n\n".join(map(_shown, found)) or "Nothing was found.", found

        def ask_documents(question: Query) -> tuple[str, dict[str, object]]:
            """Have a question answered from the documents, in their own words and with citations."""
            answer = documents.ask(question)
            told = answer.to_json()
            cited = [f"[{one.n}] {one.document}: {one.quote}" for one in answer.citations]
            text = answer.answer or "The documents do not tell."
            return "\n".join([text, *cited]), told

        def read_document(
            document: Annotated[str, Field(description="Name of the document, as a search gives it.")],
            start: Annotated[int, Field(description="Character to begin at.", ge=0)] = 0,
            length: Annotated[int, Field(description="How many characters to read.", ge=1, le=_LONGEST)] = 4000,
        ) -> tuple[str, dict[str, object]]:
            """Read a part of a document as it stands."""
            whole = documents.text(document)
            part = whole[start : start + length]
            end = start + len(part)
            facts = {"document": document, "start": start, "end": end, "characters": len(whole)}
            left = f"\n\n[{len(whole) - end:,} characters follow]" if end < len(whole) else ""
            return (part + left if part else f"The document ends at character {len(whole)}."), facts

        def remember(
            fact: Annotated[str, Field(description="One fact, so that it can be understood by itself.")],
        ) -> tuple[str, str]:
            """Keep a fact about the user for later conversations."""
            one = uuid.uuid4().hex
            memory.put([Text(one, fact, mine.facts(time.time()))])
            return f"Remembered as {one}.", one

        def recall(query: Query, k: Count = 5) -> tuple[str, list[Document]]:
            """Find what was remembered about the user, each with its id and when it was told."""
            found = [document_of(passage.chunk) for passage in mine.recall(query, k)]
            lines = [f"{one.id} ({one.metadata['said_at']}): {one.page_content}" for one in found]
            return "\n".join(lines) or "Nothing is remembered of that.", found

        def forget(
            ids: Annotated[list[str], Field(description="Ids of what to forget, as recall gives them.")],
        ) -> tuple[str, list[str]]:
            """Delete what was remembered about the user, for good."""
            gone = mine.forget(ids)
            lines = [f"Forgotten: {text.text}" for text in gone]
            return "\n".join(lines) or "Nothing of that is remembered.", [text.id for text in gone]

        return [_tool(each) for each in (search_documents, ask_documents, read_document, remember, recall, forget)]


def _tool(call: Callable[..., tuple[str, Any]]) -> BaseTool:
    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> tuple[str, Any]:
        try:
            return call(*args, **kwargs)
        except L2MError as error:
            raise ToolException(str(error)) from error

    return StructuredTool.from_function(told, response_format="content_and_artifact", handle_tool_error=True)


def _shown(document: Document) -> str:
    where = [str(document.metadata.get("source") or document.id)]
    where += [f"page {document.metadata['page']}"] if document.metadata.get("page") else []
    return f"[{', '.join(where)}] {document.page_content}"
