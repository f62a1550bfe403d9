"""A language model behind an OpenAI-compatible address, for people who have a large one."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.response import addinfourl

from l2m_rag.errors import ConfigError, ModelError

_CHARS_PER_TOKEN = 4  # the endpoint's tokenizer is not known; this is what English text has on average
_SECONDS = 120


class Endpoint:
    """Writes replies through `POST {url}/chat/completions`, streamed.

    Args:
        url: base address, such as http://127.0.0.1:8080/v1.
        model: name that is sent; "" asks the endpoint for its first model.
        key: bearer token, "" for none.
    """

    def __init__(self, url: str, *, model: str = "", key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"llm_url ({url}) must begin with http:// or https://")
        self._url = url.rstrip("/")
        self._key = key
        self.name = model or self._first_model()

    def count(self, text: str) -> int:
        """Estimate the number of tokens of a text (a quarter of its characters)."""
        return len(text) // _CHARS_PER_TOKEN + 1

    def cut(self, text: str, tokens: int) -> str:
        """Give the beginning of a text that has about `tokens` tokens."""
        return text[: tokens * _CHARS_PER_TOKEN]

    def reply(self, system: str, user: str, *, most: int) -> Iterator[str]:
        """Write a reply, piece by piece.

        Raises:
            ModelError: the endpoint cannot be reached, refuses, or answers something else.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "max_tokens": most,
            "temperature": 0,
        }
        with self._open("/chat/completions", body) as response:
            try:
                for raw in response:
                    line = raw.decode("utf-8", "replace").strip()
                    if not line.startswith("data:") or line == "data: [DONE]":
                        continue
                    choices = json.loads(line[5:]).get("choices") or [{}]
                    piece = (choices[0].get("delta") or {}).get("content")
                    if piece:
                        yield str(piece)
            except (OSError, ValueError, AttributeError, LookupError) as error:
                raise ModelError(f"{self._url} broke off its reply: {error}") from error

    def _first_model(self) -> str:
        with self._open("/models") as response:
            try:
                return str(json.loads(response.read())["data"][0]["id"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise ModelError(f"{self._url}/models names no model; set llm_model") from error

    def _open(self, path: str, body: object = None) -> addinfourl:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        try:
            response: addinfourl = urllib.request.urlopen(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode("utf-8", "replace").strip()
            raise ModelError(f"{self._url}{path} answered {error.code}: {detail or error.reason}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._url} cannot be reached: {getattr(error, 'reason', error)}") from error
        return response
