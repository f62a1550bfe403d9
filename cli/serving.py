"""`l2m serve` and `l2m mcp`: collections for other programs."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Annotated

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import (
    Json,
    ModelOption,
    UrlOption,
    complete_collection,
    is_quiet,
    opened,
    ready,
    settings_of,
)
from l2m_rag.errors import UsageError

OnlyCollection = Annotated[
    str | None,
    typer.Option(
        "--collection",
        "-c",
        metavar="NAME",
        help="Show this collection only [default: all].",
        autocompletion=complete_collection,
    ),
]


def serve(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, metavar="PORT", help="0 takes a free one.")] = 8077,
    collection: OnlyCollection = None,
    token: Annotated[
        str, typer.Option(envvar="L2M_TOKEN", metavar="T", help="Bearer token that requests must carry.")
    ] = "",
    model: ModelOption = None,
    llm_url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Answer over HTTP, for people and programs.

    Examples:
      l2m serve
      l2m serve -c contracts --port 9000
      L2M_TOKEN=... l2m serve --host 0.0.0.0

    A browser gets a page to ask on; programs get JSON (/search, /ask) and an OpenAI-compatible interface (/v1).
    By default only this machine can reach it; beyond that a token is needed. Ctrl-C ends it, with exit code 0.
    """
    from l2m_rag import server

    server.require("server")
    from l2m_rag.server import guard, http

    if model and llm_url:
        raise UsageError("--model and --llm-url exclude each other: give one model")
    settings = settings_of(ctx, collection=collection, model=model, llm_url=llm_url)

    def on_ready(url: str) -> None:
        if as_json:
            output.say_json({"listening": url})
        elif not is_quiet(ctx):
            output.remark(f"listening on {url}, Ctrl-C ends")

    with guard.bind(host, port, token=token) as bound:
        if collection:
            opened(settings).info()  # that it is not there is better said now
        ready(ctx, settings, as_json=as_json, decoder=True, new=True)
        with suppress(KeyboardInterrupt):  # for a server that is the end, not an interruption
            http.serve(settings, bound, host=host, token=token, only=collection, on_ready=on_ready)


def mcp(ctx: typer.Context, collection: OnlyCollection = None, as_json: Json = False) -> None:
    """Offer collections as MCP tools, over stdio.

    Examples:
      l2m mcp
      l2m mcp -c contracts

    It is started by a program that speaks the Model Context Protocol: tell that program the command `l2m` with the
    argument `mcp`. The tools search, ask and read documents; none changes anything.
    """
    from l2m_rag import server

    server.require("mcp")
    from l2m_rag.server import mcp as tools

    settings = settings_of(ctx, collection=collection)
    if collection:
        opened(settings).info()
    ready(ctx, settings, as_json=as_json, decoder=True, new=True)
    # Reading stdin cannot be interrupted and nothing is written here: a signal may end the process as it stands.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tools.serve(settings, only=collection)
