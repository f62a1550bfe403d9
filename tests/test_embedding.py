"""The embedder: unit vectors, the same whatever the batch, and a tokenizer that counts what the model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2m_rag.config import Settings
from l2m_rag.errors import ConfigError, ModelError
from l2m_rag.indexers.embedding import Embedder
from l2m_rag.weights import model_folder, verify


@pytest.fixture(scope="module")
def small(embedder: Path) -> Embedder:
    return Embedder(embedder, name="small", device="cpu", dtype="float32")


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vectors_are_of_unit_length_and_in_order(small: Embedder, texts: list[str]) -> None:
    vectors = small.encode(texts)
    assert vectors.shape == (len(texts), small.dimension)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.allclose(small.encode([text])[0], vector, atol=1e-4)


def test_sentence_transformers_gives_the_same(small: Embedder, embedder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["a short text", "a longer text with many more words " * 8, "x"]
    theirs = SentenceTransformer(str(embedder), device="cpu").encode(texts, normalize_embeddings=True)
    assert np.allclose(small.encode(texts), theirs, atol=1e-5)


def test_progress_counts_up_to_the_number_of_texts(small: Embedder) -> None:
    seen: list[int] = []
    small.encode(["word " * 100] * 400, progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 400
    assert len(seen) > 1


def test_spans_are_where_the_tokens_stand(small: Embedder) -> None:
    text = "naïve Café (3.5)"
    (spans,) = small.spans([text])
    assert "".join(text[start:end] for start, end in spans) == text.replace(" ", "")


def test_a_static_model_can_be_the_embedder(tmp_path: Path) -> None:
    """Model2Vec's kind of model: a table of token vectors, no transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["[UNK]", "lease", "rent", "ends", "may"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).standard_normal((len(words), 16)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu").save(
        str(tmp_path / "static")
    )
    static = Embedder(tmp_path / "static", name="static", device="cpu")
    one, other, same = static.encode(["lease ends may", "rent", "may ends lease"])
    assert static.dimension == 16
    assert one @ same == pytest.approx(1, abs=1e-2)
    assert one @ other < 0.99
    assert static.spans(["lease ends"]) == [[(0, 5), (6, 10)]]
    assert static.max_tokens > 8


def test_the_fingerprint_is_that_of_the_weights(small: Embedder, embedder: Path) -> None:
    assert Embedder(embedder, name="other", device="cpu").fingerprint == small.fingerprint


def test_what_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="embedder 'mine' could not be loaded"):
        Embedder(tmp_path, name="mine")
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        Embedder(tmp_path, name="mine", dtype="int8")


@pytest.mark.skipif(
    verify("all-minilm-l6-v2", Settings()).state != "present", reason="the default weights are not here"
)
def test_the_default_embedder_keeps_its_vectors_in_bf16() -> None:
    folder = model_folder("all-minilm-l6-v2", Settings())
    texts = ["The cat sleeps.", "Interest rates rose in March. " * 20, "Wie heißt du?"]
    exact = Embedder(folder, name="fp32", device="cpu", dtype="float32").encode(texts)
    short = Embedder(folder, name="bf16", device="cpu", dtype="bfloat16").encode(texts)
    assert (exact * short).sum(axis=1).min() > 0.999
