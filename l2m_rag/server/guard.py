"""Who may speak to the server: loopback by default, a token beyond it, no foreign names, no foreign pages.

A page in a browser can send requests to 127.0.0.1, also under a name of its own that it points there (DNS rebinding).
So the Host header must be a name of this server, and an Origin header must be this server itself.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, model_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2m_rag.errors import (
    CollectionNotFound,
    ConfigError,
    CorruptError,
    IncompatibleError,
    L2MError,
    LockedError,
    ModelError,
    UsageError,
    WeightsError,
)
from l2m_rag.server.worker import BusyError

LONGEST_BODY = 1 << 20
"""Bytes of a request."""
OPEN = ("/", "/health")
"""Paths that need no token: the page, which holds nothing, and the sign of life."""

_STATUS: dict[type[L2MError], tuple[int, str]] = {
    UsageError: (400, "usage"),
    CollectionNotFound: (404, "collection_not_found"),
    IncompatibleError: (409, "incompatible"),
    LockedError: (409, "locked"),
    CorruptError: (500, "corrupt"),
    ConfigError: (500, "config"),
    ModelError: (503, "model"),
    WeightsError: (503, "weights"),
    BusyError: (503, "busy"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def problem(status: int, kind: str, message: str, code: int | None = None) -> JSONResponse:
    """Give an error as every path of the server words it.

    Args:
        status: of HTTP.
        kind: one word, for programs.
        message: one line, for people.
        code: exit code that the command line would have, None when it has none.
    """
    return JSONResponse({"error": {"type": kind, "message": " ".join(message.split()), "code": code}}, status)


def refusal(error: L2MError) -> JSONResponse:
    """Give the response for an error of the library."""
    status, kind = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), (500, "error"))
    return problem(status, kind, str(error), error.code)


def bind(host: str, port: int, *, token: str) -> socket.socket:
    """Give a socket that is bound and does not listen yet.

    Raises:
        UsageError: other machines could reach it and there is no token, or the token cannot be sent.
        L2MError: the address is not there or in use.
    """
    if not (token.isprintable() and token.isascii()) or " " in token:
        raise UsageError("the token must be printable ASCII characters without spaces")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        if not token and not _is_loopback(str(address[0])):
            raise UsageError(f"other machines can reach {host}: give --token (or L2M_TOKEN), or leave --host away")
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise L2MError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return bound


def url(bound: socket.socket) -> str:
    """Give the address of a socket as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_names(host: str, bound: socket.socket) -> Callable[[str], bool]:
    """Give what tells whether a Host header's name is one of this server.

    Beyond loopback every numeric address is one: a page of somebody else can only come with a name.

    Args:
        host: as the user gave it.
        bound: the socket.
    """
    address = bound.getsockname()[0]
    names = {"localhost", "127.0.0.1", "::1", host.lower(), address}
    if _is_loopback(address):
        return names.__contains__
    own = socket.gethostname().lower()
    names |= {own, f"{own}.local"}
    return lambda name: name in names or _is_address(name)


class Body(BaseModel):
    """What a request may carry: JSON whose texts are whole characters."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("it is nested too deeply, or a text in it holds half of a surrogate pair") from None
        return value


class Guard:
    """Wraps an application: what may not come in is answered here, and every answer gets the headers above.

    Args:
        app: the application.
        token: bearer token that every path but `OPEN` needs; "" for none.
        is_own: says whether the name in a Host header is one of this server.
    """

    def __init__(self, app: ASGIApp, *, token: str, is_own: Callable[[str], bool]) -> None:
        self._app = app
        self._token = token
        self._is_own = is_own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # nothing else is served
            return
        send = _with_headers(send)
        refused = self._refused(scope, Headers(scope=scope))
        body = None if refused else await _body(receive)
        if refused is None and body is None:
            refused = _too_large()
        if refused is not None:
            await refused(scope, receive, send)
            return
        await self._app(scope, _again(body or b"", receive), send)

    def _refused(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if not self._is_own(_name(host)):
            return problem(421, "host", f"this server is not called {host!r}")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return problem(403, "origin", f"pages of {origin!r} may not use this server")
        if self._token and scope["path"] not in OPEN and not self._holds_token(headers.get("authorization", "")):
            response = problem(401, "token", "this server needs a token: Authorization: Bearer TOKEN")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        media_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and media_type != "application/json":
            return problem(415, "media_type", "the body must be JSON: Content-Type: application/json")
        if int(headers.get("content-length", "0")) > LONGEST_BODY:  # the HTTP parser passes on nothing but digits
            return _too_large()
        return None

    def _holds_token(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.encode())
        return same and scheme.lower() == "bearer"


def _too_large() -> JSONResponse:
    return problem(413, "too_large", f"the body may have {LONGEST_BODY:,} bytes at most")


def _name(host: str) -> str:
    """Give the name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


async def _body(receive: Receive) -> bytes | None:
    """Read a whole body, or give None when it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone; the application will see that too
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > LONGEST_BODY:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a `receive` that begins with a body that was read already."""
    first = True

    async def receiving() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receiving
