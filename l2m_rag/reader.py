"""The trained reader: a memory model that answers from passages which enter it as states.

Each passage is encoded once, by itself, by the lower layers; its states are kept and enter the upper layers before the
question. The answer is a span of the passages; that there is none is a choice like any other: the empty answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from l2m_rag import answerability, int8
from l2m_rag.backbone import locate
from l2m_rag.checkpoint import learnt_of, load_model, source_of
from l2m_rag.errors import UsageError
from l2m_rag.generate import Decoder
from l2m_rag.indexers.embedding import LOADING, computes_bf16
from l2m_rag.model import L2M
from l2m_rag.overlap import by_expected_f1
from l2m_rag.reading import FREE, LONGEST_ANSWER, QUESTION, as_picked, twice
from l2m_rag.spans import Quoted, Span, SpanFinder, seen
from l2m_rag.state import Picked

ANSWERABILITY = "answerability.json"
"""File of a checkpoint with the weights of the probability that there is an answer."""
_HOT_BYTES = 256 * 2**20
_OUTLIERS = ("down_proj",)  # layers that lose too much in int8 (docs/decisions/0007-int8.md)


class Prefilled(NamedTuple):
    """Passages and a question that were read.

    Args:
        first: log-probabilities of the answer's first token, (V,) float32.
        lower: cache of the lower layers, over the question.
        upper: cache of the upper layers, over passages and question.
        asked: tokens of the question.
        recalled: positions of the passages.
        span: places that they take.
    """

    first: Tensor
    lower: Any
    upper: Any
    asked: int
    recalled: int
    span: float


class MemoryReader:
    """A memory model with its tokenizer.

    Args:
        folder: of the checkpoint.
        name: how it is called in messages.
        source: folder or hub id of the backbone; by default where the checkpoint says.
        threads: CPU threads; 0 leaves torch's own choice.
        device: "cpu", "cuda", ...; None takes a GPU when there is one.
        hot_bytes: most bytes of passages' states that are kept.
        resolution: tokens of a passage that each position stands for when it is read.
        rounded: whether linear layers are in int8; None for where it is quicker: CPUs without bf16 arithmetic.

    Raises:
        L2MError: the checkpoint cannot be used, or has not learnt to read at such a resolution.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        source: str | Path | None = None,
        threads: int = 0,
        device: str | None = None,
        hot_bytes: int = _HOT_BYTES,
        resolution: int = 1,
        rounded: bool | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = computes_bf16(self.device)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model: L2M = load_model(folder, dtype=dtype, merged=True, source=source).to(self.device)
        config = self.model.config
        if resolution > 1 and (config.pooling != "learned" or resolution not in config.ratios):
            raise UsageError(f"{name} has not learnt to read passages at {resolution}:1; set resolution to 1")
        self.resolution = resolution
        self.together, self.free, self._again = learnt_of(folder)
        if self.device == "cpu" and int8.available() and (not bf16 if rounded is None else rounded):
            int8.to_int8(self.model.backbone, but=_OUTLIERS)
        self._source = locate(source or source_of(folder))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self._source)
        self._backend = self.tokenizer.backend_tokenizer
        self._end = int(self.tokenizer.eos_token_id)
        self._finder = SpanFinder(self.tokenizer, {self._end})
        self._hot: OrderedDict[str, Tensor] = OrderedDict()
        self._hot_bytes, self._held = hot_bytes, 0
        self._one = Lock()  # what is kept is shared by threads, as those of a batch of questions
        self._threads = threads
        self._writer: Decoder | None = None
        fitted = folder / ANSWERABILITY
        self.answerability, self.prior = (
            answerability.load(fitted) if fitted.exists() else ({"bias": 0.0, "empty": -1.0}, {"bias": 0.0})
        )

    @property
    def whole(self) -> bool:
        """It reads passages whole."""
        return True

    def count(self, text: str) -> int:
        """Give the number of tokens of a text."""
        return len(self.ids(text))

    def cut(self, text: str, tokens: int) -> str:
        """Give the longest beginning of a text that has at most `tokens` tokens."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        return text if len(encoded.ids) <= tokens else text[: encoded.offsets[tokens][0]]

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        """Write freely, as `writer` does."""
        return self.writer.reply(system, user, most=most)

    @property
    def writer(self) -> Decoder:
        """The backbone as it was before it learnt to quote, loaded on first use."""
        with LOADING:
            if self._writer is None:
                self._writer = Decoder(self._source, name=self.name, threads=self._threads, device=self.device)
            return self._writer

    @torch.inference_mode()
    def quote(self, question: str, passages: Sequence[str], *, best: int = 10) -> Quoted:
        """Answer a question with spans of passages.

        Args:
            question: to be asked.
            passages: texts, in the order in which they are read; at least one.
            best: at most this many different strings are given.

        Passages are read at the reader's resolution; their spans are sought in the texts themselves. The first is not
        the likeliest, but the one that shares most words with all of them, weighed by how likely they are
        (docs/decisions/0016-expected.md).
        """
        read = self.prefill(question, passages, ratios=[self.resolution] * len(passages))
        T, K, backbone = read.asked, read.recalled, self.model.backbone
        written = 0

        def grow(tokens: list[int], nodes: list[list[int]]) -> Tensor:
            nonlocal written
            depth = torch.tensor([[T + len(one) - 1 for one in nodes]], device=self.device)
            here = torch.tensor([tokens], device=self.device)
            mask = seen(nodes, T, written).to(self.device)
            states = backbone.lower(here, cache=read.lower, positions=depth, mask=mask)
            mask = seen(nodes, K + T, written).to(self.device)
            top = backbone.upper(states, read.span + depth, mask, cache=read.upper)
            written += len(tokens)
            return backbone.head(top)[0].float().log_softmax(-1)

        spans = self._finder.find(read.first, grow, passages, lead=" ", best=best, trained=True, power=0.0)
        same: dict[str, list[Span]] = {}
        for span in spans:
            same.setdefault(passages[span.passage][span.start : span.end], []).append(span)
        ordered = by_expected_f1({text: places[0].score for text, places in same.items()})
        found = [span for text in ordered for span in same[text]]
        return Quoted(found, float(read.first[self._end]), T, K, self.resolution)

    @torch.inference_mode()
    def tell(self, question: str, passages: Sequence[str], *, most: int = LONGEST_ANSWER) -> str:
        """Answer a question in a few words of its own, each the likeliest one.

        Args:
            question: to be asked.
            passages: texts, in the order in which they are read; at least one.
            most: tokens of the answer, at most.

        Returns:
            The answer, "" where it finds that the passages hold none.
        """
        read = self.prefill(question, passages, ratios=[self.resolution] * len(passages), put=FREE)
        backbone, told = self.model.backbone, [int(read.first.argmax())]
        while told[-1] != self._end and len(told) < most:
            depth = torch.tensor([[read.asked + len(told) - 1]], device=self.device)
            x = backbone.lower(torch.tensor([told[-1:]], device=self.device), cache=read.lower, positions=depth)
            top = backbone.upper(x, read.span + depth, cache=read.upper)
            told.append(int(backbone.head(top)[0, -1].argmax()))
        return str(self.tokenizer.decode(told, skip_special_tokens=True)).strip()

    @torch.inference_mode()
    def prefill(
        self, question: str, passages: Sequence[str], *, ratios: Sequence[int] = (), put: str = QUESTION
    ) -> Prefilled:
        """Read passages and question, put in one way or another, up to the first token of the answer; see `quote`."""
        backbone = self.model.backbone
        recalled = self.model.assemble([self._picked(passages, ratios or [1] * len(passages))])
        asked = torch.tensor([self.ids(put.format(twice(question) if self._again else question))], device=self.device)
        lower, upper = DynamicCache(), DynamicCache()
        x = backbone.lower(asked, cache=lower)
        positions = torch.arange(asked.shape[1], device=self.device)[None]
        sequence, span, K = x, 0.0, 0
        if recalled is not None:
            span, K = float(recalled.span), recalled.vectors.shape[1]
            positions = torch.cat([recalled.places, span + positions], 1)
            sequence = torch.cat([recalled.vectors, x], 1)
        top = backbone.upper(sequence, positions, cache=upper)
        first = backbone.head(top[:, -1:])[0, 0].float().log_softmax(-1)
        return Prefilled(first, lower, upper, asked.shape[1], K, span)

    def _picked(self, passages: Sequence[str], ratios: Sequence[int]) -> Picked:
        """Give passages as something recalled."""
        states = [self._states(text) for text in passages]
        lengths = torch.tensor([[len(one) for one in states]], device=self.device)
        values = torch.zeros(1, len(states), int(lengths.max()), states[0].shape[1], dtype=states[0].dtype)
        values = values.to(self.device)
        for at, one in enumerate(states):
            values[0, at, : len(one)] = one
        tokens = torch.zeros_like(values[..., 0], dtype=torch.int64)
        return as_picked(values, tokens, lengths, torch.tensor([list(ratios)], device=self.device))

    def _states(self, text: str) -> Tensor:
        """Give the lower states of a passage, (L, D), made when it is read for the first time."""
        with self._one:
            if text in self._hot:
                self._hot.move_to_end(text)
                return self._hot[text]
        made = self.model.backbone.lower(torch.tensor([self.ids(text)], device=self.device))[0]
        with self._one:
            if text not in self._hot:
                self._hot[text] = made
                self._held += made.numel() * made.element_size()
            while self._held > self._hot_bytes and len(self._hot) > 1:
                _, gone = self._hot.popitem(last=False)
                self._held -= gone.numel() * gone.element_size()
        return made

    def forget(self) -> None:
        """Let go of all states that are kept."""
        with self._one:
            self._hot.clear()
            self._held = 0

    def ids(self, text: str) -> list[int]:
        """Give the tokens of a text."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)
