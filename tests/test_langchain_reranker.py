"""L2MReranker: an order, nothing changed, nothing made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document

from l2m_rag.config import Settings, load_settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain import L2MReranker

OTHER = "The cat sleeps on the sofa. It is grey."
RIGHT = "The landlord of the red house is Bolt GmbH. The rent is paid each month."


@pytest.fixture
def by_sentences(by_hashing: Any, language_model: Path) -> L2MReranker:
    return L2MReranker(by="sentences", settings=Settings(embedder="hashing", model=str(language_model), threads=1))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60), max_size=6), top=st.none() | st.integers(1, 8))
def test_it_gives_some_of_the_documents_in_another_order(
    by_sentences: L2MReranker, texts: list[str], top: int | None
) -> None:
    clean = [text.encode("utf-8", "ignore").decode() for text in texts]
    documents = [Document(text, metadata={"n": n}, id=str(n)) for n, text in enumerate(clean)]
    found = by_sentences.model_copy(update={"top_n": top}).compress_documents(documents, "Who is the landlord?")
    assert len(found) == min(len(documents), top or len(documents))
    assert all(one.page_content == clean[one.metadata["n"]] for one in found)
    assert len({one.id for one in found}) == len(found)
    scores = [one.metadata["relevance_score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    assert all("relevance_score" not in one.metadata for one in documents)


def test_the_sentence_that_fits_best_counts(by_sentences: L2MReranker) -> None:
    found = by_sentences.compress_documents([Document(OTHER), Document(RIGHT)], "Who is the landlord of the red house?")
    assert [one.page_content for one in found] == [RIGHT, OTHER]


@pytest.mark.usefixtures("default_weights")
async def test_what_holds_the_answer_comes_first() -> None:
    reranker = L2MReranker(top_n=None, by="reader", settings=load_settings({"threads": 1})[0])
    documents = [Document(OTHER), Document("The house is red. Who its landlord is was never told."), Document(RIGHT)]
    found = await reranker.acompress_documents(documents, "Who is the landlord of the red house?")
    assert found[0].page_content == RIGHT
    assert found[-1].page_content == OTHER
    assert found[0].metadata["relevance_score"] > 0.5 > found[-1].metadata["relevance_score"]


def test_what_cannot_rank_says_so(by_sentences: L2MReranker) -> None:
    with pytest.raises(UsageError, match="letter or digit"):
        by_sentences.compress_documents([Document(RIGHT)], "?!")
    with pytest.raises(UsageError, match="leave by at 'sentences'"):
        by_sentences.model_copy(update={"by": "reader"}).compress_documents([Document(RIGHT)], "Who?")
