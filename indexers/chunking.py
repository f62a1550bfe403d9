"""Text into chunks: whole sentences packed up to a number of tokens, with exact character offsets.

The offsets are those of the document's text: `text[chunk.start:chunk.end] == chunk.text`, always. Borders, strongest
first: pages and hard sections (records, sheets, slides, messages), paragraphs and headings, sentences, lines, words.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol

from l2m_rag.memory_tiers.records import Chunk, Parsed

Span = tuple[int, int]


class Tokenizer(Protocol):
    """Counts tokens, and says where they stand."""

    def spans(self, texts: Sequence[str]) -> list[list[Span]]:
        """Give the character span of each token of each text, without special tokens."""
        ...


# A sentence ends at . ! ? … with closing quotes and white space behind, or at a full-width stop;
# a paragraph ends at a blank line.
_BREAK = re.compile(r"(?P<paragraph>\r?\n[ \t\r\f\v]*\n\s*)|[.!?…][\"'”’)\]]*(?P<sentence>\s+)|[。！？]")  # noqa: RUF001
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Nr|Fig|Eq|Art|Sec|Vol|pp|cf|approx|Inc|Ltd|Co|e\.g|i\.e|U\.S|[A-Z]))\.$"
)
_BATCH = 512  # units tokenised at once: large enough for the tokenizer's threads, small enough to keep memory flat
_MAX_CHARS_PER_TOKEN = 16  # a unit without any border is cut at this many characters per allowed token


@dataclass(frozen=True, slots=True)
class _Unit:
    """A stretch of text that is kept together: a sentence, or a piece of one that is too long."""

    start: int
    end: int
    tokens: int
    opens: int  # 3 a hard section begins here, 2 a soft section, 1 a paragraph, 0 none of them


def split(
    parsed: Parsed, document: str, tokenizer: Tokenizer, *, size: int = 256, overlap: int = 32
) -> Iterator[Chunk]:
    """Cut a document into chunks.

    Args:
        parsed: the document's text with its pages and sections.
        document: the id that the chunks carry.
        tokenizer: of the embedder that will read the chunks.
        size: most tokens of a chunk, special tokens not counted; >= 8.
        overlap: tokens of whole sentences that a chunk repeats from the one before; 0 <= overlap < size.

    Yields:
        Chunks in order, none of them blank.
    """
    if size < 8 or not 0 <= overlap < size:
        raise ValueError(f"size must be >= 8 and 0 <= overlap < size; got size={size}, overlap={overlap}")
    metadata = {**parsed.metadata, "mime": parsed.mime}
    if parsed.title:
        metadata["title"] = parsed.title
    starts = [section.start for section in parsed.sections]
    for ordinal, (start, end) in enumerate(_pack(_units(parsed, tokenizer, size), size, overlap)):
        text = parsed.text[start:end]
        section = bisect_right(starts, start) - 1
        yield Chunk(
            id=chunk_id(document, start, text),
            document=document,
            ordinal=ordinal,
            page=bisect_right(parsed.pages, start) if parsed.pages else None,
            heading=parsed.sections[section].heading if section >= 0 else "",
            start=start,
            end=end,
            text=text,
            metadata=metadata,
        )


def chunk_id(document: str, start: int, text: str) -> str:
    """Give the content hash that names a chunk: the same text at the same place of the same document."""
    return hashlib.sha256(f"{document}\0{start}\0{text}".encode()).hexdigest()[:32]


def _pack(units: Iterator[_Unit], size: int, overlap: int) -> Iterator[Span]:
    """Fill chunks with units, greedily; a paragraph that would be torn starts a new chunk once half of one is full."""
    held: list[_Unit] = []
    tokens = 0
    for unit in units:
        full = tokens + unit.tokens > size
        heading = unit.opens >= 2 and tokens >= size // 4
        if held and (full or unit.opens == 3 or heading):
            yield held[0].start, held[-1].end
            held = _tail(held, overlap, size - unit.tokens) if full and unit.opens < 2 else []
            tokens = sum(kept.tokens for kept in held)
        held.append(unit)
        tokens += unit.tokens
    if held:
        yield held[0].start, held[-1].end


def _tail(held: list[_Unit], overlap: int, room: int) -> list[_Unit]:
    """Give the last whole units that fit into both the overlap and the room of the next chunk."""
    kept: list[_Unit] = []
    left = min(overlap, room)
    for unit in reversed(held[1:]):
        if unit.tokens > left:
            break
        kept.insert(0, unit)
        left -= unit.tokens
    return kept


def _units(parsed: Parsed, tokenizer: Tokenizer, size: int) -> Iterator[_Unit]:
    """Give the document's units in order, each with its number of tokens (1 <= tokens <= size)."""
    pieces = _pieces(parsed, size * _MAX_CHARS_PER_TOKEN)
    while batch := list(islice(pieces, _BATCH)):
        spans = tokenizer.spans([parsed.text[start:end] for start, end, _ in batch])
        for (start, end, opens), tokens in zip(batch, spans, strict=True):
            if len(tokens) <= size:
                # a tokenizer may make one token of an endless word: its characters count too
                yield _Unit(start, end, max(1, len(tokens), (end - start) // _MAX_CHARS_PER_TOKEN), opens)
                continue
            for number, (low, high) in enumerate(_cut(parsed.text[start:end], tokens, size)):
                count = sum(1 for token in tokens if low <= token[0] < high)
                yield _Unit(start + low, start + high, max(1, count), 0 if number else opens)


def _cut(text: str, tokens: Sequence[Span], size: int) -> Iterator[Span]:
    """Cut a unit of more than `size` tokens at a line end or a space, so that no piece has more."""
    first = 0
    while first < len(tokens):
        low = tokens[first][0]
        if len(tokens) - first <= size:
            high = len(text.rstrip())
        else:
            limit = tokens[first + size][0]  # the first token that no longer fits
            border = max(text.rfind("\n", low + 1, limit), text.rfind("\r", low + 1, limit))
            if border < (low + limit) // 2:
                border = max(text.rfind(" ", low + 1, limit), text.rfind("\t", low + 1, limit), border)
            high = border + 1 if border > low else limit
        stripped = low + len(text[low:high].rstrip())
        if stripped > low:
            yield low, stripped
        while first < len(tokens) and tokens[first][0] < high:
            first += 1


def _pieces(parsed: Parsed, longest: int) -> Iterator[tuple[int, int, int]]:
    """Give (start, end, opens) of each sentence-like stretch, trimmed of white space, in order."""
    sections = [section for section in parsed.sections if section.start < len(parsed.text)]
    # a chunk lies on one page, so that what is quoted from it has one page number
    strength = {section.start: 3 if section.hard else 2 for section in sections} | dict.fromkeys(parsed.pages, 3)
    borders = sorted({0, len(parsed.text), *strength})
    for low, high in pairwise(borders):
        opens = strength.get(low, 0)
        for start, end, paragraph in _sentences(parsed.text, low, high):
            for cut in range(start, end, longest):
                piece = _trim(parsed.text, cut, min(cut + longest, end))
                if piece[0] < piece[1]:
                    yield *piece, opens or paragraph
                    opens = 0


def _sentences(text: str, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """Give (start, end, 1 if a paragraph begins here else 0) of the stretches between sentence borders."""
    start, paragraph = low, 0
    for border in _BREAK.finditer(text, low, high):
        if border["sentence"] and _ABBREVIATION.search(text, max(start, border.start() - 8), border.start() + 1):
            continue
        yield start, border.end(), paragraph
        start, paragraph = (
            border.end(),
            int(border["paragraph"] is not None or "\n" in (border["sentence"] or "")),
        )
    yield start, high, paragraph


def _trim(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
