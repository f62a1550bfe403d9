"""LangChain classes over the same collections as the command line (extra `langchain`)."""

from typing import TYPE_CHECKING, Any

from l2m_rag.errors import MissingExtraError

if TYPE_CHECKING:
    from l2m_rag.langchain.graph_stores import L2MStore as L2MStore
    from l2m_rag.langchain.middleware import L2MMemoryMiddleware as L2MMemoryMiddleware

try:
    import langchain_core  # noqa: F401 - only to say what is missing
except ImportError:
    raise MissingExtraError("langchain-core", "langchain") from None

from l2m_rag.langchain.chat_models import ChatL2M
from l2m_rag.langchain.documents import L2MDocumentIndex
from l2m_rag.langchain.embeddings import L2MEmbeddings
from l2m_rag.langchain.histories import L2MChatMessageHistory
from l2m_rag.langchain.loaders import L2MDocumentLoader
from l2m_rag.langchain.records import L2MRecordManager
from l2m_rag.langchain.rerankers import L2MReranker
from l2m_rag.langchain.retrievers import L2MRetriever
from l2m_rag.langchain.stores import L2MByteStore
from l2m_rag.langchain.toolkits import L2MToolkit
from l2m_rag.langchain.vectorstores import L2MVectorStore

__all__ = [
    "ChatL2M",
    "L2MByteStore",
    "L2MChatMessageHistory",
    "L2MDocumentIndex",
    "L2MDocumentLoader",
    "L2MEmbeddings",
    "L2MRecordManager",
    "L2MReranker",
    "L2MRetriever",
    "L2MToolkit",
    "L2MVectorStore",
]


def __getattr__(name: str) -> Any:
    # not in `__all__`, as the rest works without langgraph
    if name == "L2MStore":
        from l2m_rag.langchain.graph_stores import L2MStore

        return L2MStore
    if name == "L2MMemoryMiddleware":
        from l2m_rag.langchain.middleware import L2MMemoryMiddleware

        return L2MMemoryMiddleware
    raise AttributeError(f"module 'l2m_rag.langchain' has no attribute {name!r}")
