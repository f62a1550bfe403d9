"""Grammars that what a model writes is held to: JSON after a schema, and calls of tools whose texts were said before.

llguidance (extra `langchain`) says which tokens may come next. A small model cannot be trusted with a free text in the
arguments of a call: SmolLM2-135M-Instruct searches for "search_documents". Held to words that stand in the message, as
the answers of this library are to the passages, it calls with "When does the lease end?" (docs/langchain.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from l2m_rag.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MOST_ITEMS = 8  # of a list whose schema does not say
_LARGEST = 10**15  # of an integer whose schema does not say
_SHORTEST = 40  # characters that a string may have in any case
ASKED = ("question", "query")
"""Arguments that are the message itself: what a search is told should not be less."""
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_CLOSING = {'"': 3, "}": 2, "]": 2, ",": 1}  # by a token's first character; in a string only the first ends anything
_HURRY = 64  # tokens left from which on strings, numbers and lists end as soon as they may
_FREE = ("enum", "const", "pattern", "format")  # what bounds a string by itself


class Grammars:
    """Makes guides for the tokens of one model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: V, the length of the model's logits.

    Raises:
        MissingExtraError: llguidance is not there.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise MissingExtraError("llguidance", "langchain") from None
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, size)
        texts = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        self._closing = np.zeros(size, dtype=np.int8)
        self._closing[: len(texts)] = [_CLOSING.get((text or "")[:1], 0) for text in texts]

    def json(self, schema: Mapping[str, Any], characters: int) -> Guide:
        """Give a guide to JSON that a schema allows.

        Args:
            schema: JSON schema.
            characters: that all strings of the schema together should have at most; none is held to less than 40.

        Raises:
            UsageError: there is something in the schema that cannot be held to.
        """
        from llguidance import LLMatcher

        whole = {**bounded(schema, max(_SHORTEST, characters // max(1, _strings(schema)))), "x-guidance": _LAYOUT}
        return self._guide(LLMatcher.grammar_from_json_schema(whole), f"schema {schema.get('title', '')}".strip())

    def call(self, parameters: Mapping[str, Any], said: str) -> Guide:
        """Give a guide to the arguments of a call, a JSON object, whose texts are words that were said.

        Args:
            parameters: JSON schema of the arguments. Those that must be given are written; when none must, all are.
            said: where texts are taken from, all of it for a question. Strings that the schema bounds itself, and what
                lies deeper, are free.

        Raises:
            UsageError: there is something in the schema that cannot be held to.
        """
        properties = parameters.get("properties", {})
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        members, rules = [], []
        for number, name in enumerate(needed(parameters)):
            of = properties[name]
            members.append(f"{json.dumps((', ' if number else '') + json.dumps(name) + ': ')} v{number}")
            if said and _is_free(of) and name in ASKED:
                rules.append(f"v{number}: {_quoted(_quoted(said))}")
            elif said and _is_free(of):
                words = [_quoted(word)[1:-1] for word in _WORDS.findall(said)]  # an escape is never cut in two
                copied = json.dumps({"substring_chunks": words})
                rules += [f'v{number}: "\\"" w{number} "\\""', f"w{number}: %regex {copied}"]
            else:
                rules.append(f"v{number}: %json {json.dumps({**bounded(of, 200), **shared, 'x-guidance': _LAYOUT})}")
        grammar = "\n".join([f'start: "{{" {" ".join(members)} "}}"', *rules])
        return self._guide(grammar, "the arguments of a tool")

    def _guide(self, grammar: str, what: str) -> Guide:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise UsageError(f"{what} cannot be held to: {matcher.get_error()}")
        return Guide(matcher, self._closing)


class Guide:
    """Follows what is written, token by token, and says what may come next.

    Args:
        matcher: of llguidance.
        closing: (V,) int8, how much each token helps to come to an end.
    """

    def __init__(self, matcher: Any, closing: NDArray[np.int8]) -> None:
        self._matcher = matcher
        self._closing = closing

    def allowed(self, logits: Tensor, left: int) -> Tensor:
        """Give the logits, (V,), with minus infinity for each token that may not come next.

        Args:
            logits: (V,).
            left: tokens that may still be written; when they are few, only what comes to an end may come next.
        """
        import torch

        # a bit for each token; llguidance.torch would do this with a kernel that is compiled first
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may = np.unpackbits(bits, count=len(self._closing), bitorder="little").astype(bool)
        if left < _HURRY and may.any():
            may &= self._closing == self._closing[may].max()
        return logits.masked_fill(~torch.from_numpy(may).to(logits.device), -torch.inf)

    def take(self, token: int) -> bool:
        """Take the token that was written; say whether all is written."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def needed(parameters: Mapping[str, Any]) -> list[str]:
    """Give the arguments that are written: those that must be given; when none must, all."""
    names = list(parameters.get("properties", {}))
    return [name for name in names if name in parameters.get("required", names)] or names


def is_asked(parameters: Mapping[str, Any]) -> bool:
    """Say whether the message itself is all that a call needs."""
    names = needed(parameters)
    return bool(names) and all(name in ASKED and _is_free(parameters["properties"][name]) for name in names)


def _is_free(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "string" and not any(key in schema for key in _FREE)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def bounded(schema: Mapping[str, Any], characters: int) -> dict[str, Any]:
    """Give a schema in which strings, integers and lists end and objects have no other names than those that it gives.

    Args:
        schema: JSON schema; what it says itself stays.
        characters: that a string may have at most.
    """
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions"):
            made[key] = {name: _within(one, characters) for name, one in value.items()}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            made[key] = [_within(one, characters) for one in value]
        elif key in ("items", "additionalProperties"):
            made[key] = _within(value, characters)
        elif key not in ("default", "examples"):
            made[key] = value
    if _is_free(made):
        made.setdefault("maxLength", characters)
    if made.get("type") == "integer" and "enum" not in made:
        if not {"maximum", "exclusiveMaximum"} & made.keys():
            made["maximum"] = _LARGEST
        if not {"minimum", "exclusiveMinimum"} & made.keys():
            made["minimum"] = -_LARGEST
    if made.get("type") == "array":
        made.setdefault("maxItems", max(_MOST_ITEMS, int(made.get("minItems", 0))))
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


def _within(schema: Any, characters: int) -> Any:
    return bounded(schema, characters) if isinstance(schema, Mapping) else schema


def _strings(schema: Any) -> int:
    """Count the strings that a schema names."""
    if isinstance(schema, Mapping):
        return (schema.get("type") == "string") + sum(map(_strings, schema.values()))
    return sum(map(_strings, schema)) if isinstance(schema, list) else 0
