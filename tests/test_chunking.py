"""Chunks: offsets are exact for any text, nothing but white space is lost, and borders are kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_rag.indexers.chunking import chunk_id, split
from l2m_rag.memory_tiers.records import Chunk, Parsed, Section


class Words:
    """Tokens are words of at most four letters."""

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [[match.span() for match in re.finditer(r"\S{1,4}", text)] for text in texts]


class Swallower:
    """Makes one token of every stretch without spaces, as WordPiece does with an endless word."""

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]


def cut(text: str, *, size: int = 8, overlap: int = 0, **parsed: object) -> list[Chunk]:
    return list(split(Parsed(text, "text/plain", **parsed), "d", Words(), size=size, overlap=overlap))  # type: ignore[arg-type]


TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t\r\u2028\u00a0.!?…。'\"()ab"),
        st.sampled_from("e\u0301👩\u200d👩\u200d👧\u202e\ufeff\x00ש"),
    ),
    max_size=400,
)


@given(text=TEXT, size=st.integers(8, 40), overlap=st.integers(0, 7), data=st.data())
@settings(max_examples=200, deadline=None)
def test_offsets_are_exact_and_nothing_but_white_space_is_lost(
    text: str, size: int, overlap: int, data: st.DataObject
) -> None:
    places = st.lists(st.integers(0, len(text)), max_size=4, unique=True)
    pages = tuple(sorted({0, *data.draw(places)}))
    sections = tuple(Section(at, f"h{at}", hard=at % 2 == 0) for at in sorted(data.draw(places)))
    chunks = cut(text, size=size, overlap=overlap, pages=pages, sections=sections)
    covered = bytearray(len(text))
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
    assert all(done or letter.isspace() for done, letter in zip(covered, text, strict=True))
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert sorted(chunk.start for chunk in chunks) == [chunk.start for chunk in chunks]
    assert len({chunk.id for chunk in chunks}) == len(chunks)


@given(text=TEXT, size=st.integers(8, 30))
@settings(max_examples=100, deadline=None)
def test_no_chunk_has_more_tokens_than_allowed(text: str, size: int) -> None:
    for chunk in cut(text, size=size, overlap=size // 3):
        assert len(Words().spans([chunk.text])[0]) <= size + 1  # a cut inside a word may make one token two


@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_the_same_text_gives_the_same_chunks(text: str) -> None:
    assert cut(text) == cut(text)


def test_a_chunk_never_runs_over_a_page_or_a_hard_section() -> None:
    text = "One two three. Four five. Six seven eight. Nine ten."
    borders = [0, text.index("Four"), text.index("Nine")]
    sections = (Section(borders[1], "record", hard=True),)
    for chunk in cut(text, size=40, pages=(0, borders[2]), sections=sections):
        assert not any(chunk.start < border < chunk.end for border in borders)


def test_pages_and_headings_are_those_in_force_at_the_start() -> None:
    text = "Intro.\n\nBody of one.\n\nBody of two."
    second = text.index("Body of two")
    chunks = cut(text, size=8, pages=(0, second), sections=(Section(8, "One", hard=True), Section(second, "Two")))
    assert [(chunk.page, chunk.heading) for chunk in chunks] == [(1, ""), (1, "One"), (2, "Two")]


def test_sentences_are_kept_whole_and_repeated_up_to_the_overlap() -> None:
    text = "Aa bb cc dd. Ee ff gg hh. Ii jj kk ll. Mm nn oo pp."
    plain = [chunk.text for chunk in cut(text, size=8)]
    assert plain == ["Aa bb cc dd. Ee ff gg hh.", "Ii jj kk ll. Mm nn oo pp."]
    lapped = [chunk.text for chunk in cut(text, size=8, overlap=4)]
    assert lapped[1].startswith("Ee ff gg hh. Ii")


def test_abbreviations_do_not_end_a_sentence() -> None:
    texts = [chunk.text for chunk in cut("He met Dr. Smith. She met Mr. J. Doe at 5 p.m. there.", size=8)]
    assert texts[0].startswith("He met Dr. Smith")
    assert not any(text.endswith(("Dr.", "Mr.", "J.")) for text in texts)


def test_an_endless_word_is_cut_and_takes_no_more_than_its_share() -> None:
    parsed = Parsed("a" * 200_000, "text/plain")
    chunks = list(split(parsed, "d", Swallower(), size=16, overlap=4))
    assert max(len(chunk.text) for chunk in chunks) <= 16 * 16
    assert "".join(chunk.text for chunk in chunks) == parsed.text


def test_metadata_carries_the_media_type_and_the_title() -> None:
    (chunk,) = cut("Text.", title="A title", metadata={"author": "Ada"})
    assert chunk.metadata == {"author": "Ada", "mime": "text/plain", "title": "A title"}


def test_an_id_depends_on_document_place_and_text() -> None:
    ids = {chunk_id("a", 0, "x"), chunk_id("b", 0, "x"), chunk_id("a", 1, "x"), chunk_id("a", 0, "y")}
    assert len(ids) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", found) for found in ids)


@pytest.mark.parametrize(("size", "overlap"), [(7, 0), (8, 8), (8, -1)])
def test_sizes_that_make_no_sense_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="size must be >= 8"):
        cut("text", size=size, overlap=overlap)
