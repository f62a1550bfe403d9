"""Which tool a message wants, for a model that is too small to say.

SmolLM2-135M-Instruct, left to choose between two tools, asks for the weather to apply a function. The embedder compares
the message with what the tools say of themselves instead; words of a tool's name in the message count too, and a
question goes rather to a tool that takes one (docs/langchain.md has how often that is right).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from l2m_rag.constrained import ASKED
from l2m_rag.errors import UsageError
from l2m_rag.evidence import Closeness

_NAMED = 0.5  # for a message that holds all words of a tool's name
_TAKES = 0.15  # for a question and a tool that takes one
_ENOUGH = 0.25  # below which no tool is wanted
_WORD = re.compile(r"[^\W_]+")


def choose(
    message: str, tools: Sequence[Mapping[str, Any]], choice: str | None, closeness: Closeness
) -> Mapping[str, Any] | None:
    """Give the tool that a message wants; None when it wants none.

    Args:
        message: what the user said.
        tools: name, description and parameters of each.
        choice: "auto" or None to leave it open, "none", "any" for one in any case, or the name of a tool.
        closeness: of the message with texts.

    Raises:
        UsageError: there is no tool of that name.
    """
    if choice == "none" or not tools:
        return None
    if choice not in (None, "auto", "any"):
        named = [tool for tool in tools if tool["name"] == choice]
        if not named:
            raise UsageError(f"tool_choice ({choice!r}) must be one of {', '.join(one['name'] for one in tools)}")
        return named[0]
    if len(tools) == 1 and choice == "any":
        return tools[0]
    fits = _fits(message, tools, closeness)
    best = max(range(len(tools)), key=fits.__getitem__)
    if choice == "any" or fits[best] >= _ENOUGH:
        return tools[best]
    asked = [at for at, tool in enumerate(tools) if _takes(message, tool)]  # rather looked up than made up
    return tools[max(asked, key=fits.__getitem__)] if asked else None


def _fits(message: str, tools: Sequence[Mapping[str, Any]], closeness: Closeness) -> list[float]:
    words = [_WORD.findall(tool["name"].lower()) for tool in tools]
    texts = [f"{' '.join(name)}. {tool.get('description', '')}" for name, tool in zip(words, tools, strict=True)]
    said = set(_WORD.findall(message.lower()))
    return [
        close + _NAMED * sum(word in said for word in name) / max(len(name), 1) + _TAKES * _takes(message, tool)
        for close, name, tool in zip(closeness(message, texts), words, tools, strict=True)
    ]


def _takes(message: str, tool: Mapping[str, Any]) -> bool:
    names = tool.get("parameters", {}).get("properties", {})
    return message.rstrip().endswith("?") and any(name in names for name in ASKED)
