"""The parsers of an ingest as a LangChain document loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from l2m_rag.errors import LoadError, UsageError
from l2m_rag.indexers.readers import Limits
from l2m_rag.indexers.scan import Found, scan
from l2m_rag.memory_tiers.records import Parsed

logger = logging.getLogger(__name__)


class L2MDocumentLoader(BaseLoader):
    """Files and folders as documents, each file parsed in a process of its own under limits of time and memory.

    PDF, DOCX, PPTX, XLSX, CSV, HTML, EPUB, ODT, RTF, Markdown, text in any encoding, source code, JSON, mail and
    notebooks.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        paths: files and folders.
        glob: only files whose name or relative path fits.
        unreadable: "skip" leaves out a file that cannot be read, with a warning; "raise" makes it an error.
        limits: of parsing.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MDocumentLoader

            loader = L2MDocumentLoader("contracts/", glob="*.pdf")

    Load:
        .. code-block:: python

            for document in loader.lazy_load():
                print(document.metadata["source"], len(document.page_content))

    Async:
        .. code-block:: python

            documents = await loader.aload()
    """

    def __init__(
        self,
        *paths: str | Path,
        glob: str | None = None,
        unreadable: Literal["skip", "raise"] = "skip",
        limits: Limits | None = None,
    ) -> None:
        if unreadable not in ("skip", "raise"):
            raise UsageError(f"unreadable ({unreadable!r}) must be skip or raise")
        self._paths = paths
        self._glob = glob
        self._raises = unreadable == "raise"
        self._limits = limits or Limits()

    def lazy_load(self) -> Iterator[Document]:
        """Give the documents one by one, in the order of their names.

        Raises:
            UsageError: a path does not exist.
            LoadError: a file cannot be read, and those are not to be skipped.
        """
        files = scan(self._paths, {}, glob=self._glob).files
        with self._limits.pool() as pool:
            parsed = pool.parse(file.path for file in files if file.error is None)
            for file in files:
                result = file.error or next(parsed)[1]
                if isinstance(result, LoadError):
                    if self._raises:
                        raise LoadError(result.reason, f"{file.path}: {result.detail}")
                    logger.warning("%s is left out: %s", file.path, result)
                else:
                    yield _document(file, result)


def _document(file: Found, parsed: Parsed) -> Document:
    facts = {"source": str(file.path), "mime": parsed.mime, "title": parsed.title or file.path.name}
    pages = {"pages": len(parsed.pages)} if parsed.pages else {}
    return Document(page_content=parsed.text, metadata={**parsed.metadata, **facts, **pages}, id=file.id)
