"""Documents in another order: by their best sentence, or by what a reader finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field

from l2m_rag import answerability, qa
from l2m_rag.config import Settings, load_settings
from l2m_rag.errors import UsageError
from l2m_rag.evidence import rank_sentences
from l2m_rag.findings import Reader, cut_question, findings
from l2m_rag.langchain.messages import passage_of, with_cosines
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.models import closeness, load_language_model

SCORE = "relevance_score"
"""Key of the metadata that the score is put under, as other rerankers of LangChain do."""


class L2MReranker(BaseDocumentCompressor):
    """Puts documents in the order in which they are likely to answer, whichever retriever found them.

    Setup:
        pip install 'l2m-rag[langchain]'
        l2m models pull

    Key init args:
        top_n: how many documents are kept; None keeps all.
        by: "sentences" ranks by the sentence that fits best; "reader" reads each document and ranks by the probability
            that it holds an answer, which is better and takes much longer.
        settings: as `l2m_rag.Settings`; by default those of the environment and of `l2m.toml`.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MReranker

            reranker = L2MReranker(top_n=3)

    Usage:
        .. code-block:: python

            reranker.compress_documents(retriever.invoke(question), question)  # `relevance_score` in the metadata
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    top_n: int | None = Field(default=4, ge=1)
    by: Literal["sentences", "reader"] = "sentences"
    settings: Settings | None = Field(default=None, exclude=True)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Give the documents that are the likeliest to answer, best first; those of equal score as they stood.

        Args:
            documents: as they were found; they are not changed.
            query: the question.
            callbacks: not used.

        Raises:
            UsageError: the question cannot be asked, or the language model of the settings cannot read.
        """
        if not documents:
            return []
        qa.check_question(query)
        settings = self.settings or load_settings()[0]
        found = with_cosines(settings, query, [passage_of(one, at) for at, one in enumerate(documents)])
        scores = self._read(query, found, settings) if self.by == "reader" else _sentences(query, found, settings)
        order = sorted(range(len(documents)), key=lambda at: -scores[at])[: self.top_n]
        return [
            documents[at].model_copy(update={"metadata": {**documents[at].metadata, SCORE: scores[at]}}) for at in order
        ]

    def _read(self, query: str, found: Sequence[Passage], settings: Settings) -> list[float]:
        """Give the probability that each document holds an answer."""
        reader: Any = load_language_model(settings)
        if not isinstance(reader, Reader) or not reader.whole:
            raise UsageError(
                f"{reader.name} cannot rank by reading; leave by at 'sentences', or set model to 'default'"
            )
        asked = cut_question(query, reader, settings.budget)
        sizes: dict[str, Any] = {"budget": settings.budget, "focus": settings.focus, "closeness": None, "skip": 0.0}
        scores = []
        for passage in found:
            finding = next(findings(asked, [passage], reader, **sizes), None)
            scores.append(answerability.probability(reader.answerability, finding.features) if finding else 0.0)
        return scores


def _sentences(query: str, found: Sequence[Passage], settings: Settings) -> list[float]:
    """Give how well the best sentence of each document fits."""
    best = [-1.0] * len(found)
    for sentence in rank_sentences(query, found, partial(closeness, settings)):
        best[sentence.passage] = max(best[sentence.passage], sentence.fit)
    return best
