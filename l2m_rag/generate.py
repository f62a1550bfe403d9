"""The decoder: a causal language model that writes freely, or only what stands in the passages.

Span-constrained decoding is a beam search over the spans of the passages. Every beam is a set of places in the text
that spell the same tokens; a token is allowed when it continues one of them, so nothing can be written that is not a
verbatim span, and its offsets are known. All beams share the prompt's cache: they are written behind one another and a
mask lets each see the prompt and its own ancestors only, so no cache is copied.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2m_rag.errors import ModelError

if TYPE_CHECKING:
    import torch

LENGTH_POWER = 0.35
"""Between 0 (a sum, which favours the first digit of a number) and 1 (a mean, which favours long copies, as each word
that is copied on gets likelier). XQuAD-en, 60 questions, gold paragraph, untrained: F1 0.27 at 0, 0.32 at 0.35, 0.30 at
0.5, 0.13 at 1."""
_POOL = 6  # finished spans that a beam must be able to beat
_LONGEST_SPAN = 24  # tokens
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
        score: log-probability of its n tokens and of stopping behind them, divided by (n + 1) ** `LENGTH_POWER`;
            natural logarithm, <= 0.
        tokens: number of its tokens.
    """

    passage: int
    start: int
    end: int
    score: float
    tokens: int


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


class Decoder:
    """A causal language model of the transformers library with its tokenizer.

    Args:
        source: folder or hub id.
        name: how it is called in messages.
        threads: CPU threads; 0 leaves torch's own choice.
        device: "cpu", "cuda", ...; None takes a GPU when there is one.

    Raises:
        ModelError: the model could not be loaded.
    """

    def __init__(self, source: str | Path, *, name: str, threads: int = 0, device: str | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from l2m_rag.indexers.embedding import computes_bf16

        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if computes_bf16(self.device) else torch.float32
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(self.device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # whatever a hub client, a config or a weight file can throw
            raise ModelError(f"model {name!r} could not be loaded from {source}: {error}") from error
        self._backend = self.tokenizer.backend_tokenizer
        config = self._model.config
        self.window = int(getattr(config, "max_position_embeddings", 0) or 2048)
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        self._eos = {int(end) for end in ([ends] if isinstance(ends, int) else ends or [self.tokenizer.eos_token_id])}
        self._ends = sorted(self._eos | {self._ids("\n")[0]})
        self._stops = sorted({*self._ends, *(self._ids(text)[0] for text in (".", ",", " ("))})

    def prompt(self, system: str, user: str, opening: str = "") -> list[int]:
        """Give the tokens of a prompt that the model is to continue.

        Args:
            system: what the model is told of its task.
            user: evidence and question.
            opening: first words of the reply.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = f"{system}\n\n{user}\n\n"
        return self._ids(text + opening)

    def count(self, text: str) -> int:
        """Give the number of tokens of a text."""
        return len(self._ids(text))

    def cut(self, text: str, tokens: int) -> str:
        """Give the longest beginning of a text that has at most `tokens` tokens."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        return text if len(encoded.ids) <= tokens else text[: encoded.offsets[tokens][0]]

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        """Write a reply to a prompt, as `write` does."""
        return self.write(self.prompt(system, user), most=most)

    def write(self, prompt: Sequence[int], *, most: int = 256) -> Iterator[str]:
        """Write freely (greedy), giving the text piece by piece as it comes; never half a character."""
        import torch

        ids: list[int] = []
        shown = ""
        with torch.inference_mode():
            logits, cache = self._prefill(prompt)
            for _ in range(most):
                token = int(logits.argmax())
                if token in self._eos:
                    break
                ids.append(token)
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(shown) :]
                    shown = text
                out = self._model(input_ids=self._tensor([token]), cache=cache, use_cache=True)
                logits = out.logits[0, -1]

    def spans(
        self, prompt: Sequence[int], passages: Sequence[str], *, lead: str = "", beams: int = 4, best: int = 3
    ) -> list[Span]:
        """Find the spans of some passages that the model would most likely write next.

        Args:
            prompt: tokens; the passages need not be part of them.
            passages: texts whose spans are allowed: from the start of a word to the end of one.
            lead: what stands between prompt and answer: "" or " ".
            beams: width of the search.
            best: at most this many different strings are given.

        Returns:
            Spans, best first; the same words at several places are one entry each, with equal score.
        """
        import torch

        found: list[tuple[float, int, list[_Place]]] = []
        with torch.inference_mode():
            logits, cache = self._prefill(prompt)
            live = [_Beam(self._starts(passages, lead), logits=torch.log_softmax(logits.float(), -1))]
            written = 0
            while live and written < _LONGEST_SPAN * beams:
                grown: list[tuple[float, int, _Beam, list[_Place]]] = []
                for beam in live:
                    ended = [place for place in beam.places if _may_end(place, passages)]
                    if ended:
                        # behind a digit a full stop or comma may go on with the number
                        last = passages[ended[0].passage][ended[0].path.end(ended[0].at - 1) - 1]
                        stops = self._ends if last.isdigit() else self._stops
                        stop = torch.logsumexp(beam.logits[stops], 0).item()
                        found.append((beam.score + stop, beam.length, ended))
                    following: dict[int, list[_Place]] = {}
                    for place in beam.places:
                        token = place.path.token(place.at)
                        if token is not None:
                            following.setdefault(token, []).append(place)
                    if following and beam.length < _LONGEST_SPAN:
                        tokens = list(following)
                        scores = beam.logits[tokens] + beam.score
                        for score, index in zip(
                            *(part.tolist() for part in scores.topk(min(beams, len(tokens)))), strict=True
                        ):
                            grown.append((score, tokens[index], beam, following[tokens[index]]))
                # a sum of log-probabilities only falls: a beam below the worst of the best cannot come back
                grown.sort(key=lambda entry: -entry[0])
                floor = sorted((entry[0] for entry in found), reverse=True)[max(best, _POOL) - 1 :][:1]
                grown = [entry for entry in grown[:beams] if not floor or entry[0] > floor[0]]
                live = self._grow(grown, cache, len(prompt), written)
                written += len(grown)
        found = [(total / (length + 1) ** LENGTH_POWER, length, places) for total, length, places in found]
        found.sort(key=lambda entry: -entry[0])
        return [
            Span(place.passage, place.start, place.path.end(place.at - 1), score, length)
            for score, length, places in found[:best]
            for place in places
        ]

    def _grow(
        self, grown: list[tuple[float, int, _Beam, list[_Place]]], cache: Any, prompt: int, written: int
    ) -> list[_Beam]:
        """Write the chosen tokens of all beams in one pass, each seeing the prompt and its own ancestors."""
        import torch

        if not grown:
            return []
        n = len(grown)
        mask = torch.zeros(1, 1, n, prompt + written + n, dtype=torch.bool, device=self.device)
        mask[..., :prompt] = True
        beams = []
        for row, (score, _, parent, places) in enumerate(grown):
            nodes = [*parent.nodes, written + row]
            mask[0, 0, row, [prompt + node for node in nodes]] = True
            moved = [_Place(place.passage, place.start, place.path, place.at + 1) for place in places]
            beams.append(_Beam(moved, score, parent.length + 1, nodes))
        positions = torch.tensor([[prompt + beam.length - 1 for beam in beams]], device=self.device)
        out = self._model(
            input_ids=self._tensor([token for _, token, _, _ in grown]),
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        scores = torch.log_softmax(out.logits[0].float(), -1)
        for row, beam in enumerate(beams):
            beam.logits = scores[row]
        return beams

    def _prefill(self, prompt: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Give the logits behind the prompt, (V,), and the cache of its keys and values."""
        if len(prompt) + _LONGEST_SPAN > self.window:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; {self.name} has a window of {self.window}. Lower the budget"
            )
        out = self._model(input_ids=self._tensor(list(prompt)), use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.cache

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

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        import torch

        return torch.tensor([ids], device=self.device)


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


def milliseconds(since: float) -> float:
    """Give the milliseconds since a reading of the monotonic clock, to the tenth."""
    return round((time.monotonic() - since) * 1000, 1)
