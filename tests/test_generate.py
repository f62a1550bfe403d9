"""The decoder: spans are verbatim whatever the text, and the search over them is exact bookkeeping."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from l2m_rag import models
from l2m_rag.config import Settings
from l2m_rag.errors import ModelError
from l2m_rag.generate import Decoder
from l2m_rag.spans import LENGTH_POWER

WORDS = "Zürich naïve 1,450.50 euros E1 (404) “quoted” co-operate 東京 δίκη 👩‍👩‍👧 don't $5 50% café x_y"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("tiny-llama")
    ids = tiny_tokenizer(folder, [WORDS, "the cat sat on the mat and the dog ran"], 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ids,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Decoder(folder, name="tiny", device="cpu")


NASTY = st.text(
    st.one_of(
        st.sampled_from(" \n\t.,:;-()'\"$€%_0123456789"),
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aébc̈שלоΩ東👩‍👧﷽"),
    ),
    max_size=60,
)


@given(passages=st.lists(NASTY, min_size=1, max_size=3), lead=st.sampled_from(["", " "]))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_every_span_is_whole_words_of_its_passage(decoder: Decoder, passages: list[str], lead: str) -> None:
    prompt = decoder.prompt("s", "\n".join(passages) + " q")
    for span in decoder.spans(prompt, passages, lead=lead):
        text = passages[span.passage]
        assert 0 <= span.start < span.end <= len(text)
        quote = text[span.start : span.end]
        assert quote.strip() == quote
        assert span.start == 0 or not (text[span.start - 1].isalnum() and text[span.start].isalnum())
        assert span.end == len(text) or not (text[span.end - 1].isalnum() and text[span.end].isalnum())
        quote.encode()  # never half a surrogate pair


def test_a_score_is_the_log_probability_of_the_words_and_of_stopping(decoder: Decoder) -> None:
    passage = "the cat sat on the mat and the dog ran"
    prompt = decoder.prompt("s", passage)
    spans = decoder.spans(prompt, [passage], lead=" ", beams=8, best=5)
    assert spans
    for span in spans:
        words = " " + passage[span.start : span.end]
        answer = decoder._backend.encode(words, add_special_tokens=False).ids
        with torch.inference_mode():
            logits = decoder._model(torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
        total = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        stop = torch.logsumexp(logits[-1][decoder._finder._stops], 0).item()  # no digits here
        assert span.tokens == len(answer)
        score = (total + stop) / (span.tokens + 1) ** LENGTH_POWER
        assert span.score == pytest.approx(score, abs=0.15)  # bf16 where the processor has it


def test_wide_beams_find_what_exhaustive_search_finds(decoder: Decoder) -> None:
    passage = "the dog ran on the mat"
    prompt = decoder.prompt("s", passage)
    best = decoder.spans(prompt, [passage], lead=" ", beams=64, best=30)[0]
    starts = [i for i in range(len(passage)) if i == 0 or passage[i - 1] == " "]
    ends = [i for i in range(1, len(passage) + 1) if i == len(passage) or passage[i] == " "]
    scores = []
    for start in starts:
        for end in ends:
            if end > start:
                ids = decoder._backend.encode(" " + passage[start:end], add_special_tokens=False).ids
                with torch.inference_mode():
                    logits = decoder._model(torch.tensor([[*prompt, *ids]])).logits[0].float().log_softmax(-1)
                total = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
                stop = torch.logsumexp(logits[-1][decoder._finder._stops], 0).item()
                scores.append((total + stop) / (len(ids) + 1) ** LENGTH_POWER)
    assert best.score == pytest.approx(max(scores), abs=0.15)


def test_the_same_words_at_several_places_are_all_given(decoder: Decoder) -> None:
    spans = decoder.spans(decoder.prompt("s", "q"), ["cat", "the cat"], lead=" ", best=10)
    places = {(span.passage, span.start) for span in spans if span.tokens == spans[-1].tokens}
    cats = [span for span in spans if ["cat", "the cat"][span.passage][span.start : span.end] == "cat"]
    assert {span.passage for span in cats} == {0, 1}
    assert len({span.score for span in cats}) == 1
    assert places


def test_a_number_is_not_cut(decoder: Decoder) -> None:
    passage = "it costs 1,450.50 euros"
    for span in decoder.spans(decoder.prompt("s", passage), [passage], lead=" ", beams=32, best=50):
        quote = passage[span.start : span.end]
        assert not (set(quote) & set("0123456789")) or "1,450.50" in quote


def test_nothing_to_quote_gives_no_span(decoder: Decoder) -> None:
    assert decoder.spans(decoder.prompt("s", "q"), ["", " \n ", "..."]) == []


def test_a_prompt_beyond_the_window_is_an_error_that_names_it(decoder: Decoder) -> None:
    with pytest.raises(ModelError, match=r"2000 tokens; tiny has a window of 1024"):
        decoder.spans([1] * 2000, ["a"])


def test_free_text_is_written_in_whole_characters(decoder: Decoder) -> None:
    pieces = list(decoder.reply("s", "q", most=30))
    assert all("\N{REPLACEMENT CHARACTER}" not in piece[-1:] for piece in pieces)
    assert "".join(pieces) == "".join(decoder.reply("s", "q", most=30))


def test_cut_gives_a_beginning_of_at_most_so_many_tokens(decoder: Decoder) -> None:
    for tokens in range(1, 30):
        cut = decoder.cut(WORDS, tokens)
        assert WORDS.startswith(cut)
        assert decoder.count(cut) <= tokens + 1  # a cut inside a character's bytes may need one token more
    assert decoder.cut("a b", 50) == "a b"


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be loaded from"):
        Decoder(tmp_path / "nothing", name="nothing")


def test_models_are_loaded_once_whichever_threads_ask(embedder: Path, language_model: Path) -> None:
    named = Settings(embedder=str(embedder), model=str(language_model), threads=1)
    models._load_embedder.cache_clear()
    models._load_decoder.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        embedders = list(pool.map(lambda _: models.load_embedder(named), range(8)))
        decoders = list(pool.map(lambda _: models.load_language_model(named), range(8)))
        vectors = list(pool.map(lambda n: embedders[n].encode([f"the rent {n}"] * 3), range(8)))
    assert len({id(one) for one in embedders}) == len({id(one) for one in decoders}) == 1
    assert all((one[0] == one[1]).all() for one in vectors)
