"""Span-constrained decoding: the spans of some passages that a language model would most likely write next.

It is a beam search over the spans. Every beam is a set of places in the text that spell the same tokens; a token is
allowed when it continues one of them, so nothing can be written that is not a verbatim span, and its offsets are known.
All beams share the prompt's cache: they are written behind one another and a mask lets each see the prompt and its own
ancestors only, so no cache is copied.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Grow = Callable[[list[int], list[list[int]]], "torch.Tensor"]
"""Called with n tokens and, for each, the numbers of all tokens it sees behind the prompt in the order in which they
were written, its own last; gives the log-probabilities of what follows each, (n, V)."""

LENGTH_POWER = 0.35
"""Between 0 (a sum, which favours the first digit of a number) and 1 (a mean, which favours long copies, as each word
that is copied on gets likelier). XQuAD-en, 60 questions, gold paragraph, untrained: F1 0.27 at 0, 0.32 at 0.35, 0.30 at
0.5, 0.13 at 1."""
_POOL = 6  # finished spans that a beam must be able to beat
_HOPELESS = 1.5  # nats below the best span
LONGEST_SPAN = 24  # tokens
_FIRST_WORD = 64  # characters tokenised anew at the start of a span
_NUMBER_GOES_ON = re.compile(r"[.,:]\d")
_CLOSING = frozenset(")]}%°'\"”’»")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Span:
    """A span of a passage, as the decoder scored it.

    Args:
        passage: number of the passage, from 0.
        start: character offset in the passage.
        end: offset just behind it.
        score: log-probability of its n tokens and of stopping behind them, divided by (n + 1) ** power;
            natural logarithm, <= 0.
        tokens: number of its tokens.
    """

    passage: int
    start: int
    end: int
    score: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a reader finds in some passages.

    Args:
        spans: best first, which is not always the likeliest; the same words at several places are one entry each, with
            equal score, behind each other.
        empty: log-probability that the passages hold no answer; None from a model that was not trained to say so.
        prompt: tokens that were read as text.
        recalled: positions that were read as states.
        ratio: tokens that each of them stands for.
    """

    spans: list[Span]
    empty: float | None
    prompt: int
    recalled: int = 0
    ratio: int = 1


@dataclass(slots=True)
class _Place:
    """Where a beam stands in a text: `at` counts tokens of `path`, which starts at character `start` of a passage."""

    passage: int
    start: int
    path: _Path
    at: int


@dataclass(slots=True)
class _Path:
    """The tokens of a passage from one word on: a first word of its own, then those of the whole passage.

    A word is another token with a space before it than without; what follows the first word is shared.
    """

    own: list[int]
    own_ends: list[int]
    rest: list[int]
    rest_ends: list[int]
    joined: int  # index into `rest` behind the first word

    def token(self, at: int) -> int | None:
        if at < len(self.own):
            return self.own[at]
        index = self.joined + at - len(self.own)
        return self.rest[index] if index < len(self.rest) else None

    def end(self, at: int) -> int:
        """Give the character offset behind token `at`."""
        if at < len(self.own):
            return self.own_ends[at]
        return self.rest_ends[self.joined + at - len(self.own)]


@dataclass(slots=True)
class _Beam:
    places: list[_Place]
    score: float = 0.0  # sum of log-probabilities
    length: int = 0
    nodes: list[int] = field(default_factory=list)  # its tokens' places behind the prompt
    logits: Any = None  # log-probabilities of the next token


class SpanFinder:
    """Finds spans for one language model.

    Args:
        tokenizer: of the model, from the transformers library.
        ends: ids that end a text.
    """

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._ends = sorted(ends | {self._ids("\n")[0]})
        self._stops = sorted({*self._ends, *(self._ids(text)[0] for text in (".", ",", " ("))})

    def find(
        self,
        first: torch.Tensor,
        grow: Grow,
        passages: Sequence[str],
        *,
        lead: str,
        beams: int = 4,
        best: int = 3,
        trained: bool = False,
        power: float = LENGTH_POWER,
    ) -> list[Span]:
        """Find the likeliest spans.

        Args:
            first: log-probabilities of the token behind the prompt, (V,).
            grow: writes on.
            passages: texts whose spans are allowed: from the start of a word to the end of one.
            lead: what stands between prompt and answer: "" or " ".
            beams: width of the search.
            best: at most this many different strings are given.
            trained: the model has learnt to end its answers; else a full stop or comma counts as an end too.
            power: by which the score is normalised for length, see `Span`.

        Returns:
            Spans, best first; the same words at several places are one entry each, with equal score.
        """
        import torch

        found: list[tuple[float, int, list[_Place]]] = []
        live = [_Beam(self._starts(passages, lead), logits=first)]
        written = 0
        while live and written < LONGEST_SPAN * beams:
            grown: list[tuple[float, int, _Beam, list[_Place]]] = []
            for beam in live:
                ended = [place for place in beam.places if _may_end(place, passages)]
                if ended:
                    # behind a digit a full stop or comma may go on with the number
                    last = passages[ended[0].passage][ended[0].path.end(ended[0].at - 1) - 1]
                    stops = self._ends if trained or last.isdigit() else self._stops
                    stop = torch.logsumexp(beam.logits[stops], 0).item()
                    found.append((beam.score + stop, beam.length, ended))
                following: dict[int, list[_Place]] = {}
                for place in beam.places:
                    token = place.path.token(place.at)
                    if token is not None:
                        following.setdefault(token, []).append(place)
                if following and beam.length < LONGEST_SPAN:
                    tokens = list(following)
                    scores = beam.logits[tokens] + beam.score
                    for score, index in zip(
                        *(part.tolist() for part in scores.topk(min(beams, len(tokens)))), strict=True
                    ):
                        grown.append((score, tokens[index], beam, following[tokens[index]]))
            # a sum of log-probabilities only falls: a beam below the worst of the best cannot come back
            grown.sort(key=lambda entry: -entry[0])
            ranked = sorted((entry[0] for entry in found), reverse=True)
            floor = max(ranked[max(best, _POOL) - 1 :][:1], default=-math.inf)
            if not power and ranked:  # the best is found in any case
                floor = max(floor, ranked[0] - _HOPELESS)
            grown = [entry for entry in grown[:beams] if entry[0] > floor]
            live = _grown(grown, grow, written)
            written += len(grown)
        found = [(total / (length + 1) ** power, length, places) for total, length, places in found]
        found.sort(key=lambda entry: -entry[0])
        return [
            Span(place.passage, place.start, place.path.end(place.at - 1), score, length)
            for score, length, places in found[:best]
            for place in places
        ]

    def _starts(self, passages: Sequence[str], lead: str) -> list[_Place]:
        """Give a place for every word of every passage at which a span may start."""
        places: list[_Place] = []
        encoded = self._backend.encode_batch(list(passages), add_special_tokens=False)
        for number, (text, whole) in enumerate(zip(passages, encoded, strict=True)):
            starts = [at for at in range(len(text)) if _word_starts(text, at)]
            ends = [end for _, end in whole.offsets]
            # a token that carries the space before a word begins, for the reader, where the space does
            joints = {
                start: index for index, (start, _) in enumerate(whole.offsets) if text[start : start + 1].isspace()
            }
            firsts = self._backend.encode_batch(
                [lead + text[at : at + _FIRST_WORD] for at in starts], add_special_tokens=False
            )
            for at, first in zip(starts, firsts, strict=True):
                path = _path(first, at - len(lead), whole.ids, ends, joints, len(text), at + _FIRST_WORD)
                if path:
                    places.append(_Place(number, at, path, 0))
        return places

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _grown(grown: list[tuple[float, int, _Beam, list[_Place]]], grow: Grow, written: int) -> list[_Beam]:
    """Write the chosen tokens of all beams."""
    beams = []
    for row, (score, _, parent, places) in enumerate(grown):
        moved = [_Place(place.passage, place.start, place.path, place.at + 1) for place in places]
        beams.append(_Beam(moved, score, parent.length + 1, [*parent.nodes, written + row]))
    if beams:
        scores = grow([token for _, token, _, _ in grown], [beam.nodes for beam in beams])
        for beam, row_scores in zip(beams, scores, strict=True):
            beam.logits = row_scores
    return beams


def seen(nodes: list[list[int]], prompt: int, written: int) -> torch.Tensor:
    """Give the mask of some tokens that are written next, (1, 1, n, prompt + written + n) bool.

    Args:
        nodes: for each of them, the numbers of the tokens it sees behind the prompt, its own last.
        prompt: length of the prompt.
        written: tokens that are written already.
    """
    import torch

    mask = torch.zeros(1, 1, len(nodes), prompt + written + len(nodes), dtype=torch.bool)
    mask[..., :prompt] = True
    for row, numbers in enumerate(nodes):
        mask[0, 0, row, [prompt + number for number in numbers]] = True
    return mask


def _path(
    first: Any,
    shift: int,
    rest: list[int],
    rest_ends: list[int],
    joints: dict[int, int],
    length: int,
    limit: int,
) -> _Path | None:
    """Join the tokens of a span's first word to those of the passage at the first space that both agree on."""
    for index, (start, _) in enumerate(first.offsets):
        joint = joints.get(start + shift)
        if index and joint is not None:
            ends = [end + shift for _, end in first.offsets[:index]]
            return _Path(list(first.ids[:index]), ends, rest, rest_ends, joint)
    if length <= limit:  # the last word of the passage
        return _Path(list(first.ids), [end + shift for _, end in first.offsets], rest, rest_ends, len(rest))
    return None  # a word longer than anything that is an answer


def _in_word(letter: str) -> bool:
    """Say whether a character belongs to a word: letters, digits, and the marks and joiners that sit on them."""
    return letter.isalnum() or letter in "_\u200d" or unicodedata.category(letter)[0] == "M"


def _word_starts(text: str, at: int) -> bool:
    before = text[at - 1] if at else " "
    if not (text[at].isalnum() or text[at] in "$€£") or _in_word(before) or before in "$€£":
        return False
    return not (text[at].isdigit() and at > 1 and before in ".,:" and text[at - 2].isdigit())  # 450 of 1,450


def _may_end(place: _Place, passages: Sequence[str]) -> bool:
    """Say whether a span may end behind a place's last token: at the end of a word, never inside a character."""
    end = place.path.end(place.at - 1) if place.at else 0
    if end <= place.start:  # nothing yet but the space before the first word
        return False
    text = passages[place.passage]
    last = text[end - 1]
    if not (_in_word(last) or last in _CLOSING):
        return False
    if end < len(text) and (_in_word(text[end]) if _in_word(last) else unicodedata.category(text[end])[0] == "M"):
        return False
    if last.isdigit() and _NUMBER_GOES_ON.match(text, end):  # 1 of 1,450
        return False
    following = place.path.token(place.at)
    return following is None or place.path.end(place.at) > end
