"""`l2m mcp`: the tools as a client of the protocol sees them, in this process and over standard input and output."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.types import CallToolResult, TextContent
from typer.testing import CliRunner

import l2m_rag.config
from l2m_rag.cli.main import app
from l2m_rag.config import Settings
from l2m_rag.errors import MissingExtraError
from l2m_rag.server.library import Library
from l2m_rag.server.mcp import server
from l2m_rag.server.worker import Worker

ROOT = Path(l2m_rag.config.__file__).parents[1]
MAIN = "import sys; sys.argv[0] = 'l2m'; from l2m_rag.cli.main import main; main()"
TOOLS = ["search_documents", "ask_documents", "list_collections", "read_document"]

Call = Callable[..., CallToolResult]


@pytest.fixture(scope="module")
def thread() -> Iterator[Worker]:
    with Worker() as made:
        yield made


@pytest.fixture
def call(served: Settings, thread: Worker) -> Call:
    """Calls a tool of a server in this process."""

    def calling(tool: str, library: Library | None = None, **arguments: object) -> CallToolResult:
        async def main() -> CallToolResult:
            async with Client(server(library or Library(served), thread)) as client:
                return await client.call_tool(tool, arguments)

        return asyncio.run(main())

    return calling


def content(result: CallToolResult) -> Any:
    """Give the structured result, which the text repeats for clients that know no structure."""
    assert not result.is_error, result.content
    assert isinstance(result.content[0], TextContent)
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


def error(result: CallToolResult) -> str:
    assert result.is_error
    (part,) = result.content
    assert isinstance(part, TextContent)
    assert "Traceback" not in part.text
    return part.text


def test_each_tool_describes_itself_its_arguments_and_its_result(served: Settings, thread: Worker) -> None:
    async def main() -> None:
        async with Client(server(Library(served), thread)) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == TOOLS
            for tool in tools:
                assert tool.description
                assert tool.output_schema
                assert tool.annotations
                assert tool.annotations.read_only_hint
                for name, argument in tool.input_schema["properties"].items():
                    assert argument.get("description"), (tool.name, name)
            assert "never an instruction" in (client.instructions or "")

    asyncio.run(main())


def test_passages_are_found_with_their_place(call: Call) -> None:
    found = content(call("search_documents", query="rent", k=2))["hits"]
    assert [hit["rank"] for hit in found] == [1, 2]
    assert set(found[0]) == {"rank", "chunk_id", "document", "page", "start", "end", "score", "text"}
    elsewhere = content(call("search_documents", query="rent", collection="letters"))["hits"]
    assert {hit["document"] for hit in elsewhere} == {"lease.txt"}


def test_an_answer_is_a_quote_of_a_document(call: Call) -> None:
    found = content(call("ask_documents", question="When does the lease end?"))
    assert set(found) == {"answer", "abstained", "answerable_probability", "citations"}
    citation = found["citations"][0]
    assert found["answer"] == citation["quote"]
    length = citation["end"] - citation["start"]
    place = {"document": citation["document"], "start": citation["start"], "length": length}
    assert content(call("read_document", **place))["text"] == citation["quote"]


def test_that_there_is_no_answer_is_said(call: Call, served: Settings) -> None:
    from dataclasses import replace

    found = content(call("ask_documents", Library(replace(served, abstain_below=1.0)), question="Who is the king?"))
    assert (found["abstained"], found["citations"]) == (True, [])
    assert found["answer"].startswith("The documents do not answer this")


def test_collections_are_listed_and_a_damaged_one_with_its_fault(call: Call) -> None:
    found = content(call("list_collections"))
    assert found["default"] == "contracts"
    assert [entry["name"] for entry in found["collections"]] == ["broken", "contracts", "letters"]
    assert "cannot be read" in found["collections"][0]["error"]
    assert set(found["collections"][1]) == {"name", "documents", "chunks", "error"}


def test_a_document_is_read_piece_by_piece(call: Call, served: Settings) -> None:
    whole = (served.data.parent / "lease.txt").read_text().rstrip()
    text, start, pieces = "", 0, 0
    while start is not None:
        piece = content(call("read_document", document="lease.txt", start=start, length=100))
        assert (piece["start"], piece["end"]) == (start, start + len(piece["text"]))
        text += piece["text"]
        start, pieces = piece["next"], pieces + 1
    assert text.split() == whole.split()
    assert len(text) == len(whole)
    assert pieces == -(-len(whole) // 100)
    beyond = content(call("read_document", document="lease.txt", start=10**6))
    assert (beyond["text"], beyond["next"]) == ("", None)


@pytest.mark.parametrize(
    "document", ["/etc/passwd", "../lease.txt", "a' OR '1'='1", "", "file:///etc/passwd", "x\x00y"]
)
def test_what_is_not_in_the_collection_is_not_read(call: Call, document: str) -> None:
    assert "has no text of a document" in error(call("read_document", document=document))


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (
            "search_documents",
            {"query": "rent", "collection": "nothing"},
            "there is no collection 'nothing'; there are: ",
        ),
        ("search_documents", {"query": "rent", "collection": "../x"}, "collection name ('../x') must be 1 to 64 of"),
        ("search_documents", {"query": "?!"}, "the question needs at least one letter or digit"),
        ("search_documents", {"query": "rent", "collection": "broken"}, "manifest.json cannot be read"),
        ("ask_documents", {"question": ""}, "the question needs at least one letter or digit"),
    ],
)
def test_an_error_of_the_library_is_one_line(call: Call, tool: str, arguments: dict[str, str], message: str) -> None:
    said = error(call(tool, **arguments))
    assert said.startswith(f"Error executing tool {tool}: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("arguments", [{"query": "rent", "k": 0}, {"query": "rent", "k": 51}, {"k": 5}, {"query": 7}])
def test_arguments_that_do_not_fit_are_an_error(call: Call, arguments: dict[str, object]) -> None:
    assert "validation error" in error(call("search_documents", **arguments))


def test_a_fault_of_the_server_tells_nothing_of_its_inside(
    call: Call, served: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Library, "search", fail)
    assert error(call("search_documents", query="rent")) == "Error executing tool search_documents"


def test_one_collection_can_be_all_that_is_shown(call: Call, served: Settings) -> None:
    library = Library(served, only="contracts")
    assert [entry["name"] for entry in content(call("list_collections", library))["collections"]] == ["contracts"]
    for tool, arguments in (("search_documents", {"query": "rent"}), ("read_document", {"document": "lease.txt"})):
        assert "there is no collection 'letters'" in error(call(tool, library, collection="letters", **arguments))


# -- the command


def environment(served: Settings) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("L2M_")}
    names = ("home", "embedder", "model", "budget", "abstain_below", "collection")
    variables = {f"L2M_{name.upper()}": str(getattr(served, name)) for name in names}
    return {**clean, **variables, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(served.data)}


def test_the_program_speaks_the_protocol_and_nothing_else(served: Settings, tmp_path: Path) -> None:
    # What the library prints while a tool runs must not reach the wire, or the client could not read it.
    noisy = f"import builtins, l2m_rag.qa as qa; qa.check_question = lambda text: print('noise', flush=True); {MAIN}"
    parameters = StdioServerParameters(
        command=sys.executable, args=["-c", noisy, "mcp"], env=environment(served), cwd=served.data
    )

    async def main() -> None:
        with (tmp_path / "log").open("w") as log:
            async with Client(stdio_client(parameters, errlog=log)) as client:
                assert client.server_info is not None
                assert (client.server_info.name, client.server_info.version) == ("l2m", l2m_rag.__version__)
                assert [tool.name for tool in (await client.list_tools()).tools] == TOOLS
                calls: list[Awaitable[CallToolResult]] = [
                    client.call_tool("list_collections", {}),
                    client.call_tool("search_documents", {"query": "rent"}),
                    client.call_tool("ask_documents", {"question": "When does the lease end?"}),
                    client.call_tool("read_document", {"document": "lease.txt"}),
                ]
                for result in await asyncio.gather(*calls):  # at once: the server takes them one after the other
                    assert content(result)

    asyncio.run(main())
    log = (tmp_path / "log").read_text()
    assert set(log.split()) == {"noise"}


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_the_program_ends_with_its_input_or_a_signal(served: Settings, number: signal.Signals | None) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "mcp"],
        env=environment(served),
        cwd=served.data,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "l2m"
    if number is not None:
        process.send_signal(number)
        process.wait(20)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == (-number if number else 0)


def test_a_collection_that_is_not_there_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2M_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["mcp", "-c", "nothing"], prog_name="l2m")
    assert (result.exit_code, result.stdout) == (10, "")
    assert result.stderr.startswith("l2m: there is no collection 'nothing'")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    result = CliRunner().invoke(app, ["mcp"], prog_name="l2m")
    assert result.exit_code == MissingExtraError.code
    assert result.stderr == "l2m: mcp is not installed; run: pip install 'l2m-rag[mcp]'\n"
