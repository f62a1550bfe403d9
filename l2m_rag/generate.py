"""The decoder: a causal language model that writes freely, or only what stands in the passages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2m_rag import answerability
from l2m_rag.constrained import Grammars, Guide
from l2m_rag.errors import ModelError, UsageError
from l2m_rag.spans import LONGEST_SPAN, Quoted, Span, SpanFinder, seen

if TYPE_CHECKING:
    import torch

_SYSTEM = "You answer questions with a few words copied from the given text."


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

        from l2m_rag.indexers.embedding import LOADING, computes_bf16

        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if computes_bf16(self.device) else torch.float32
        try:
            with LOADING:
                self._model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(self.device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # whatever a hub client, a config or a weight file can throw
            raise ModelError(f"model {name!r} could not be loaded from {source}: {error}") from error
        self._backend = self.tokenizer.backend_tokenizer
        config = self._model.config
        self.window = int(getattr(config, "max_position_embeddings", 0) or 2048)
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        self._eos = {int(end) for end in ([ends] if isinstance(ends, int) else ends or [self.tokenizer.eos_token_id])}
        self._finder = SpanFinder(self.tokenizer, self._eos)

    def prompt(self, system: str, user: str, opening: str = "") -> list[int]:
        """Give the tokens of a prompt that the model is to continue.

        Args:
            system: what the model is told of its task.
            user: evidence and question.
            opening: first words of the reply.
        """
        return self._laid([("system", system), ("user", user)], opening)

    def chat(self, turns: Sequence[tuple[str, str]], *, most: int, opening: str = "") -> list[int]:
        """Give the tokens of a conversation that the model is to continue; they leave room for its reply in any case.

        Turns before the last go first, those of the system last of all; then the longest texts are cut at their ends.

        Args:
            turns: (role, text), oldest first; a role is system, user or assistant.
            most: tokens that the reply may have.
            opening: first words of the reply.

        Raises:
            UsageError: the window is too small for a reply of that length.
        """
        room = self.window - max(most, LONGEST_SPAN)
        kept = list(turns)
        costs = [self.count(text) for _, text in kept]
        while (over := len(ids := self._laid(kept, opening)) - room) > 0:
            early = [at for at, (role, _) in enumerate(kept[:-1]) if role != "system"] or list(range(len(kept) - 1))
            if early and len(kept) > 2:
                frame = max(0, len(ids) - sum(costs)) / len(kept)  # what the template puts around each
                gone = accumulate(costs[at] + frame for at in early)
                drop = set(early[: 1 + sum(cost < over for cost in gone)])
                kept = [turn for at, turn in enumerate(kept) if at not in drop]
                costs = [cost for at, cost in enumerate(costs) if at not in drop]
                continue
            at = max(range(len(kept)), key=costs.__getitem__)
            role, text = kept[at]
            if not text or costs[at] < over:
                raise UsageError(
                    f"a reply of {most:,} tokens leaves no room in the window of {self.name}, {self.window:,} tokens"
                )
            kept[at] = role, self.cut(text, costs[at] - over)
            costs[at] = self.count(kept[at][1])
        return ids

    def _laid(self, turns: Sequence[tuple[str, str]], opening: str) -> list[int]:
        if self.tokenizer.chat_template:
            messages = [{"role": role, "content": text} for role, text in turns]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = "".join(f"{text}\n\n" for _, text in turns)
        return self._ids(text + opening)

    @cached_property
    def grammars(self) -> Grammars:
        """What a reply can be held to."""
        return Grammars(self.tokenizer, int(self._model.config.vocab_size))

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

    def write(
        self,
        prompt: Sequence[int],
        *,
        most: int = 256,
        guide: Guide | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Write a reply, giving the text piece by piece as it comes; never half a character.

        Args:
            prompt: tokens.
            most: tokens that are written.
            guide: what the reply is held to.
            temperature: 0 takes the likeliest token each time; above, tokens are drawn.
            seed: of what is drawn.
        """
        import torch

        ids: list[int] = []
        shown = ""
        drawn = torch.Generator()
        drawn.manual_seed(seed) if seed is not None else drawn.seed()
        with torch.inference_mode():
            logits, cache = self._prefill(prompt)
            room = min(most, self.window - len(prompt))
            for number in range(room):
                scores = guide.allowed(logits, room - number) if guide else logits
                if temperature:
                    shares = (scores.float().cpu() / temperature).softmax(-1)
                    token = int(torch.multinomial(shares, 1, generator=drawn))
                else:
                    token = int(scores.argmax())
                if token in self._eos:
                    break
                ids.append(token)
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(shown) :]
                    shown = text
                if guide and guide.take(token):
                    break
                out = self._model(input_ids=self._tensor([token]), cache=cache, use_cache=True)
                logits = out.logits[0, -1]

    @property
    def whole(self) -> bool:
        """Untrained, it does better with a few sentences."""
        return False

    @property
    def together(self) -> int:
        """It reads no passages."""
        return 1

    @property
    def answerability(self) -> dict[str, float]:
        """Weights of the probability that there is an answer."""
        return answerability.untrained()

    @property
    def prior(self) -> dict[str, float]:
        """It reads no passage by itself."""
        return {}

    def quote(self, question: str, passages: Sequence[str]) -> Quoted:
        """Answer a question with spans of some texts, which are read as a prompt."""
        evidence = "\n\n".join(passages)
        prompt = self.prompt(_SYSTEM, f"{evidence}\n\nQuestion: {question}\nAnswer:", "Answer:")
        return Quoted(self.spans(prompt, passages, lead=" "), None, len(prompt))

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

        with torch.inference_mode():
            logits, cache = self._prefill(prompt)
            written = 0

            def grow(tokens: list[int], nodes: list[list[int]]) -> torch.Tensor:
                nonlocal written
                positions = torch.tensor([[len(prompt) + len(one) - 1 for one in nodes]], device=self.device)
                out = self._model(
                    input_ids=self._tensor(tokens),
                    attention_mask=seen(nodes, len(prompt), written).to(self.device),
                    position_ids=positions,
                    cache=cache,
                    use_cache=True,
                )
                written += len(tokens)
                return torch.log_softmax(out.logits[0].float(), -1)

            first = torch.log_softmax(logits.float(), -1)
            return self._finder.find(first, grow, passages, lead=lead, beams=beams, best=best)

    def _prefill(self, prompt: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Give the logits behind the prompt, (V,), and the cache of its keys and values."""
        if len(prompt) + LONGEST_SPAN > self.window:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; {self.name} has a window of {self.window}. Lower the budget"
            )
        out = self._model(input_ids=self._tensor(list(prompt)), use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.cache

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        import torch

        return torch.tensor([ids], device=self.device)


def milliseconds(since: float) -> float:
    """Give the milliseconds since a reading of the monotonic clock, to the tenth."""
    return round((time.monotonic() - since) * 1000, 1)
